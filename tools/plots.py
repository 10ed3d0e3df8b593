"""Draws the plots of benchmarks/gemm.py's records: roofline and ratio to DeepGEMM, PNG and SVG.

    python tools/plots.py [--machine nvidia-h200] [--dtype float16] [--out docs/plots]

Reads ``benchmarks/results/<machine>/gemm.jsonl``; of several records of one measurement the last
counts. Pictures are made, not kept: docs/plots is ignored by git. Needs the extra ``plots``.

``roofline``: each measurement over its operations per byte, under the ceilings that the last record
holds (copy, and FP8 product with one scale a tensor, measured before the kernels). ``ratio``: time
of DeepGEMM, which writes bfloat16 alone, over the time of each backend, by tokens, one panel for
each (N, K).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BASELINE = "deep_gemm"
BASELINE_DTYPE = "bfloat16"
CODE_BYTES = 1
RATIO_TICKS = (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4)
OUT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

# In the order of the legend. Colours that differ in lightness too (Okabe and Ito).
STYLES = {
    "gluon": ("blockscale, Gluon", "#0072b2", "o"),
    "cuda": ("blockscale, CUDA C++", "#56b4e9", "P"),
    "deep_gemm": ("DeepGEMM (bfloat16)", "#d55e00", "s"),
    "torch_scaled_mm": ("cuBLASLt", "#009e73", "^"),
    "triton": ("blockscale, plain Triton", "#b07aa1", "D"),
    "bf16_matmul": ("bfloat16 product", "#7f7f7f", "v"),
}
INK, SOFT, LINE = "#1b2230", "#5c6678", "#e3e7ee"
SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#c4cad6",
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "figure.facecolor": "white",
    # The same records give the same SVG.
    "svg.hashsalt": "blockscale",
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of gemm.jsonl."""

    m: int
    n: int
    k: int
    backend: str
    out_dtype: str
    time_us: float
    ceilings: tuple[float, float]
    where: str

    @property
    def tflops(self) -> float:
        """Operations of the product over its time."""
        return 2 * self.m * self.n * self.k / self.time_us / 1e6

    @property
    def intensity(self) -> float:
        """Operations per byte that must move: both operands' codes and the result."""
        codes = (self.m + self.n) * self.k * CODE_BYTES
        return 2 * self.m * self.n * self.k / (codes + self.m * self.n * OUT_BYTES[self.out_dtype])


def read(path: Path) -> list[Measurement]:
    """The last record of each measurement; candidates that were not chosen are left out."""
    last: dict[tuple[object, ...], Measurement] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        row = json.loads(line)
        if row["backend"] not in STYLES or row["detail"].startswith("candidate"):
            continue
        found = Measurement(
            row["m"],
            row["n"],
            row["k"],
            row["backend"],
            row["out_dtype"],
            row["time_us"],
            (row["ceilings"]["copy_gb_s"], row["ceilings"]["fp8_tensor_wise_tflops"]),
            f"{row['machine']}, {row['date']}",
        )
        key = (found.m, found.n, found.k, found.backend, found.out_dtype)
        last.pop(key, None)  # So that the last line of the file comes last.
        last[key] = found
    return list(last.values())


def shown(measurements: Iterable[Measurement], dtype: str) -> list[Measurement]:
    """Those with this output, and the backends that write bfloat16 alone."""
    fixed = {BASELINE, "bf16_matmul"}
    return [
        found
        for found in measurements
        if found.out_dtype == (BASELINE_DTYPE if found.backend in fixed else dtype)
    ]


def backends(measurements: Sequence[Measurement]) -> list[str]:
    """Those that were measured, in the order of the legend."""
    there = {found.backend for found in measurements}
    return [name for name in STYLES if name in there]


def roofline(measurements: Sequence[Measurement], dtype: str) -> Figure:
    """Rate over operations per byte, a panel for each backend, and the roof none can pass."""
    from matplotlib import pyplot as plt

    names = backends(measurements)
    across = 2
    down = -(-len(names) // across)
    figure, grid = plt.subplots(
        down,
        across,
        figsize=(5.6 * across, 3.7 * down + 0.7),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    for axes, name in zip(panels, names, strict=False):
        roof(axes, measurements)
        scatter(axes, measurements, name)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("operations per byte of operands and result")
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s")
    headed(figure, f"Block-FP8 products under the measured ceilings, {dtype} output", measurements)
    return figure


def roof(axes: Axes, measurements: Sequence[Measurement]) -> None:
    """The ceilings of the last run, and axes that hold all points."""
    bandwidth, peak = measurements[-1].ceilings
    corner = peak * 1e3 / bandwidth
    left, right = (
        min(found.intensity for found in measurements) / 1.6,
        max(found.intensity for found in measurements) * 1.6,
    )
    heights = [left * bandwidth / 1e3, peak, peak]
    axes.plot([left, corner, right], heights, color=INK, linewidth=1.6)
    axes.fill_between([left, corner, right], heights, peak * 3, color="#f1f3f7", linewidth=0)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        ylim=(min(found.tflops for found in measurements) / 1.6, peak * 3),
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,g}")
    beside = {"textcoords": "offset points", "ha": "right", "color": INK, "fontsize": 9}
    axes.annotate(f"FP8 product {peak:,.0f} TFLOP/s", (right, peak), xytext=(-6, 5), **beside)
    middle = (left * corner) ** 0.5
    height = middle * bandwidth / 1e3
    axes.annotate(f"copy {bandwidth / 1e3:.2f} TB/s", (middle, height), xytext=(-8, 8), **beside)


def scatter(axes: Axes, measurements: Sequence[Measurement], name: str) -> None:
    """One backend in its colour over the others in grey."""
    label, colour, marker = STYLES[name]
    for own in (False, True):
        points = [found for found in measurements if (found.backend == name) == own]
        axes.scatter(
            [found.intensity for found in points],
            [found.tflops for found in points],
            s=30 if own else 18,
            marker=marker if own else ".",
            color=colour if own else "#c4cad6",
            linewidths=0.5,
            edgecolors="white" if own else "none",
            zorder=4 if own else 3,
        )
    axes.set_title(label, color=colour)


def ratio(measurements: Sequence[Measurement], dtype: str) -> Figure:
    """Speed relative to DeepGEMM by tokens, a panel for each (N, K)."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator

    shapes = list(dict.fromkeys((found.n, found.k) for found in measurements))
    across = min(3, len(shapes))
    down = -(-len(shapes) // across)
    figure, grid = plt.subplots(
        down,
        across,
        figsize=(3.9 * across, 2.75 * down + 1.1),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    for axes, (n, k) in zip(panels, shapes, strict=False):
        panel(axes, [found for found in measurements if (found.n, found.k) == (n, k)])
        axes.set_title(f"N = {n}, K = {k}")
    for axes in panels[len(shapes) :]:
        axes.set_visible(False)
    # Twice as fast and half as fast are equally far from 1. Axes are shared: one speaks for all.
    panels[0].set_yscale("log", base=2)
    panels[0].yaxis.set_major_locator(FixedLocator(RATIO_TICKS))
    panels[0].yaxis.set_major_formatter("{x:g}")
    for axes in grid[-1]:
        axes.set_xlabel("tokens M")
    for axes in grid[:, 0]:
        axes.set_ylabel("DeepGEMM's time / its time")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    headed(figure, f"Speed relative to DeepGEMM, {dtype} output", measurements)
    return figure


def panel(axes: Axes, measurements: Sequence[Measurement]) -> None:
    """One (N, K): a line for each backend; above 1 it is faster than DeepGEMM."""
    base = {found.m: found.time_us for found in measurements if found.backend == BASELINE}
    axes.axhline(1, color=STYLES[BASELINE][1], linewidth=1.6, label="DeepGEMM (bfloat16)")
    for name in backends(measurements):
        if name == BASELINE:
            continue
        label, colour, marker = STYLES[name]
        own = {found.m: found.time_us for found in measurements if found.backend == name}
        tokens = sorted(own.keys() & base.keys())
        ratios = [base[m] / own[m] for m in tokens]
        axes.plot(
            tokens,
            ratios,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=2 if name == "gluon" else 1.3,
            label=label,
            zorder=4 if name == "gluon" else 3,
        )
        if name == "gluon" and ratios:
            mean = f"geometric mean {geometric_mean(ratios):.2f}"
            axes.set_title(mean, loc="right", color=colour, fontsize=9)
    axes.set_xscale("log", base=2)
    ticks = [m for m in sorted(base) if m in {1, 8, 64, 512, 4096}] or sorted(base)
    axes.set_xticks(ticks, [f"{m}" for m in ticks])


def headed(figure: Figure, title: str, measurements: Sequence[Measurement]) -> None:
    """Title, and below it where and when."""
    figure.suptitle(
        f"{title}\n", x=0.01, ha="left", fontsize=14, fontweight="bold", linespacing=1.3
    )
    figure.text(
        0.01,
        1 - 0.43 / figure.get_figheight(),
        f"{measurements[-1].where}; CUDA graphs, operands rotated beyond L2",
        color=SOFT,
        va="center",
    )


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """PNG and SVG."""
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=160)
    figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw everything; 2 if there is nothing to draw from."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", default="nvidia-h200", help="a folder of benchmarks/results")
    parser.add_argument("--dtype", choices=list(OUT_BYTES), default="float16", help="of the output")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plots")
    options = parser.parse_args(arguments)
    source = RESULTS / options.machine / "gemm.jsonl"
    if not source.is_file():
        print(f"{source}: no records; make some with benchmarks/gemm.py --record", file=sys.stderr)
        return 2
    try:
        import matplotlib as mpl
    except ImportError:
        print("needs matplotlib: pip install 'blockscale[plots]'", file=sys.stderr)
        return 2
    mpl.use("Agg")
    measurements = shown(read(source), options.dtype)
    if not {BASELINE} < {found.backend for found in measurements}:
        print(f"{source}: no {options.dtype} output beside {BASELINE}'s", file=sys.stderr)
        return 2
    with mpl.rc_context(SETTINGS):
        for name, draw in (("roofline", roofline), ("ratio", ratio)):
            figure = draw(measurements, options.dtype)
            for path in save(figure, options.out, f"gemm-{name}-{options.dtype}"):
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
