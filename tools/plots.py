"""Draws the plots of benchmarks/gemm.py's records: roofline and ratio to DeepGEMM, PNG and SVG.

    python tools/plots.py [--machine nvidia-h200] [--dtype float16] [--out docs/plots]
    python tools/plots.py --check        exits with 1 if those of docs/plots are of older records

Reads ``benchmarks/results/<machine>/gemm.jsonl``, of the machine that ran last by default; which
records count is ``benchmarks/gemm_summary.py``'s, so tables and plots are of the same ones. Needs
the extra ``plots``. ``tools/tables.py`` draws them anew too, where records have changed.

``roofline``: each measurement over its operations per byte, under the ceilings that the last record
holds (copy, and FP8 product with one scale a tensor, measured before the kernels). ``ratio``: time
of DeepGEMM, which writes bfloat16 alone, over the time of each backend, by tokens, one panel for
each (N, K), with the geometric mean of the faster of blockscale's own kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gemm_summary  # noqa: E402 - a program beside these tools, not a package

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = ROOT / "benchmarks" / "results"
PIXELS_PER_INCH = 110
PLOTS = ROOT / "docs" / "plots"
KEPT_DTYPE = "float16"
BASELINE, BASELINE_DTYPE = gemm_summary.BASELINE
OWN = gemm_summary.OURS
CODE_BYTES = 1
RATIO_TICKS = (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4)
OUT_BYTES = gemm_summary.OUT_BYTES

# In the order of the legend. Colours that differ in lightness too (Okabe and Ito).
STYLES = {
    "gluon": ("blockscale, Gluon", "#0072b2", "o"),
    "cuda": ("blockscale, CUDA C++", "#56b4e9", "P"),
    "deep_gemm": ("DeepGEMM (bfloat16)", "#d55e00", "s"),
    "flashinfer_sm90": ("FlashInfer (bfloat16)", "#e69f00", "X"),
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
    ratio: float | None
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


def newest() -> str | None:
    """The folder of the machine that ran last."""
    last: dict[str, tuple[str, str]] = {}
    for path in sorted(RESULTS.glob("*/gemm.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        row = json.loads(lines[-1])
        last[path.parent.name] = (row["date"], row.get("time", ""))
    return max(last, key=lambda name: last[name], default=None)


def read(path: Path) -> list[Measurement]:
    """What counts of a file, the last measured last."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = gemm_summary.counted(json.loads(line) for line in lines if line.strip())
    rows = [row for row in rows if row["backend"] in STYLES]
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    return [
        Measurement(
            *point.shape,
            point.backend,
            point.out_dtype,
            point.time_us,
            point.ratio,
            (row["ceilings"]["copy_gb_s"], row["ceilings"]["fp8_tensor_wise_tflops"]),
            f"{row['machine']}, {row['date']}, source {commits}",
        )
        for row, point in zip(rows, gemm_summary.points(rows), strict=True)
    ]


def shown(measurements: Iterable[Measurement], dtype: str) -> list[Measurement]:
    """Those with this output, and the backends that write bfloat16 alone."""
    fixed = {BASELINE, "bf16_matmul", "flashinfer_sm90"}
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
            # One picture in the SVG in place of hundreds of grey elements.
            rasterized=not own,
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
    axes.axhline(1, color=STYLES[BASELINE][1], linewidth=1.6, label=STYLES[BASELINE][0])
    for name in backends(measurements):
        if name == BASELINE:
            continue
        label, colour, marker = STYLES[name]
        ratios = ratios_of(found for found in measurements if found.backend == name)
        axes.plot(
            sorted(ratios),
            [ratios[m] for m in sorted(ratios)],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=2 if name in OWN else 1.3,
            label=label,
            zorder=4 if name in OWN else 3,
        )
    best = best_ratios(measurements)
    if best:
        mean = f"blockscale: {geometric_mean(best.values()):.2f}"
        axes.set_title(mean, loc="right", color=STYLES[OWN[0]][1], fontsize=9)
    axes.set_xscale("log", base=2)
    tokens = sorted({found.m for found in measurements})
    ticks = [m for m in tokens if m in {1, 8, 64, 512, 4096}] or tokens
    axes.set_xticks(ticks, [f"{m}" for m in ticks])


def ratios_of(measurements: Iterable[Measurement]) -> dict[int, float]:
    """Speed relative to DeepGEMM by tokens, where that ran."""
    return {found.m: found.ratio for found in measurements if found.ratio is not None}


def best_ratios(measurements: Sequence[Measurement]) -> dict[int, float]:
    """The better of the project's own kernels by tokens."""
    best: dict[int, float] = {}
    for name in OWN:
        own = ratios_of(found for found in measurements if found.backend == name)
        best = {m: max(own.get(m, 0), best.get(m, 0)) for m in own.keys() | best.keys()}
    return best


def headed(figure: Figure, title: str, measurements: Sequence[Measurement]) -> None:
    """Title, and below it where and when."""
    figure.suptitle(
        f"{title}\n", x=0.01, ha="left", fontsize=14, fontweight="bold", linespacing=1.3
    )
    figure.text(
        0.01,
        1 - 0.43 / figure.get_figheight(),
        caption(measurements),
        color=SOFT,
        va="center",
    )


def caption(measurements: Sequence[Measurement]) -> str:
    """Where, when and how they were measured."""
    return f"{measurements[-1].where}; CUDA graphs, operands rotated beyond L2"


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """PNG and SVG."""
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=PIXELS_PER_INCH)
    figure.savefig(paths[1], dpi=PIXELS_PER_INCH, metadata={"Date": None})
    plt.close(figure)
    return paths


def is_current(folder: Path) -> bool:
    """Whether the plots that are kept say the machine, date and source of the newest records."""
    machine = newest()
    if machine is None:
        return True
    measurements = shown(read(RESULTS / machine / "gemm.jsonl"), KEPT_DTYPE)
    files = [folder / f"gemm-{name}-{KEPT_DTYPE}.svg" for name in ("roofline", "ratio")]
    words = f"<!-- {caption(measurements)} -->"
    return all(f.is_file() and words in f.read_text(encoding="utf-8") for f in files)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw everything; 2 if there is nothing to draw from."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", help="a folder of benchmarks/results; the last that ran")
    parser.add_argument(
        "--dtype", choices=list(OUT_BYTES), default=KEPT_DTYPE, help="of the output"
    )
    parser.add_argument("--out", type=Path, default=PLOTS)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    if options.check:
        if is_current(options.out):
            return 0
        print(f"{options.out}: out of date")
        return 1
    source = RESULTS / (options.machine or newest() or "") / "gemm.jsonl"
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
