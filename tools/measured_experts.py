"""Writes the table of measured times of experts that ships for a GPU, from benchmarks/grouped.py.

    python tools/measured_experts.py nvidia-h100-80gb-hbm3

Reads the newest records of routed tokens in ``benchmarks/results/<machine>/grouped.jsonl`` and
writes ``src/blockscale/probe/tables/<machine>-experts.json``, which ``blockscale.probe.measured``
loads on a GPU of that name. A backend's time for some tokens is that of the rows that its offer
lists for them. DeepGEMM was measured masked where there are few: it offers contiguous rows, which
take it longer, so that the table favours it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

from grouped_records import is_sound, offered_alignment  # noqa: E402 - a program, not a package
from measured_table import TABLES, write_table  # noqa: E402 - the program beside this one

# family, layout, tokens: what ``grouped_cases.Case.name`` says of a routed case.
NAME = re.compile(r"minimax-(contiguous|masked|blocks(\d+))-t(\d+)-")
BLOCK = 128


def main() -> None:
    """Read, keep the last time of each key, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("machine")
    machine: str = parser.parse_args().machine
    source = ROOT / "benchmarks" / "results" / machine / "grouped.jsonl"
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    columns = ["backend", "n", "k", "out_dtype", "m", "time_us", "experts"]
    write_table(TABLES / f"{machine}-experts.json", source, records[-1], columns, table(records))


def table(records: Iterable[dict[str, Any]]) -> list[list[Any]]:
    """Rows of the columns above."""
    times: dict[tuple[Any, ...], float] = {}
    for record in records:
        named = NAME.match(record["case"])
        if named is None or not record["chosen"] or not is_sound(record):
            continue
        tokens, dtype = int(named[3]), record["out_dtype"]
        key = (record["backend"], record["n"], record["k"], dtype, tokens, record["groups"])
        alignment = int(named[2] or BLOCK)
        is_masked = named[1] == "masked"
        if record["backend"] == "deep_gemm" or (
            not is_masked
            and alignment == offered_alignment(record["backend"], record["groups"], tokens)
        ):
            times[key] = record["time_us"]
    return [[*key[:-1], time_us, key[-1]] for key, time_us in times.items()]


if __name__ == "__main__":
    main()
