"""Writes the tables of the documents from the records in benchmarks/results.

    python tools/tables.py            rewrites every table between its two markers, and the plots
    python tools/tables.py --check    exits with 1 if a table is out of date

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; the functions below are the
names. Of several records of one thing the last counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]

import gemm_summary  # noqa: E402 - programs beside one another, not a package
import plots  # noqa: E402 - as above

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def records(benchmark: str) -> list[dict[str, Any]]:
    """All records of one benchmark, oldest first within a machine."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob(f"*/{benchmark}.jsonl")):
        lines += file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def ran_last(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest record."""
    return max(found, key=lambda record: (record["date"], record.get("time", "")))


def newest(benchmark: str) -> list[dict[str, Any]]:
    """The records of one benchmark on the machine that ran it last, oldest first."""
    found = records(benchmark)
    machine = ran_last(found)["machine"]
    return [record for record in found if record["machine"] == machine]


def of_newest_source(benchmark: str) -> list[list[dict[str, Any]]]:
    """The records of one benchmark, oldest first, of each machine that ran the newest source."""
    found = records(benchmark)
    commit = ran_last(found)["commit"]
    machines = dict.fromkeys(r["machine"] for r in found if r["commit"] == commit)
    return [[r for r in found if r["machine"] == machine] for machine in machines]


def caption(found: list[dict[str, Any]]) -> str:
    """Below a table of one machine: which, when and of which source."""
    commit = found[-1]["commit"]
    return f"\n{where(found[-1])}{f', source {commit}' if commit else ''}.\n"


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


def quantize_rate() -> str:
    """Rates of the quantize command and of a plain copy."""
    last = {(r["machine"], r["gigabytes"]): r for r in records("quantize_rate")}
    body: list[list[object]] = []
    for r in last.values():
        one, every = (r[name] - r["start_s"] for name in ("one_worker_s", "all_cores_s"))
        rates = [f"{r['gigabytes'] / seconds:.2f} GB/s" for seconds in (r["copy_s"], one, every)]
        body.append(
            [f"{r['gigabytes']} GB", *rates, f"{r['start_s']} s", r["load_average"], where(r)]
        )
    return rows(
        "checkpoint | plain copy | quantize, one worker | a worker for each core | start of the "
        "command, not counted | load of the machine | machine",
        body,
    )


def plan_large() -> str:
    """Time and memory of planning a sparse directory."""
    last = {(r["machine"], r["device"]): r for r in records("plan_large")}
    return rows(
        "device | checkpoint | CPU time | wall time (load) | peak resident memory | machine",
        [
            [
                r["device"],
                f"{r['checkpoint_bytes'] / 1e9:.0f} GB, {r['files']} files",
                f"{r['cpu_seconds']} s",
                f"{r['seconds']} s ({r['load_average']})",
                f"{r['peak_bytes'] / 1e6:.0f} MB",
                where(r),
            ]
            for r in last.values()
        ],
    )


def fuzz_headers() -> str:
    """Broken checkpoints that were read."""
    return rows(
        "broken checkpoints | read | refused with one line | crashes, hangs, memory | slowest | "
        "peak resident memory",
        [
            [
                f"{r['checkpoints']:,} (seed {r['seed']})",
                f"{r['read']:,}",
                f"{r['refused']:,}",
                sum(r["faults"].values()),
                f"{r['slowest_s']} s",
                f"{r['peak_bytes'] / 1e6:.0f} MB",
            ]
            for r in records("fuzz_headers")
        ],
    )


def fp16_model() -> str:
    """The founding case: what each way takes."""
    return "\n".join(map(_fp16_model, of_newest_source("fp16_model")))


def _fp16_model(found: list[dict[str, Any]]) -> str:
    last = {r["m"]: r for r in found}
    return rows(
        "tokens | a) UE8M0 unpacked on every call, Triton | b) float32 scales, Triton | c) plan | "
        "c against a | c against b | planned",
        [
            [
                r["m"],
                f"{r['unpack_us']:.0f} us",
                f"{r['triton_us']:.0f} us",
                f"{r['plan_us']:.0f} us",
                f"{r['speedup_over_unpack']:.2f}x",
                f"{r['speedup_over_triton']:.2f}x",
                ", ".join(r["backends"]),
            ]
            for r in last.values()
        ],
    ) + caption(found)


def moe_layer() -> str:
    """One decoder layer with experts: the plan beside plain Triton and bfloat16."""
    found = newest("moe_layer")
    last = {(r["activation_dtype"], r["m"]): r for r in found}
    return rows(
        "dtype | tokens | plan | Triton | bf16 | against Triton | against bf16 | planned",
        [
            [
                r["activation_dtype"],
                r["m"],
                f"{r['plan_us']:.0f} us",
                f"{r['triton_us']:.0f} us",
                f"{r['bf16_us']:.0f} us",
                f"{r['speedup_over_triton']:.2f}x",
                f"{r['speedup_over_bf16']:.2f}x",
                ", ".join(sorted({name for names in r["backends"].values() for name in names})),
            ]
            for r in last.values()
        ],
    ) + caption(found)


def transformers_model() -> str:
    """Tokens per second of a whole model in every variant; the float model is the measure."""
    if not records("transformers_model"):
        return "No record is committed yet.\n"
    last: dict[tuple[object, ...], dict[str, dict[str, Any]]] = {}
    records_of_machine = newest("transformers_model")
    for r in records_of_machine:
        what = (r["dtype"], r["phase"], r["batch"], r.get("prompt", 1))
        last.setdefault(what, {})[r["variant"]] = r
    body: list[list[object]] = []
    for (dtype, phase, batch, prompt), found in last.items():
        base, ours, theirs = (found.get(k) for k in ("float", "blockscale", "finegrained"))
        assert base is not None and ours is not None  # noqa: PT018 - written together
        other = f"{theirs['tokens_per_second']:,.0f}" if theirs else "kernel not to be had"
        tokens = f"batch {batch}" if phase == "decode" else f"{prompt} tokens"
        ratio = base["time_ms"] / ours["time_ms"]
        speeds = [f"{r['tokens_per_second']:,.0f}" for r in (base, ours)]
        body.append([dtype, f"{phase}, {tokens}", *speeds, f"{ratio:.2f}x", other])
    return rows(
        "model | phase | transformers, tokens/s | blockscale, tokens/s | ratio | "
        "transformers' own FP8",
        body,
    ) + caption(records_of_machine)


def tensor_parallel() -> str:
    """A model over several GPUs beside one: times, and how far logits are apart."""
    found = newest("tensor_parallel")
    last = {(r["dtype"], r["phase"], r["m"]): r for r in found}
    return rows(
        "dtype | phase | tokens | one GPU | all ranks | speed-up | logits differ by | shaken | "
        "first layer in float32",
        [
            [
                dtype,
                phase,
                tokens,
                f"{r['one_us']:.0f} us",
                f"{r['cut_us']:.0f} us ({r['ranks']} ranks)",
                f"{r['speedup']:.2f}x",
                f"{r['relative_error']:.1e}",
                f"{r['shaken_error']:.1e}" if "shaken_error" in r else "not run",
                f"{r['float32_error']:.1e}",
            ]
            for (dtype, phase, tokens), r in last.items()
        ],
    ) + caption(found)


def of_gemm(table: Callable[[Sequence[gemm_summary.Point]], gemm_summary.Table]) -> str:
    """A table of ``benchmarks/gemm_summary.py`` for each machine."""
    return "\n".join(_of_gemm(table, found) for found in of_newest_source("gemm"))


def _of_gemm(
    table: Callable[[Sequence[gemm_summary.Point]], gemm_summary.Table],
    found: list[dict[str, Any]],
) -> str:
    counted = gemm_summary.counted(found)
    header, body = table(gemm_summary.points(counted))
    if not body:
        return "No record is committed yet.\n"
    # Passes may be of several sources.
    commits = ", ".join(dict.fromkeys(str(record["commit"]) for record in counted))
    shapes = len({(record["m"], record["n"], record["k"]) for record in counted})
    below = f"{where(counted[-1])}, source {commits}, {shapes} shapes"
    return f"{rows(' | '.join(header), [[*row] for row in body])}\n{below}.\n"


def gemm() -> str:
    """Speed relative to DeepGEMM's bfloat16 kernel, geometric mean and worst, by range of M."""
    return of_gemm(gemm_summary.regions)


def gemm_short() -> str:
    """Of those, what the planner takes of our kernels and what it replaces, in float16."""
    return of_gemm(gemm_summary.short_regions)


def gemm_float32() -> str:
    """float32 output, apart where stores bind."""
    return of_gemm(gemm_summary.float32)


def gemm_intake() -> str:
    """What float32 stores cost, by the share of the time that L2 takes to take them."""
    return of_gemm(gemm_summary.intake)


def gemm_bounds() -> str:
    """What each region's floor is made of, and how near kernels come."""
    return of_gemm(gemm_summary.bounds)


def gemm_decode() -> str:
    """Share of the copy bandwidth at decode."""
    return of_gemm(gemm_summary.decode)


def gemm_slowest() -> str:
    """Where our kernels are furthest behind."""
    return of_gemm(gemm_summary.slowest)


def gemm_goals() -> str:
    """The goals of issue 4, reached or missed."""
    return of_gemm(gemm_summary.goals)


def counters() -> str:
    """What the GPU counted under one product of each kernel."""
    if not records("counters"):
        return "No record is committed yet.\n"
    found = newest("counters")
    last = {(r["m"], r["n"], r["k"], r["backend"]): r for r in found}
    body: list[list[object]] = []
    for (m, n, k, backend), r in last.items():
        out = gemm_summary.OUT_BYTES[r["out_dtype"]]
        least = (m + n) * k + m * n * out
        shares = [
            f"{r[name]:.0f}%" if name in r else "not counted"
            for name in ("tensor_percent", "issue_percent", "l2_percent", "l2_hit_percent")
        ]
        rate = r["memory_bytes"] / r["time_ns"]
        from_memory = f"{rate:,.0f} GB/s, {r['memory_bytes'] / least:.2f} of the least"
        running = f"{r['active_clocks'] / r['clocks']:.0%}"
        kernel = f"`{backend}` {r['detail']}".strip()
        body.append([f"{m} x {n} x {k}", kernel, running, *shares, from_memory])
    return rows(
        "M x N x K | kernel | multiprocessors running | tensor cores busy | issue slots busy | "
        "L2 throughput | L2 hits | memory",
        body,
    ) + caption(found)


def grouped() -> str:
    """Products over groups beside DeepGEMM's, by kind of case: geometric mean, worst, how many."""
    last = {
        (r["case"], r["layout"], r["backend"], r["out_dtype"]): r
        for r in newest("grouped")
        if r["chosen"]
    }
    found = list(last.values())
    base = {r["case"]: r["time_us"] for r in found if r["backend"] == "deep_gemm"}
    ratios: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for r in found:
        if r["backend"] != "deep_gemm" and r["case"] in base:
            for kind in (f"{r['case'].partition('-')[0]}, {r['layout']}", "all"):
                ratios[kind, r["backend"], r["out_dtype"]].append(base[r["case"]] / r["time_us"])
    body: list[list[object]] = [
        [kind, f"`{backend}`", dtype, f"{geometric_mean(r):.2f} ({min(r):.2f})", len(r)]
        for (kind, backend, dtype), r in sorted(ratios.items())
    ]
    return rows("cases | backend | output | of DeepGEMM bfloat16 | number", body) + caption(found)


def quantize() -> str:
    """Share of the copy bandwidth by kernel and shape, lowest and highest of dtypes and layouts."""
    found = newest("quantize")
    last = {
        (r["kernel"], r["m"], r["k"], r["dtype"], r["format"], r["layout"]): r["share_of_copy"]
        for r in found
    }
    shapes = list(dict.fromkeys(key[1:3] for key in last))
    body: list[list[object]] = []
    for kernel in dict.fromkeys(key[0] for key in last):
        row: list[object] = [f"`{kernel}`"]
        for shape in shapes:
            shares = [share for key, share in last.items() if key[:3] == (kernel, *shape)]
            row.append(f"{min(shares):.0%} to {max(shares):.0%}")
        body.append(row)
    table = rows(" | ".join(["kernel", *(f"{m} x {k}" for m, k in shapes)]), body)
    return table + caption(found)


def call_overhead() -> str:
    """Host time of a planned layer, and of what it consists of."""
    found = newest("call_overhead")
    last = {r["backend"]: r for r in found}
    columns = {
        "planned layer": "layer_us",
        "both kernels launched, arguments ready": "bare_us",
        "the same with allocations": "allocated_us",
        "quantizer and product called one by one": "direct_us",
        "quantizer alone": "quantize_us",
        "product alone": "multiply_us",
    }
    body: list[list[object]] = [
        [
            f"`{name}`",
            *(f"{r[column]:.0f} us" if column in r else "not run" for column in columns.values()),
        ]
        for name, r in last.items()
    ]
    return rows(" | ".join(["backend", *columns]), body) + caption(found)


def gate_facts() -> str:
    """What providers did with sizes and padding that their documents exclude."""
    body: list[list[object]] = []
    for r in records("gate_facts"):
        if r["question"] == "packing":
            words = f"{r['differing_words']} words differ from DeepGEMM's own packing"
            body.append(["our packed UE8M0", f"M={r['m']} K={r['k']}", words])
        else:
            size = f"M={r['m']} N={r['n']} K={r['k']}" if "n" in r else f"K={r['k']}"
            what = f"{size}, padding of {r['fill']}" if "fill" in r else size
            answer = r.get("refused") or f"relative error {r['relative_error']:.1e}"
            body.append([r["question"], what, answer])
    return rows("question | asked | answer", body)


TABLES: dict[str, Callable[[], str]] = {
    "decode_cpu": decode_cpu,
    "perplexity": perplexity,
    "quantize_memory": quantize_memory,
    "quantize_rate": quantize_rate,
    "plan_large": plan_large,
    "fuzz_headers": fuzz_headers,
    "fp16_model": fp16_model,
    "moe_layer": moe_layer,
    "transformers_model": transformers_model,
    "tensor_parallel": tensor_parallel,
    "gemm": gemm,
    "gemm_short": gemm_short,
    "gemm_float32": gemm_float32,
    "gemm_intake": gemm_intake,
    "gemm_bounds": gemm_bounds,
    "gemm_decode": gemm_decode,
    "gemm_slowest": gemm_slowest,
    "gemm_goals": gemm_goals,
    "counters": counters,
    "grouped": grouped,
    "quantize": quantize,
    "call_overhead": call_overhead,
    "gate_facts": gate_facts,
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
    if not check and not plots.is_current(plots.PLOTS):
        return plots.main([])
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
