"""The plots of the committed GEMM records: all drawn, with every shape, from the numbers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

pytest.importorskip("matplotlib", reason="pip install 'blockscale[plots]'")

ROOT = Path(__file__).parent.parent.parent
COMMAND = ROOT / "tools" / "plots.py"
RECORDS = ROOT / "benchmarks" / "results" / "nvidia-h200" / "gemm.jsonl"
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(COMMAND), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    """tools/plots.py as a module."""
    spec = importlib.util.spec_from_file_location("plots", COMMAND)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plots"] = module  # dataclasses look there for the annotations' names
    spec.loader.exec_module(module)
    return module


def committed() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def test_one_command_draws_every_shape(plots: ModuleType, tmp_path: Path) -> None:
    """PNG and SVG of both; an SVG names its texts in comments."""
    done = run("--out", str(tmp_path), "--machine", "nvidia-h200")
    assert (done.returncode, done.stderr) == (0, "")
    names = [
        f"gemm-{plot}-float16.{kind}" for plot in ("roofline", "ratio") for kind in ("png", "svg")
    ]
    assert [Path(line).name for line in done.stdout.splitlines()] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for name in names[::2]:
        assert (tmp_path / name).read_bytes().startswith(PNG)
    ratio = (tmp_path / "gemm-ratio-float16.svg").read_text(encoding="utf-8")
    shown = plots.shown(plots.read(RECORDS), "float16")
    shapes = {(point.n, point.k) for point in shown}
    assert len(shapes) >= 9
    assert all(f"<!-- N = {n}, K = {k} -->" in ratio for n, k in shapes)
    roofline = (tmp_path / "gemm-roofline-float16.svg").read_text(encoding="utf-8")
    bandwidth, peak = shown[-1].ceilings
    assert f"<!-- FP8 product {peak:,.0f} TFLOP/s -->" in roofline
    assert f"<!-- copy {bandwidth / 1e3:.2f} TB/s -->" in roofline


def test_points_lie_where_the_records_say(plots: ModuleType) -> None:
    """Rate and operations per byte, computed anew, are the records' own to their last digit."""
    rows = {
        (r["m"], r["n"], r["k"], r["backend"], r["out_dtype"]): r
        for r in committed()
        if not r["detail"].startswith("candidate")
    }
    found = plots.read(RECORDS)
    assert len(found) == len(rows)  # nothing is hidden
    for point in found:
        row = rows[point.m, point.n, point.k, point.backend, point.out_dtype]
        # Records round times to 0.001 us and rates to 0.1.
        slack = 0.0005 / row["time_us"]
        assert abs(point.tflops - row["tflops"]) <= 0.051 + slack * point.tflops
        gb_s = point.tflops * 1e3 / point.intensity
        assert abs(gb_s - row["gb_s"]) <= 0.051 + slack * gb_s


def test_the_last_of_two_records_counts(plots: ModuleType, tmp_path: Path) -> None:
    first, second, *_ = committed()
    again = {**first, "time_us": 1.5, "date": "2030-01-01"}
    file = tmp_path / "gemm.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (first, second, again)))
    found = plots.read(file)
    assert [point.time_us for point in found] == [second["time_us"], 1.5]
    assert found[-1].where.endswith(f"2030-01-01, source {first['commit']}")


def test_the_kept_plots_are_of_the_newest_records(plots: ModuleType, tmp_path: Path) -> None:
    """Of the machine that ran last; others say so."""
    machine = plots.newest()
    assert json.loads((plots.RESULTS / machine / "gemm.jsonl").read_text().splitlines()[-1])[
        "date"
    ] == max(
        json.loads(path.read_text().splitlines()[-1])["date"]
        for path in plots.RESULTS.glob("*/gemm.jsonl")
    )
    assert plots.is_current(ROOT / "docs" / "plots"), "run python tools/tables.py"
    for kind in ("png", "svg"):
        for plot in ("roofline", "ratio"):
            assert (ROOT / "docs" / "plots" / f"gemm-{plot}-float16.{kind}").is_file()
    for plot in ("roofline", "ratio"):
        (tmp_path / f"gemm-{plot}-float16.svg").write_text("<!-- older -->")
    assert not plots.is_current(tmp_path)
    assert run("--check", "--out", str(tmp_path)).returncode == 1
    assert run("--check").returncode == 0


def test_ratios_are_those_of_the_records(plots: ModuleType) -> None:
    """Every measured shape of a backend has one, beside DeepGEMM's time in turns with it."""
    times = {
        (r["m"], r["n"], r["k"], r["backend"], r["time_us"]): r["deep_gemm_us"]
        for r in committed()
        if r["out_dtype"] == "float16" and "deep_gemm_us" in r
    }
    for p in plots.shown(plots.read(RECORDS), "float16"):
        if p.out_dtype == "float16":
            assert p.ratio == times[p.m, p.n, p.k, p.backend, p.time_us] / p.time_us
    shape = [p for p in plots.shown(plots.read(RECORDS), "float16") if (p.n, p.k) == (576, 7168)]
    best = plots.best_ratios(shape)
    assert set(best) == {p.m for p in shape}
    assert best[1] == max(p.ratio for p in shape if p.m == 1 and p.backend in plots.OWN)


def test_deep_gemm_is_compared_as_bfloat16(plots: ModuleType) -> None:
    shown = plots.shown(plots.read(RECORDS), "float16")
    dtypes = {(point.backend, point.out_dtype) for point in shown}
    assert ("deep_gemm", "bfloat16") in dtypes
    assert {dtype for name, dtype in dtypes if name not in {"deep_gemm", "bf16_matmul"}} == {
        "float16"
    }


def test_nothing_to_draw_is_one_line(
    plots: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No file, and a file with nothing to compare."""
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    out = tmp_path / "plots"
    assert plots.main(["--machine", "abacus", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.endswith("gemm.jsonl: no records; make some with benchmarks/gemm.py --record\n")
    (tmp_path / "abacus").mkdir()
    alone = next(row for row in committed() if row["backend"] == "deep_gemm")
    (tmp_path / "abacus" / "gemm.jsonl").write_text(json.dumps(alone))
    assert plots.main(["--machine", "abacus", "--out", str(out)]) == 2
    assert capsys.readouterr().err.endswith("no float16 output beside deep_gemm's\n")
    assert not out.exists()
