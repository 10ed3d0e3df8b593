"""Unpacks SGLang's wheels, so that `make test-sglang` reads the sources that the plugin hooks into.

Nothing is installed: SGLang wants another torch and CUDA. A second run finds the folders.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("0.5.12", "0.5.13")


def main() -> int:
    """Fetch what is missing, one folder for each version; the exit code is pip's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache/sglang"))
    cache: Path = parser.parse_args().cache
    cache.mkdir(parents=True, exist_ok=True)
    for version in VERSIONS:
        target = cache / version
        if not target.is_dir():
            try:
                unpack(version, target)
            except subprocess.CalledProcessError as error:
                print(f"sglang_source: failed: {error}", file=sys.stderr)
                return 1
        print(f"sglang {version}: {target}")
    return 0


def unpack(version: str, target: Path) -> None:
    """Make ``target`` in a folder beside it and rename it when it is whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch)
        # The Python sources are the same for every version of Python that has a wheel.
        options = ("--no-deps", "--only-binary=:all:", "--python-version=3.11", "--quiet")
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
        subprocess.run([*command, f"sglang=={version}"], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "whole")
        (folder / "whole").rename(target)


if __name__ == "__main__":
    sys.exit(main())
