"""Microseconds of both kernel families: comparable, and right often enough to choose by."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from blockscale.formats import DType
from blockscale.kernels import calibration
from blockscale.kernels.calibration import cuda_us, gluon_us, shipped

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "src" / "blockscale" / "kernels" / "tables" / "calibration.json"
FP16 = DType.FLOAT16


def test_the_faster_estimate_loses_little_on_shapes_that_the_fit_has_not_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1.1 %, five-fold over (N, K), where Gluon alone loses 7.9 % (``family_fit.py``)."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fit = import_module("family_fit")
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    held_out = {(n, k) for n, k in document["held_out"]}
    chosen, alone, errors = [], [], []
    for shape in (one for source in document["sources"] for one in fit.read(ROOT / source, FP16)):
        if (shape.n, shape.k) not in held_out:
            continue
        asked = (shape.m, shape.n, shape.k, FP16, 132)
        estimates = {"gluon": gluon_us(*asked), "cuda": cuda_us(*asked)}
        assert None not in estimates.values()
        best = min(shape.us.values())
        chosen.append(log(shape.us[min(estimates, key=estimates.__getitem__)] / best))
        alone.append(log(shape.us["gluon"] / best))
        errors.append(abs(log(estimates["gluon"] / shape.us["gluon"])))
    assert len(chosen) > 40
    assert sum(chosen) / len(chosen) < 0.03
    assert sum(chosen) < 0.5 * sum(alone)
    # They are microseconds, roughly.
    assert sum(errors) / len(errors) < 0.15


def test_the_faster_float32_estimate_loses_little_on_weights_that_were_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1.3 %, where Gluon alone loses 8.7 % (``family_fit.py``, H100)."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fit = import_module("family_fit")
    table = shipped()
    fitted = fit.Fitted(table.ranges, table.factors)
    sources = json.loads(TABLE.read_text(encoding="utf-8"))["float32_sources"]
    shapes = [one for source in sources for one in fit.read(ROOT / source, DType.FLOAT32)]
    assert len(shapes) > 90
    assert fit.with_float32(fitted, shapes).float32 == table.float32
    chosen, alone = [], []
    for pair in {(shape.n, shape.k) for shape in shapes}:
        others = [shape for shape in shapes if (shape.n, shape.k) != pair]
        without = fit.with_float32(fitted, others).float32
        monkeypatch.setattr(calibration, "shipped", partial(replace, table, float32=without))
        for shape in (shape for shape in shapes if (shape.n, shape.k) == pair):
            asked = (shape.m, shape.n, shape.k, DType.FLOAT32, 132)
            estimates = {"gluon": gluon_us(*asked), "cuda": cuda_us(*asked)}
            best = min(shape.us.values())
            chosen.append(log(shape.us[min(estimates, key=lambda f: estimates[f] or 0)] / best))
            alone.append(log(shape.us["gluon"] / best))
    assert sum(chosen) / len(chosen) < 0.02
    assert sum(chosen) < 0.25 * sum(alone)


def test_the_faster_float32_estimate_loses_little_on_another_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1.7 % on an H200, 141 (N, K), where Gluon alone loses 11.8 % (``family_fit.py``)."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fit = import_module("family_fit")
    (sweep,) = fit.JUDGES
    shapes = fit.read(sweep, DType.FLOAT32)
    assert len(shapes) > 1000
    chosen, alone = [], []
    for shape in shapes:
        asked = (shape.m, shape.n, shape.k, DType.FLOAT32, 132)
        family = "gluon" if (gluon_us(*asked) or 0) < (cuda_us(*asked) or 0) else "cuda"
        best = min(shape.us.values())
        chosen.append(log(shape.us[family] / best))
        alone.append(log(shape.us["gluon"] / best))
    assert sum(chosen) / len(chosen) < 0.025
    assert sum(chosen) < 0.25 * sum(alone)


@pytest.mark.parametrize("estimate", [gluon_us, cuda_us])
def test_nothing_is_estimated_below_the_sweep(estimate: Callable[..., float | None]) -> None:
    assert estimate(shipped().least_m - 1, 4096, 7168, FP16, 132) is None
    for out in DType:
        assert (estimate(shipped().least_m, 4096, 7168, out, 132) or 0) > 0


@pytest.mark.parametrize("estimate", [gluon_us, cuda_us])
@pytest.mark.parametrize("m", [1, 32, 8192])
def test_float32_results_take_longer(estimate: Callable[..., float], m: int) -> None:
    few, many = (estimate(m, 32768, 512, out, 132) for out in (FP16, DType.FLOAT32))
    assert few < many < 2.5 * few


@pytest.mark.parametrize("processors", [1, 78, 144])
def test_estimates_are_total_beyond_the_sweep(processors: int) -> None:
    for m, n, k in ((10**6, 8, 16), (32, 10**6, 10**5), (40, 16, 10**6)):
        for estimate in (gluon_us, cuda_us):
            found = estimate(m, n, k, FP16, processors)
            assert found is not None
            assert 0 < found < 1e12


def test_estimating_needs_neither_torch_nor_triton() -> None:
    program = (
        "import sys; from blockscale.formats import DType; "
        "from blockscale.kernels.calibration import cuda_us, gluon_us; "
        "cuda_us(128, 4096, 7168, DType.FLOAT16, 132); "
        "gluon_us(128, 4096, 7168, DType.FLOAT16, 132); "
        "sys.exit(bool({'torch', 'triton', 'cuda'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
