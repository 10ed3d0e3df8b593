"""Writes the table of measured times that ships for a GPU, from the records of benchmarks/gemm.py.

    python tools/measured_table.py nvidia-h200

Reads ``benchmarks/results/<machine>/gemm.jsonl`` and writes ``src/blockscale/probe/tables/
<machine>.json``, which ``blockscale.probe.measured`` loads on a GPU of that name. Which records
count is ``benchmarks/gemm_summary.py``'s; backends that planning does not know are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from blockscale.backends.registry import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "src" / "blockscale" / "probe" / "tables"
sys.path.insert(0, str(ROOT / "benchmarks"))

import gemm_summary  # noqa: E402 - a program beside these tools, not a package


def main() -> None:
    """Read, keep the last time of each key, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("machine")
    machine: str = parser.parse_args().machine
    source = ROOT / "benchmarks" / "results" / machine / "gemm.jsonl"
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    known = {backend.name for backend in BACKENDS}
    times = {
        (r["backend"], r["n"], r["k"], r["out_dtype"], r["m"]): r["time_us"]
        for r in gemm_summary.counted(records)
        if r["backend"] in known
    }
    columns = ["backend", "n", "k", "out_dtype", "m", "time_us"]
    rows = [[*key, time_us] for key, time_us in times.items()]
    write_table(TABLES / f"{machine}.json", source, records[-1], columns, rows)


def write_table(
    target: Path, source: Path, last: dict[str, Any], columns: list[str], rows: list[list[Any]]
) -> None:
    """A table with where its times are from; ``last``: the newest record of ``source``."""
    document = {
        "schema": 1,
        "device": last["machine"],
        "packages": last["versions"],
        "commit": last["commit"],
        "date": last["date"],
        "source": str(source.relative_to(ROOT)),
        "columns": columns,
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps(document, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
    target.parent.mkdir(exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(f"{target.relative_to(ROOT)}: {len(rows)} times")


if __name__ == "__main__":
    main()
