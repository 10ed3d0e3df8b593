"""The shipped table of experts' times takes the rows that each backend's offer asks for."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def tool() -> Any:
    spec = importlib.util.spec_from_file_location(
        "measured_experts", ROOT / "tools" / "measured_experts.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def record(backend: str, case: str, time_us: float, *, chosen: bool = True) -> dict[str, Any]:
    return {
        "backend": backend,
        "case": f"minimax-{case}-3072x1536",
        "chosen": chosen,
        "n": 3072,
        "k": 1536,
        "groups": 256,
        "out_dtype": "bfloat16",
        "time_us": time_us,
        "commit": "abc",
        "detail": "",
    }


def test_a_backends_time_is_of_the_rows_that_it_offers() -> None:
    records = [
        record("gluon", "masked-t1", 1.0),
        record("gluon", "blocks8-t1", 2.0),
        record("gluon", "blocks16-t1", 3.0),
        record("gluon", "blocks8-t1", 9.0, chosen=False),
        record("gluon", "contiguous-t4096", 4.0),
        record("deep_gemm", "masked-t1", 5.0),
        record("deep_gemm", "contiguous-t4096", 6.0),
        record("unknown", "contiguous-t4096", 7.0),
        {**record("gluon", "contiguous-t4096", 9.0), "commit": "71f0fd6"},
        {**record("gluon", "", 8.0), "case": "contiguous-contiguous-8x4096-4096x7168"},
    ]
    found = {(row[0], row[4]): row[5] for row in tool().table(records)}
    assert found == {
        ("gluon", 1): 2.0,
        ("gluon", 4096): 4.0,
        ("deep_gemm", 1): 5.0,
        ("deep_gemm", 4096): 6.0,
    }


def test_every_shipped_table_has_the_columns_that_are_read() -> None:
    for path in (ROOT / "src" / "blockscale" / "probe" / "tables").glob("*-experts.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        assert all(len(row) == len(table["columns"]) == 7 for row in table["rows"])
        assert {row[-1] for row in table["rows"]} == {256}
