"""Tests in several processes that speak gloo: start the ranks, run cases in each, collect results.

A test starts a program with ``run_ranks``; the program is nothing but cases and a call of
``serve_cases``, which runs them all in every rank.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed

from blockscale.parallel.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PASSED = "ok"
# A rank whose case failed no longer answers; the others stop waiting for it after this.
WAIT = timedelta(seconds=100)


def run_ranks(program: Path, size: int, folder: Path) -> list[dict[str, str]]:
    """What each rank says about each case: ``PASSED``, or a traceback.

    ``folder``: empty, for what the ranks write. Raises RuntimeError, with their output, if a rank
    does not come back.
    """
    processes = [
        subprocess.Popen(  # noqa: S603 - a program of our own tests
            [sys.executable, program, str(rank), str(size), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        msg = "\n".join(outputs)
        raise RuntimeError(msg)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def serve_cases(
    cases: Iterable[Callable[[Path, Ranks], None]], prepare: Callable[[Path], None]
) -> None:
    """Be the rank that the command line says. ``prepare(folder)`` runs first, on rank 0 alone."""
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=WAIT
    )
    if rank == 0:
        prepare(folder)
    distributed.barrier()
    ranks = Ranks.joined()
    with torch.inference_mode():
        results = {case.__name__: _outcome(case, folder, ranks) for case in cases}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    distributed.barrier()
    distributed.destroy_process_group()


def _outcome(case: Callable[[Path, Ranks], None], folder: Path, ranks: Ranks) -> str:
    try:
        case(folder, ranks)
    except Exception:  # noqa: BLE001 - whatever it was, the test shows it
        trace = traceback.format_exc()
        sys.stdout.write(f"rank {ranks.rank}: {trace}")
        return trace
    return PASSED
