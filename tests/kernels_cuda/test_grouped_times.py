"""Who serves experts is estimated from what GPUs ran, and not where nothing was measured."""

from __future__ import annotations

import json
from importlib import import_module
from math import exp, expm1, log
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from blockscale.formats import DType
from blockscale.kernels.grouped_times import (
    EVEN_WEIGHT,
    ROWS,
    Behind,
    cuda_us,
    deep_gemm_us,
    gluon_us,
    shipped,
)

ROOT = Path(__file__).resolve().parents[2]
FP16 = DType.FLOAT16
WEIGHTS = (EVEN_WEIGHT // 4, EVEN_WEIGHT * 4)
MADE = Behind((-0.12, -0.1, -0.08, -0.04, 0.0, 0.02), 0.03, WEIGHTS)
MACHINES = ("nvidia-h100", "nvidia-h200")


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("grouped_times_fit")


def test_a_level_stands_for_its_rows_and_a_logarithm_lies_between() -> None:
    assert [MADE.at(rows, EVEN_WEIGHT) for rows in ROWS] == pytest.approx(MADE.levels)
    assert MADE.at(64, EVEN_WEIGHT) == pytest.approx(-0.02)
    for few in (0, 1 / 64, 1 / 32):
        assert MADE.at(few, EVEN_WEIGHT) == pytest.approx(MADE.levels[0])
    assert MADE.at(1 << 20, EVEN_WEIGHT) == pytest.approx(MADE.levels[-1])


def test_the_weight_counts_where_groups_have_many_rows() -> None:
    assert MADE.at(512, 2 * EVEN_WEIGHT) == pytest.approx(0.05)
    assert MADE.at(256, 2 * EVEN_WEIGHT) == pytest.approx(0.01 + 0.03 / 2)
    assert MADE.at(128, 2 * EVEN_WEIGHT) == MADE.at(128, EVEN_WEIGHT)
    assert MADE.at(512, 1 << 40) == MADE.at(512, WEIGHTS[1])
    assert MADE.at(512, 1) == MADE.at(512, WEIGHTS[0])


def test_others_are_behind_by_what_the_table_says() -> None:
    for tokens, experts, (n, k) in ((1, 256, (3072, 1536)), (4096, 8, (6144, 7168))):
        cuda = cuda_us(tokens, experts, (n, k), FP16)
        assert cuda is not None
        for family, us in (("gluon", gluon_us), ("deep_gemm", deep_gemm_us)):
            found = us(tokens, experts, (n, k), FP16)
            assert found is not None
            behind = shipped()[family].at(tokens * 8 / experts, n * k)
            assert log(found / cuda) == pytest.approx(behind)


def test_the_table_that_ships_chooses_as_its_records_do(fit: Any) -> None:
    """By those that count, of the kernels of today: the mean loss is below 2 %."""
    document = json.loads(fit.TARGET.read_text(encoding="utf-8"))
    assert document["rows"] == [*ROWS]
    times, _ = fit.read([ROOT / source for source in document["sources"]])
    seen = fit.observed(times)
    for among in (fit.FAMILIES, (*fit.FAMILIES, fit.DEEP_GEMM)):
        lost = [one.lost(one.fastest(shipped(), among), among) for one in seen]
        assert expm1(fmean(lost)) < 0.02


def test_times_grow_with_tokens_and_weights() -> None:
    few, many = (cuda_us(tokens, 256, (3072, 3072), FP16) for tokens in (8, 4096))
    larger = cuda_us(8, 256, (6144, 3072), FP16)
    assert few is not None
    assert many is not None
    assert larger is not None
    assert few < larger < many


def test_float32_results_were_not_measured() -> None:
    assert cuda_us(64, 8, (4096, 4096), DType.FLOAT32) is None
    assert gluon_us(64, 8, (4096, 4096), DType.FLOAT32) is None
    assert deep_gemm_us(64, 8, (4096, 4096), DType.FLOAT32) is None


def line(fit: Any, case: str, backend: str, time_us: float, **others: Any) -> dict[str, Any]:
    records = import_module("grouped_records")
    known = next(one for one in records.all_cases() if one.name == case)
    detail = records.chosen(backend, known, "bfloat16") if backend in fit.FAMILIES else ""
    return {
        "case": case,
        "out_dtype": "bfloat16",
        "backend": backend,
        "detail": detail,
        "commit": "new",
        "time_us": time_us,
        **others,
    }


def written(folder: Path, machine: str, lines: list[dict[str, Any]]) -> Path:
    path = folder / machine / "grouped.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


LARGE = "contiguous-contiguous-4x8192-6144x7168"


def test_what_counts_is_sound_newest_and_of_the_kernel_that_is_chosen_today(
    fit: Any, tmp_path: Path
) -> None:
    lines = [
        line(fit, LARGE, "cuda", 100.0, commit="old"),
        line(fit, LARGE, "cuda", 90.0),
        line(fit, LARGE, "cuda", 92.0),
        line(fit, LARGE, "cuda", 50.0, detail="a form that is not chosen"),
        line(fit, LARGE, "gluon", 99.0, commit="71f0fd6"),
        line(fit, "minimax-blocks8-t16-3072x3072", "gluon", 9.0, commit="71f0fd6"),
        line(fit, "minimax-blocks16-t16-3072x3072", "gluon", 8.0),
        line(fit, "minimax-masked-t16-3072x3072", "gluon", 7.0),
        {**line(fit, LARGE, "gluon", 99.0), "case": "of another benchmark"},
    ]
    times, left = fit.read([written(tmp_path, MACHINES[0], lines)])
    by_tokens = {product.tokens: own for product, own in times.items()}
    assert by_tokens[4096].planned == {"cuda": 91.0}
    assert (by_tokens[16].planned, by_tokens[16].masked) == ({"gluon": 9.0}, {"gluon": 7.0})
    assert sorted(left.values()) == [1, 1, 1]


def test_a_missing_time_is_carried_over_by_deep_gemms(fit: Any, tmp_path: Path) -> None:
    both = [("gluon", 110.0), ("cuda", 100.0), ("deep_gemm", 90.0)]
    paths = [
        written(tmp_path, MACHINES[0], [line(fit, LARGE, *one) for one in both]),
        written(
            tmp_path,
            MACHINES[1],
            [line(fit, LARGE, "cuda", 50.0), line(fit, LARGE, "deep_gemm", 45.0)],
        ),
    ]
    seen = {one.product.machine: one for one in fit.observed(fit.read(paths)[0])}
    assert [seen[name].carried for name in MACHINES] == [frozenset(), {"gluon"}]
    assert [exp(seen[name].behind("gluon")) for name in MACHINES] == pytest.approx([1.1, 1.1])
    assert exp(seen[MACHINES[1]].behind("deep_gemm")) == pytest.approx(0.9)
    assert seen[MACHINES[1]].lost("gluon", fit.FAMILIES) == pytest.approx(log(1.1))
    assert seen[MACHINES[1]].lost("cuda", fit.FAMILIES) == 0
    assert seen[MACHINES[1]].lost("cuda", (*fit.FAMILIES, "deep_gemm")) == pytest.approx(-log(0.9))


def test_slots_stand_in_for_rows_that_were_not_timed(fit: Any, tmp_path: Path) -> None:
    few = [("gluon", 10.0, "blocks8"), ("gluon", 9.0, "masked"), ("cuda", 11.0, "masked")]
    few.append(("deep_gemm", 12.0, "masked"))
    lines = [line(fit, f"minimax-{how}-t16-3072x3072", name, us) for name, us, how in few]
    (one,) = fit.observed(fit.read([written(tmp_path, MACHINES[0], lines)])[0])
    assert one.us == {"gluon": 10.0, "cuda": 11.0, "deep_gemm": 12.0}
    assert not one.carried
    only_slots = [line for line in lines if "masked" in line["case"]]
    path = written(tmp_path, MACHINES[1], only_slots)
    assert fit.observed(fit.read([path])[0]) == []


def test_the_fit_finds_what_records_were_made_with(
    fit: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the committed files' form: ``--write`` of them is what the loader reads."""
    lines = []
    for case in import_module("grouped_records").all_cases():
        if case.family != "contiguous":
            continue
        behind = 0.01 + 0.05 * log(case.n * case.k / EVEN_WEIGHT) / log(2)
        lines += [
            line(fit, case.name, "cuda", 100.0),
            line(fit, case.name, "gluon", 100 * exp(behind)),
        ]
    path = written(tmp_path, MACHINES[0], lines)
    found = fit.fit(fit.observed(fit.read([path])[0]))["gluon"]
    assert found.levels[-1] == pytest.approx(0.01, abs=2e-3)
    assert found.per_doubling == pytest.approx(0.05, abs=2e-3)
    assert found.levels[0] == pytest.approx(found.levels[-1])
    monkeypatch.setattr(fit, "ROOT", tmp_path)
    monkeypatch.setattr(fit, "TARGET", tmp_path / "grouped_times.json")
    monkeypatch.setattr(import_module("record").subprocess, "run", lambda *_, **__: Log())
    monkeypatch.setattr("sys.argv", ["grouped_times_fit.py", str(path), "--write"])
    assert fit.main() == 0
    said = capsys.readouterr().out
    assert "nvidia-h100, gluon, cuda: 8 products, 0 with a time carried over" in said
    table = json.loads((tmp_path / "grouped_times.json").read_text(encoding="utf-8"))
    assert table["behind"] == {"gluon": [*found.levels, found.per_doubling]}
    assert (table["commit"], table["sources"]) == ("abc", ["nvidia-h100/grouped.jsonl"])


class Log:
    stdout = "abc 2026-11-26\n"
