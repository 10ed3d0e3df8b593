"""Tables of records that no GPU has made yet: rendered from what the benchmarks write."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
SHARED = {
    "machine": "Some GPU",
    "versions": {"torch": "2.11.0"},
    "commit": "abc1234",
    "date": "2026-11-26",
}
MOE = {
    "benchmark": "moe_layer",
    "m": 16,
    "activation_dtype": "float16",
    "plan_us": 200.4,
    "triton_us": 300.6,
    "bf16_us": 401.0,
    "speedup_over_triton": 1.5,
    "speedup_over_bf16": 2.0,
    "backends": {"qkv": ["gluon"], "o": ["gluon"], "experts": ["gluon", "triton"]},
}
PARALLEL = {
    "benchmark": "tensor_parallel",
    "dtype": "float16",
    "phase": "decode",
    "m": 16,
    "ranks": 2,
    "one_us": 900.0,
    "cut_us": 600.0,
    "speedup": 1.5,
    "relative_error": 0.02,
    "float32_error": 1e-6,
}
MODEL = {
    "benchmark": "transformers_model",
    "dtype": "float16",
    "phase": "decode",
    "batch": 8,
    "context": 1024,
    "time_ms": 2.0,
    "tokens_per_second": 4000.0,
}
OLD = {"date": "2026-11-01", "machine": "An older GPU"}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/tables.py as a module, with no records."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "tools" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def kept(folder: Path, *records: dict[str, Any]) -> None:
    for record in records:
        document = {**SHARED, **record}
        path = folder / document["machine"] / f"{document['benchmark']}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(document) + "\n")


def cells(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_a_layer_of_experts(tables: ModuleType, tmp_path: Path) -> None:
    kept(tmp_path, {**MOE, **OLD}, {**MOE, "plan_us": 1.0}, MOE)
    table = tables.moe_layer()
    row = ["float16", "16", "200 us", "301 us", "401 us", "1.50x", "2.00x", "gluon, triton"]
    assert cells(table) == [row]
    assert "Some GPU, torch 2.11.0, 2026-11-26, source abc1234." in table


def test_every_gpu_that_ran_the_newest_source_has_a_table(
    tables: ModuleType, tmp_path: Path
) -> None:
    record = {
        "benchmark": "fp16_model",
        "m": 8,
        "unpack_us": 300.0,
        "triton_us": 200.0,
        "plan_us": 100.0,
        "speedup_over_unpack": 3.0,
        "speedup_over_triton": 2.0,
        "backends": ["cuda"],
        "time": "12:00",
    }
    other = {**record, "machine": "Another GPU", "plan_us": 80.0}
    old = {"commit": "0ld50ce", "time": "11:00", "plan_us": 1.0}
    kept(tmp_path, record, {**other, **old}, other)
    kept(tmp_path, {**record, **OLD, "commit": "0ld50ce"})
    table = tables.fp16_model()
    assert [row[3] for row in cells(table)[::3]] == ["80 us", "100 us"]
    assert "Another GPU, torch" in table
    assert "Some GPU, torch" in table
    assert "An older GPU" not in table


def test_a_model_over_ranks(tables: ModuleType, tmp_path: Path) -> None:
    kept(tmp_path, {**PARALLEL, **OLD}, PARALLEL, {**PARALLEL, "m": 64, "phase": "prefill"})
    table = tables.tensor_parallel()
    times = ["float16", "decode", "16", "900 us", "600 us (2 ranks)", "1.50x"]
    assert cells(table)[0] == [*times, "2.0e-02", "not run", "1.0e-06"]
    assert len(cells(table)) == 2
    kept(tmp_path, {**PARALLEL, "shaken_error": 0.03})
    assert cells(tables.tensor_parallel())[0] == [*times, "2.0e-02", "3.0e-02", "1.0e-06"]
    assert "Some GPU" in table


def test_a_whole_model(tables: ModuleType, tmp_path: Path) -> None:
    slow = {**MODEL, "variant": "float", "time_ms": 3.0, "tokens_per_second": 2667.0}
    kept(tmp_path, {**slow, **OLD}, {**MODEL, "variant": "blockscale", **OLD})
    kept(tmp_path, slow, {**MODEL, "variant": "blockscale"})
    table = tables.transformers_model()
    row = ["float16", "decode, batch 8", "2,667", "4,000", "1.50x", "kernel not to be had"]
    assert cells(table) == [row]
    assert "Some GPU" in table


def test_host_time(tables: ModuleType, tmp_path: Path) -> None:
    """Rungs that a record lacks were not run."""
    record = {"benchmark": "call_overhead", "backend": "gluon", "layer_us": 16.2, "direct_us": 23.7}
    record |= {"quantize_us": 16.0, "multiply_us": 7.1}
    kept(tmp_path, {**record, **OLD, "backend": "triton"}, record)
    assert cells(tables.call_overhead()) == [
        ["`gluon`", "16 us", "not run", "not run", "24 us", "16 us", "7 us"]
    ]
    kept(tmp_path, {**record, "bare_us": 6.5, "allocated_us": 11.6})
    assert cells(tables.call_overhead())[0][2:4] == ["6 us", "12 us"]


def test_counters(tables: ModuleType, tmp_path: Path) -> None:
    """1 MiB of weights, 128 KiB of codes and 64 KiB of result are 1,245,184 bytes."""
    assert tables.counters() == "No record is committed yet.\n"
    record = {
        "benchmark": "counters",
        "m": 64,
        "n": 512,
        "k": 2048,
        "backend": "gluon",
        "detail": "64x32s8b1",
        "out_dtype": "float16",
        "time_ns": 1000.0,
        "clocks": 2000.0,
        "active_clocks": 1500.0,
        "tensor_percent": 40.4,
        "l2_percent": 30.6,
        "l2_hit_percent": 66.0,
        "memory_bytes": 1_494_220.8,
    }
    kept(tmp_path, {**record, "clocks": 1.0}, record)
    shares = ["75%", "40%", "not counted", "31%", "66%"]
    memory = "1,494 GB/s, 1.20 of the least"
    assert cells(tables.counters()) == [["64 x 512 x 2048", "`gluon` 64x32s8b1", *shares, memory]]


GROUPED = {
    "benchmark": "grouped",
    "case": "masked-1",
    "layout": "masked",
    "backend": "deep_gemm",
    "out_dtype": "bfloat16",
    "chosen": True,
    "time_us": 10.0,
}


def test_a_case_measured_twice_counts_once(tables: ModuleType, tmp_path: Path) -> None:
    """Each backend's last time, beside DeepGEMM's last."""
    gluon = {**GROUPED, "backend": "gluon", "time_us": 4.0}
    kept(tmp_path, {**GROUPED, "time_us": 99.0}, gluon, GROUPED, {**gluon, "time_us": 8.0})
    kept(tmp_path, {**gluon, "time_us": 1.0, "chosen": False})
    assert cells(tables.grouped()) == [
        [kind, "`gluon`", "bfloat16", "1.25 (1.25)", "1"] for kind in ("all", "masked, masked")
    ]


def test_the_machine_that_ran_last_counts(tables: ModuleType, tmp_path: Path) -> None:
    """By date, then by time; a record without a time is from before there were times."""
    first = {**PARALLEL, "machine": "A", "time": "10:30"}
    kept(tmp_path, first, {**PARALLEL, "machine": "B", "time": "10:29"})
    kept(tmp_path, {**PARALLEL, "machine": "C"})
    assert tables.tensor_parallel().rstrip().splitlines()[-1].startswith("A, torch")
