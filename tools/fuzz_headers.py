"""Reads broken checkpoints until enough were read: none may crash, hang or take memory.

    python tools/fuzz_headers.py [--count 200000] [--seed 1] [--log FILE] [--keep DIR]

Headers, indexes and configs of small checkpoints of every dialect, broken at random
(``blockscale.testing.mutations``), are read as inspect, plan and verify read them. Each must be
read or refused with one line, within a time limit and an address space that is limited. Prints one
JSON line; exits with 1 and keeps the checkpoint if one is not.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

from blockscale.testing.mutations import Files, examine, mutants, write_files

# Skip lists may take 10 s in all before they are refused (checkpoint.skips).
HANG_SECONDS = 20
EXTRA_MEMORY_BYTES = 500_000_000


class HangError(BaseException):
    """Reading took too long. Not an Exception, so that no reader catches it."""


def main() -> int:
    """Fuzz, print, fail if something was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=None, help="append the JSON line to this file")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="for what is found")
    options = parser.parse_args()
    limit_memory()
    signal.signal(signal.SIGALRM, hang)
    answers: collections.Counter[str] = collections.Counter()
    faults: collections.Counter[str] = collections.Counter()
    slowest, started = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        for files in itertools.islice(mutants(options.seed), options.count):
            began = time.monotonic()
            fault = fault_of(Path(scratch) / "mutant", files, answers)
            slowest = max(slowest, time.monotonic() - began)
            if fault is not None:
                if not faults[fault]:
                    write_files(make(options.keep / f"found-{len(faults):03d}"), files)
                    print(fault, file=sys.stderr, flush=True)
                faults[fault] += 1
    document = {
        "benchmark": "fuzz_headers",
        "checkpoints": options.count,
        "seed": options.seed,
        "read": answers.pop("read", 0),
        "refused": answers.total(),
        "kinds_of_refusal": len(answers),
        "faults": dict(faults),
        "slowest_s": round(slowest, 2),
        "seconds": round(time.monotonic() - started),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "python": sys.version.split()[0],
    }
    print(json.dumps(document))
    if options.log:
        with options.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(document) + "\n")
    return int(bool(faults))


def fault_of(folder: Path, files: Files, answers: collections.Counter[str]) -> str | None:
    """Read one checkpoint; what is wrong with how it was read, None if nothing is."""
    write_files(folder, files)
    signal.alarm(HANG_SECONDS)
    try:
        refusal = examine(folder)
    except HangError:
        return f"took more than {HANG_SECONDS} s"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return f"{type(error).__name__} at {where}: {str(error)[:200]!r}"
    finally:
        signal.alarm(0)
    answers["read" if refusal is None else kind_of(refusal)] += 1
    return None


def kind_of(refusal: str) -> str:
    """The refusal without its names and numbers."""
    return re.sub(r"'[^']*'|\d+|/\S+", "", refusal)[-60:]


def limit_memory() -> None:
    """Let the process grow by no more than ``EXTRA_MEMORY_BYTES`` from here."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + EXTRA_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def hang(_number: int, _frame: object) -> NoReturn:
    """Interrupt the reader."""
    raise HangError


def make(folder: Path) -> Path:
    """``folder``, made with its parents."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
