"""Writes the tables of the documents from the records in benchmarks/results.

    python tools/tables.py            rewrites every table between its two markers
    python tools/tables.py --check    exits with 1 if one is out of date

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; the functions below are the
names. Of several records of one thing the last counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def records(benchmark: str) -> list[dict[str, Any]]:
    """All records of one benchmark, oldest first within a machine."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob(f"*/{benchmark}.jsonl")):
        lines += file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def rows(header: str, body: list[list[object]]) -> str:
    """A markdown table; ``header``: names with bars between them."""
    names = [name.strip() for name in header.split("|")]
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def where(record: dict[str, Any]) -> str:
    """Machine and date, with the torch that was used."""
    return f"{record['machine']}, torch {record['versions'].get('torch')}, {record['date']}"


def decode_cpu() -> str:
    """Tokens per second of bf16 and FP8."""
    last = {(r["machine"], r["model"]): r for r in records("decode_cpu")}
    return rows(
        "model | bf16, transformers | FP8, blockscale | ratio (p10 to p90) | machine",
        [
            [
                r["model"],
                f"{r['bf16_tokens_per_second']:.1f} tokens/s",
                f"{r['fp8_tokens_per_second']:.1f} tokens/s",
                f"{r['ratio']:.2f} ({r['ratio_p10']:.2f} to {r['ratio_p90']:.2f})",
                where(r),
            ]
            for r in last.values()
        ],
    )


def perplexity() -> str:
    """Perplexity of every checkpoint and backend."""
    last = {r["backend"]: r for r in records("perplexity")}
    words = {"cpu": "weights only", "reference": "weights and activations"}
    body: list[list[object]] = []
    for r in last.values():
        for name, value in r["perplexity"].items():
            if r["relative"][name] == 0.0:
                body.append([name, "nothing", f"{value:.3f}", "", where(r)])
            else:
                gained = f"{r['relative'][name]:+.2%}"
                body.append([name, words[r["backend"]], f"{value:.3f}", gained, where(r)])
    unique = {tuple(row): row for row in body}
    return rows(
        "checkpoint | quantized | perplexity | against bf16 | machine", list(unique.values())
    )


def quantize_memory() -> str:
    """Peak memory of the quantize command."""
    last = {(r["machine"], r["gigabytes"]): r for r in records("quantize_memory")}
    return rows(
        "checkpoint | peak resident memory | time | machine",
        [
            [
                f"{r['gigabytes']} GB",
                f"{r['peak_bytes'] / 1e9:.2f} GB",
                f"{r['seconds']} s",
                where(r),
            ]
            for r in last.values()
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "decode_cpu": decode_cpu,
    "perplexity": perplexity,
    "quantize_memory": quantize_memory,
}


def main() -> int:
    """Rewrite or check all documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        old = document.read_text(encoding="utf-8")
        new = MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[4], old)
        if new != old:
            stale += 1
            print(f"{document.relative_to(ROOT)}: {'out of date' if check else 'rewritten'}")
            if not check:
                document.write_text(new, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
