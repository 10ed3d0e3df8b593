"""One core for each worker: a pretend GPU's threads take turns, slowly where cores differ."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    """This worker's own, where Linux lets us say so.

    Of Python's threads one runs at a time. Two cores took 61 s of CPU time for the dense and the
    paired kernels' tests where one takes 33 s (2 cores of a shared AMD EPYC, 2026-11-26).
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(cores)[worker % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)
