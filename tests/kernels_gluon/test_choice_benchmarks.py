"""The tools around the choice: what a sweep asks first, and what fits and estimates say."""

from __future__ import annotations

import json
import random
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from blockscale.kernels.corrected import table_of

ROOT = Path(__file__).resolve().parents[2]
H100 = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module


def test_a_sweep_after_another_asks_what_was_chosen_untimed_then_the_baseline(
    benchmark: Any,
    tmp_path: Path,
) -> None:
    pytest.importorskip("triton", reason="pip install triton: the sweep imports its kernels")
    sweep = benchmark("gluon_sweep")
    known = tmp_path / "sweep.jsonl"
    works = sweep.candidates(320, 7000, 4608, 2, 132)
    chosen = sweep.choose(320, 7000, 4608, 2, 132)
    times = {work.name: 50.0 for work in works if work != chosen}
    lines = [{"machine": "x"}, {"m": 320, "n": 7000, "k": 4608, "times": times}]
    known.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    first, *others = islice(sweep.order([known], random.Random(0)), 12)
    assert first == ((7000, 4608), [320])
    assert [shape for shape, _ in others[:9]] == list(sweep.BASELINE)
    assert all(m in range(17, 513) for _, tokens in others for m in tokens)


@pytest.mark.parametrize("kernels", ["gluon", "cuda"])
def test_the_table_that_ships_is_what_the_fit_writes(benchmark: Any, kernels: str) -> None:
    """The same winners from the committed sweeps, and factors for every form."""
    fit = benchmark("choice_fit")
    family = getattr(benchmark(f"{kernels}_fit"), kernels.upper())
    table = table_of(f"blockscale.kernels.{kernels}", kernels)
    document = json.loads(family.table.read_text(encoding="utf-8"))
    shapes = [shape for source in document["sources"] for shape in fit.read(family, ROOT / source)]
    ours = [shape for shape in shapes if shape.out == fit.WINNERS_OUT]
    assert fit.winners(ours, table) == table.winners


def test_grouped_fit_finds_the_thresholds_that_records_speak_for(
    benchmark: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = benchmark("grouped_fit")
    assert {name: values[0] for name, values in fit.GRID.items()} == {
        name: getattr(fit.grouped_choice, name) for name in fit.GRID
    }
    case = "masked-masked-32x192-4096x7168"
    lines = [
        {"case": case, "out_dtype": "bfloat16", "backend": backend, "detail": name, "time_us": us}
        for backend, name, us in (
            ("deep_gemm", "", 90.0),
            ("gluon", "masked-256x128s3b2g32", 110.0),
            ("gluon", "masked-128x128s5b1g32", 100.0),
        )
    ]
    records = tmp_path / "grouped.jsonl"
    records.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["grouped_fit.py", str(records)])
    assert fit.main() == 0
    said = capsys.readouterr().out
    assert "10.0%  0.900  masked-256x128s3b2g32, fastest masked-128x128s5b1g32" in said
    best = said.splitlines()[2]
    assert best.startswith("1.000")
    assert "ROWS_FOR_WIDE_SLOTS = 192" in best
    assert fit.choice(next(iter(fit.read(records)[0]))) == "masked-256x128s3b2g32"


def test_estimates_are_labelled_and_keep_what_did_not_change(benchmark: Any) -> None:
    estimate = benchmark("gluon_estimate")
    found = list(estimate.estimates(H100))
    assert len(found) == 108
    assert {one.source for one in found} <= {"same", "sweep", "model"}
    assert all(one.then == one.now for one in found if one.source == "same")


def test_an_estimate_takes_the_sweep_before_the_model(benchmark: Any) -> None:
    estimate = benchmark("gluon_estimate")
    key = (320, 7000, 4608)
    now = estimate.choose(*key, 2, 132)
    works = [work for work in estimate.candidates(*key, 2, 132) if work.name != now.name]

    def made(timed: str, times: dict[str, float]) -> Any:
        lines = {"deep_gemm": {"time_us": 30.0}, "gluon": {"time_us": 20.0, "detail": timed}}
        return estimate.estimate(key, lines, times)

    assert (made(now.name, {}).source, made(now.name, {}).now) == ("same", 1.5)
    swept = made(works[0].name, {works[0].name: 22.0, now.name: 11.0})
    assert (swept.source, swept.now, swept.best) == ("sweep", 3.0, 3.0)
    modelled = made(works[0].name, {})
    clocks = [estimate.clocks(work, *key[:2], 2, 132) for work in (works[0], now)]
    assert (modelled.source, modelled.now) == ("model", 1.5 * clocks[0] / clocks[1])
    assert made("a work that is gone", {}).source == "unknown"


def test_lanes_are_compared_with_the_boxes_of_the_same_tile(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every work's name is read, and each way stands beside what shares as much with as many."""
    sweep, ways = benchmark("cuda_sweep"), benchmark("cuda_ways")
    times: dict[str, float] = {"gluon 128x128s5b1": 1.0}
    for work in sweep.candidates(512, 4096, 1024, sweep.DType.FLOAT16, 132):
        boxes, *lanes = sweep.ways_to_write(work)
        assert ways.NAME.fullmatch(boxes.name)["lanes"] is None
        assert all(ways.NAME.fullmatch(way.name)["lanes"] for way in lanes)
        times[boxes.name] = 10.0 if work.form.share.name == "NOTHING" else 40.0
        times |= {way.name: times[boxes.name] / 2 for way in lanes}
    ways.print_ways([{"m": 512, "n": 4096, "k": 1024, "out_dtype": "float16", "times": times}])
    lines = capsys.readouterr().out.splitlines()
    for words in ("128x128 one", "64x32x2 few", "128x32 few", "64x16 many"):
        start = f"float16 {words} K <= 2048: lanesw2 x2.000"
        assert any(line.startswith(start) for line in lines), words
    assert all("x2.000 (worst x2.000)" in line for line in lines)
