"""Measurement records: one JSON line each, with what is needed to believe it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("blockscale", "torch", "transformers", "triton", "sgl-deep-gemm", "numpy")


def machine() -> str:
    """The GPU's name if torch sees one, else the processor's and how many of it."""
    try:
        import torch

        if torch.cuda.is_available():
            return str(torch.cuda.get_device_name(0))
    except ImportError:
        pass
    return f"{_processor()}, {os.cpu_count()} CPUs"


def need_gpu() -> None:
    """End the program with code 2 and one line on stderr if torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        program = Path(sys.argv[0]).name
        print(
            f"{program} needs an NVIDIA GPU, and torch {torch.__version__} sees none here; the "
            "records that were made on one are in benchmarks/results",
            file=sys.stderr,
        )
        sys.exit(2)


def record(benchmark: str, **values: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
    """A record with the machine, package versions, commit and date filled in."""
    import datetime as dt

    now = dt.datetime.now(dt.timezone.utc)
    return {
        "benchmark": benchmark,
        **values,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": now.date().isoformat(),
        "time": now.strftime("%H:%M"),
    }


def append(document: dict[str, Any]) -> Path:
    """Add one record to ``results/<machine>/<benchmark>.jsonl`` and give back its path."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", document["machine"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{document['benchmark']}.jsonl"
    append_to(path, document)
    return path


def append_to(path: Path, *documents: dict[str, Any]) -> None:
    """Add records to a file of JSON lines: several programs may be given the same one."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter, where installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # noqa: PERF203 - six names
            continue
    return found


def commit() -> str | None:
    """The short id of the checked-out commit, with ``+`` if files differ; None without git."""
    if "SOURCE_COMMIT" in os.environ:  # A copy without .git, on the GPU machine.
        return os.environ["SOURCE_COMMIT"]
    folder = Path(__file__).resolve().parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],  # noqa: S607 - git from PATH
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def last_change(sources: Sequence[str]) -> tuple[str, str]:
    """Id and date of the newest commit that changed one of these files, by the repository's root.

    Raises CalledProcessError without git.
    """
    log = ["git", "log", "-1", "--format=%h %cs", "--", *sources]
    said = subprocess.run(log, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603 - git
    found, _, date = said.stdout.strip().partition(" ")
    return found, date


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8"))
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
