"""What gemm.py's records say: computed by hand, and of the committed ones."""

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

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# 1 TB/s and 1000 TFLOP/s: a microsecond is 1e6 bytes or 1e9 operations.
CEILINGS = {"copy_gb_s": 1000, "bf16_tflops": 500, "fp8_tensor_wise_tflops": 1000}


@pytest.fixture(scope="module")
def gemm_summary() -> ModuleType:
    """benchmarks/gemm_summary.py as a module."""
    path = ROOT / "benchmarks" / "gemm_summary.py"
    spec = importlib.util.spec_from_file_location("gemm_summary", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gemm_summary"] = module  # dataclasses look there for the annotations' names
    spec.loader.exec_module(module)
    return module


def line(backend: str, out_dtype: str, time_us: float, **more: Any) -> dict[str, Any]:
    return {
        "benchmark": "gemm",
        "pass": "main",
        "commit": "new",
        "m": 16,
        "n": 4096,
        "k": 8192,
        "backend": backend,
        "out_dtype": out_dtype,
        "time_us": time_us,
        "deep_gemm_us": 60.0,
        "planned": False,
        "ceilings": CEILINGS,
        "share_of_copy": 0.5,
        "detail": "",
        **more,
    }


def test_regions(gemm_summary: ModuleType) -> None:
    """Two shapes of one range: 1.25 and 0.8 are 1.0 on average; the faster and the planned one."""
    records = [
        line("deep_gemm", "bfloat16", 60.0),
        line("gluon", "float16", 48.0, share_of_copy=0.9),
        line("cuda", "float16", 50.0, planned=True),
        line("gluon", "float16", 75.0, m=8, planned=True),
        line("cuda", "float16", 50.0, m=8, share_of_copy=0.79),
        line("triton", "float16", 49.0, m=8),
        line("cuda", "float16", 1.0, detail="candidate: other"),
    ]
    header, body = gemm_summary.regions(gemm_summary.points(records))
    cells = {(row[0], row[1]): row[2] for row in body}
    assert header[2] == "M 1-16"
    assert cells["`gluon`", "float16"] == "1.00 (0.80)"
    assert cells["`cuda`", "float16"] == "1.20 (1.20)"
    assert cells["best of ours", "float16"] == "1.22 (1.20)"
    assert cells["planned of ours", "float16"] == "0.98 (0.80)"
    assert all(row[3:] == ["not run"] * 3 for row in body[1:])
    header, body = gemm_summary.goals(gemm_summary.points(records))
    assert header == ["of", "goal", "best of ours", "planned of ours"]
    assert [row[2:] for row in body] == [
        ["1.22 (1.20): reached", "0.98 (0.80): missed"],
        [
            "79% at 8 x 4096 x 8192, 1 of 2 below: missed",
            "50% at 16 x 4096 x 8192, 2 of 2 below: missed",
        ],
        [
            "0.98 at 8 x 4096 x 8192, 1 of 1 slower: missed",
            "0.65 at 8 x 4096 x 8192, 1 of 1 slower: missed",
        ],
    ]


@pytest.mark.parametrize(
    ("shape", "floor_us", "bound"),
    [
        # 33.6 MB of weights; 1.1e9 operations.
        ((16, 4096, 8192, 4), 33.554432 + 0.131072 + 0.262144, "operands"),
        # 2 * 4096**3 operations; 34 MB and 67 MB.
        ((4096, 4096, 4096, 4), 137.438953472, "tensor cores"),
        # 4.2 MB of operands, 67 MB of result.
        ((4096, 4096, 512, 4), 4.194304 + 67.108864, "stores"),
    ],
)
def test_floors(
    gemm_summary: ModuleType, shape: tuple[int, ...], floor_us: float, bound: str
) -> None:
    floor = gemm_summary.floor_of(*shape, CEILINGS)
    assert floor.us == pytest.approx(floor_us, rel=1e-12)
    assert floor.bound == bound


def test_float32_is_apart_where_stores_bind(gemm_summary: ModuleType) -> None:
    stores = {"m": 4096, "n": 4096, "k": 512}
    records = [
        line("gluon", "float32", 62.0),
        line("cuda", "float32", 75.0),
        line("gluon", "float32", 100.0, **stores),
        line("cuda", "float32", 120.0, **stores),
    ]
    _, body = gemm_summary.float32(gemm_summary.points(records))
    cells = {(row[0], row[1]): row[2:] for row in body}
    assert cells["best of ours", "do not bind"][:2] == ["1", "0.97 (0.97)"]
    assert cells["best of ours", "bind"] == ["1", "not run", "not run", "not run", "0.60 (0.60)"]
    _, body = gemm_summary.goals(gemm_summary.points(records))
    assert [row[2:] for row in body] == [["0.97 (0.97), 0 of 1 below: reached"]]


def test_float32_is_told_by_what_l2_takes_of_its_stores(gemm_summary: ModuleType) -> None:
    """67 MB at 3.1 TB/s are 21.6 us: 0.22 of 100 us, and 0.43 of 50 us."""
    square = {"m": 4096, "n": 4096}
    records = [
        line("cuda", "float16", 100.0, **square, k=4096),
        line("cuda", "float32", 110.0, **square, k=4096),
        line("gluon", "float32", 130.0, **square, k=4096),
        line("cuda", "float16", 50.0, **square, k=2048),
        line("cuda", "float32", 70.0, **square, k=2048),
        line("cuda", "float32", 70.0, **square, k=1024),
    ]
    header, body = gemm_summary.intake(gemm_summary.points(records))
    assert len(header) == len(body[0])
    assert body == [
        ["12.5% to 25%", "1", "1.10x", "0.55 (0.55)", "1"],
        ["25% to 50%", "1", "1.40x", "0.86 (0.86)", "1"],
    ]


def test_sources_are_not_mixed(gemm_summary: ModuleType) -> None:
    """Of each pass the last source counts, and its last record; older records only alone."""
    before = {k: v for k, v in line("gluon", "float16", 9.0, commit="older").items() if k != "pass"}
    records = [
        before,
        line("gluon", "float16", 8.0, commit="old", m=1),
        line("gluon", "float16", 7.0),
        line("gluon", "float32", 6.0, **{"pass": "rest"}, commit="old"),
        line("gluon", "float16", 5.0),
    ]
    found = gemm_summary.points(records)
    assert [(p.out_dtype, p.time_us) for p in found] == [("float32", 6.0), ("float16", 5.0)]
    assert [p.time_us for p in gemm_summary.points([before])] == [9.0]


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/gemm.jsonl")), ids=lambda f: f.parent.name)
def test_committed_records_are_whole(gemm_summary: ModuleType, file: Path) -> None:
    """Every region of the project's kernels is of every shape that was measured."""
    records = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    found = gemm_summary.points(records)
    shapes = {p.shape for p in found}
    groups = gemm_summary.variants(found)
    for dtype in ("float16", "bfloat16"):
        assert {p.shape for p in groups["gluon", dtype]} == shapes
    assert all(p.ratio is not None for p in groups["gluon", "float16"])
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gemm_summary.py", file],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"of {len(shapes)} slower: " in done.stdout
