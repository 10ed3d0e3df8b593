"""compute-sanitizer over one small case of every kernel, on a GPU.

    python tools/sanitize.py [--tools memcheck,racecheck] [--seconds 240]
    python tools/sanitize.py --cases [FAMILY ...]     the cases alone, no sanitizer

Exit status 0 if each tool found nothing, 1 if one found something or a case went wrong. Kernels
whose provider is not installed are named and left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from blockscale.tensor import BlockScaledTensor

ROOT = Path(__file__).resolve().parent.parent
# Ragged in N and K, several tiles, several K blocks; M of each kernel family.
N, K = 320, 528
TOKENS = (1, 7, 40, 129, 300)
# Relative Frobenius error: far above what any output dtype rounds, far below a wrong scale.
MAX_ERROR = 5e-3
# What a tool says at its end when all is well.
CLEAN = ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")


def main() -> int:
    """Run the tools, or with ``--cases`` what they watch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument("--seconds", type=float, default=240, help="of each tool")
    parser.add_argument("--cases", nargs="*", choices=sorted(FAMILIES), help="no sanitizer")
    options = parser.parse_args()
    if options.cases is not None:
        return run_cases(options.cases or list(FAMILIES))
    return max(watch(tool, options.seconds) for tool in options.tools.split(","))


def watch(tool: str, seconds: float) -> int:
    """One tool over all cases; what it says is printed."""
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", sys.executable]
    command += [str(Path(__file__).resolve()), "--cases"]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds
        )
    except FileNotFoundError:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
        return 2
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        print(said)
        print(f"{tool}: out of time after {seconds:g} s")
        return 1
    print(done.stdout + done.stderr)
    is_clean = done.returncode == 0 and any(words in done.stdout for words in CLEAN)
    spent = time.monotonic() - started
    print(f"{tool}: {'clean' if is_clean else 'FOUND SOMETHING'} in {spent:.0f} s")
    return 0 if is_clean else 1


def run_cases(families: Iterable[str]) -> int:
    """Every case of the families, each result compared with the reference."""
    wrong = 0
    for family in families:
        try:
            for name, error in FAMILIES[family]():
                is_right = error <= MAX_ERROR
                wrong += not is_right
                verdict = "" if is_right else "WRONG "
                print(f"{family} {name}: {verdict}error {error:.1e}", flush=True)
        except ImportError as error:  # noqa: PERF203 - five families
            print(f"{family}: left out: {error}", flush=True)
    return int(wrong > 0)


def _operands(m: int) -> tuple[BlockScaledTensor, BlockScaledTensor]:
    import torch

    from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, MN_MAJOR_TMA_ALIGNED
    from blockscale.reference import quantize, relayout

    torch.manual_seed(m)
    weight = quantize(torch.randn(N, K, device="cuda"), FP8_128X128_FP32)
    activation = quantize(torch.randn(m, K, device="cuda"), FP8_1X128_FP32)
    return relayout(activation, MN_MAJOR_TMA_ALIGNED), weight


def _error(out: torch.Tensor, activation: BlockScaledTensor, weight: BlockScaledTensor) -> float:
    from blockscale.reference import dequantize

    exact = dequantize(activation).double() @ dequantize(weight).double().T
    return float((out.double() - exact).norm() / exact.norm())


def _gluon() -> Iterator[tuple[str, float]]:
    """Every form that the choice weighs for these M, dense, small and split."""
    from blockscale.kernels.gluon.choice import candidates
    from blockscale.kernels.gluon.product import GluonProduct

    def works(m: int) -> Iterable[tuple[object, Any]]:
        return ((work.variant, work) for work in candidates(m, N, K, 2, _processors()))

    return _every_form(GluonProduct, works)


def _cuda() -> Iterator[tuple[str, float]]:
    """Every form of gemm.cu that its choice weighs for these M."""
    from blockscale.errors import BackendError
    from blockscale.formats import DType
    from blockscale.kernels.cuda.build import nvrtc
    from blockscale.kernels.cuda.choice import candidates
    from blockscale.kernels.cuda.product import CudaProduct

    try:
        nvrtc()
    except BackendError as error:
        raise ImportError(str(error)) from error

    def works(m: int) -> Iterable[tuple[object, Any]]:
        found = candidates(m, N, K, DType.BFLOAT16, _processors())
        return ((work.form, work) for work in found)

    return _every_form(CudaProduct, works)


def _processors() -> int:
    import torch

    return torch.cuda.get_device_properties(0).multi_processor_count


def _every_form(
    product_of: Callable[[BlockScaledTensor], Any],
    works: Callable[[int], Iterable[tuple[object, Any]]],
) -> Iterator[tuple[str, float]]:
    """Each form that ``works`` gives for some M, once, with the work it came with."""
    import torch

    seen: set[object] = set()
    for m in TOKENS:
        activation, weight = _operands(m)
        product = product_of(weight)
        for form, work in works(m):
            if form in seen:
                continue
            seen.add(form)
            product.use(work, m, torch.bfloat16)
            out = torch.full((m, N), float("nan"), dtype=torch.bfloat16, device="cuda")
            product(activation, out, None)
            yield f"{work.name} M={m}", _error(out, activation, weight)


def _layers() -> Iterator[tuple[str, float]]:
    """Planned layers: quantizer and product in one step."""
    import torch

    from blockscale import BlockScaledLinear, LinearRequest, PlanPolicy, plan_linear
    from blockscale.backends.registry import BACKENDS
    from blockscale.formats import FP8_128X128_FP32, DType
    from blockscale.probe.machine import read_machine
    from blockscale.reference import quantize

    for name in ("gluon", "triton"):
        n, k = 320, 640
        request = LinearRequest(name, n, k, FP8_128X128_FP32, DType.FLOAT16, DType.FLOAT16)
        plan = plan_linear(request, read_machine(), PlanPolicy(backends=(name,)), BACKENDS)
        weight = quantize(torch.randn(n, k, device="cuda"), FP8_128X128_FP32)
        layer = BlockScaledLinear(plan, weight)
        for m in TOKENS:
            values = torch.randn(m, k, dtype=torch.float16, device="cuda")
            activation = quantize(values, plan.choices[0].offer.activation.format)  # type: ignore[union-attr]  # both backends quantize activations
            yield (f"{name} M={m}", _error(layer(values), activation, weight))


def _quantizers() -> Iterator[tuple[str, float]]:
    """Each quantizing kernel; the share of codes that differ from the reference's."""
    import torch

    from blockscale.formats import FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED
    from blockscale.kernels.triton.destination import QuantizerSpec
    from blockscale.kernels.triton.normalize import NormalizeQuantizer
    from blockscale.kernels.triton.quantize import quantize_rows, silu_multiply_quantizer
    from blockscale.reference import quantize
    from blockscale.reference.fused import add_and_normalize, silu_and_multiply

    torch.manual_seed(0)
    rows, columns, dtype = 37, 768, torch.bfloat16
    values, residual = torch.randn(2, rows, columns).to(dtype)
    gate_up = torch.randn(rows, 2 * columns).to(dtype)
    weight = torch.rand(columns).to(dtype)
    form = FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED
    spec = QuantizerSpec(*form, dtype, columns, torch.cuda.current_device())
    pairs = {
        "quantize": (quantize_rows(values.cuda(), *form).data, values),
        "silu": (silu_multiply_quantizer(spec)(gate_up.cuda())[0], silu_and_multiply(gate_up)),
    }
    for other in (None, residual):
        quantizer = NormalizeQuantizer(spec, weight.cuda(), 1e-6, has_residual=other is not None)
        codes, _, _ = quantizer(values.cuda(), None if other is None else other.cuda())
        normalized = add_and_normalize(values, other, weight, 1e-6).normalized
        pairs["rms_norm" if other is None else "add_rms_norm"] = (codes, normalized)
    for name, (codes, exact) in pairs.items():
        differs = codes.cpu().float() != quantize(exact, form[0]).data.float()
        yield name, float(differs.float().mean())


def _experts() -> Iterator[tuple[str, float]]:
    """Layers of experts: rows are arranged, gathered, multiplied twice and combined."""
    from blockscale.formats import DType
    from blockscale.modules.experts import BlockScaledExperts
    from blockscale.planning.decision import Arrangement, GroupedRows, MRange
    from blockscale.probe.machine import read_machine
    from blockscale.tensor import torch_dtype
    from blockscale.testing import expert_cases as cases

    dtype = DType.BFLOAT16
    for name in ("gluon", "triton"):
        planned = cases.plan_for(name, dtype, device=read_machine())
        for arrangement in Arrangement:
            rows = GroupedRows(MRange(), arrangement, 128)
            layer = BlockScaledExperts(
                cases.with_rows(planned, rows), *(w.to("cuda") for w in cases.exact_weights())
            )
            for tokens in (3, 40):
                hidden = cases.exact_tokens(tokens).to(torch_dtype(dtype))
                ids, weights = cases.routing(tokens)
                out = layer(hidden.cuda(), ids.cuda(), weights.cuda()).cpu()
                exact = cases.exact_result(hidden, ids, weights)
                differs = float((out != exact).double().mean())
                yield (f"{name} {arrangement.value} {tokens} tokens", differs)


FAMILIES: dict[str, Callable[[], Iterator[tuple[str, float]]]] = {
    "gluon": _gluon,
    "cuda": _cuda,
    "layers": _layers,
    "quantizers": _quantizers,
    "experts": _experts,
}


if __name__ == "__main__":
    sys.exit(main())
