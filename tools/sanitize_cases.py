"""What the sanitizer watches: small products by every kernel, each checked against the reference.

Which products: ``sanitize_works``. What is not ours is computed on the CPU, where no sanitizer
watches it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from blockscale.formats import DType
from sanitize_works import (
    COUNTS,
    FEW,
    SLOT_ROWS,
    Grouped,
    N,
    Scope,
    build_for,
    cuda_works,
    forms_of,
    gluon_works,
    grouped_cuda,
    grouped_gluon,
    k_of,
    need_nvrtc,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from blockscale.kernels.cuda.work import Form as CudaForm
    from blockscale.kernels.gluon.build import Form as GluonForm
    from blockscale.planning.device import Device
    from blockscale.tensor import BlockScaledTensor

LAYER_TOKENS = (7, 40, 300)
EXPERT_TOKENS = {Scope.EVERY_WAY: (3, 40), Scope.RACES: (40,)}
# Of the first control: meetings of a partition's warps, and mbarriers. Of the other: numbers that
# go through its ring.
CONTROLS = ((0, 0), (96, 0), (96, 2))
NUMBERS = 24
# Relative Frobenius error: far above what any output dtype rounds, far below a wrong scale.
MAX_ERROR = 5e-3

# Processes that compile, half a gigabyte each.
MOST_WORKERS = 16

Found = tuple[str, float]


def run_cases(families: Iterable[str], scope: Scope = Scope.EVERY_WAY) -> int:
    """The families' cases, each result compared with the reference; how long each took."""
    build_for(scope)
    wrong = 0
    for family in families:
        started = time.monotonic()
        try:
            for name, error in FAMILIES[family](scope):
                is_right = error <= MAX_ERROR
                wrong += not is_right
                verdict = "" if is_right else "WRONG "
                spent, started = time.monotonic() - started, time.monotonic()
                print(f"{family} {name}: {verdict}error {error:.1e}, {spent:.1f} s", flush=True)
        except ImportError as error:
            print(f"{family}: left out: {error}", flush=True)
        except Exception as error:  # noqa: BLE001 - the other families are still wanted
            wrong += 1
            print(f"{family}: FAILED: {type(error).__name__}: {error}", flush=True)
    return int(wrong > 0)


def compile_cases(scopes: Iterable[Scope]) -> list[str]:
    """Fill the caches on all cores; what could not be compiled, and why."""
    jobs = dict.fromkeys((form, scope) for scope in scopes for form in forms_of(scope))
    context = multiprocessing.get_context("spawn")
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context) as pool:
        return [words for words in pool.map(compile_one, *zip(*jobs, strict=True)) if words]


def compile_one(form: CudaForm | GluonForm, scope: Scope) -> str:
    """Compile one; nothing, or what went wrong: its case will say it again."""
    from blockscale.kernels.cuda import build as cuda_build
    from blockscale.kernels.cuda.work import Form

    try:
        if isinstance(form, Form):
            build_for(scope)
            cuda_build.compile_form(form)
        else:
            from blockscale.kernels.gluon.build import compile_ahead

            compile_ahead(form)
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        return f"{form.name}: {' '.join(str(error).split())[:300]}"
    return ""


# ---- running them


def _gluon(scope: Scope) -> Iterator[Found]:
    from blockscale.kernels.gluon.product import GluonProduct

    works = [(m, work, DType.BFLOAT16) for m, work in gluon_works(scope)]
    return _products(GluonProduct, works)


def _cuda(scope: Scope) -> Iterator[Found]:
    from blockscale.kernels.cuda.product import CudaProduct

    need_nvrtc()
    works = [(m, work, work.form.out) for m, work in cuda_works(scope)]
    return _products(CudaProduct, works)


def _products(
    product_of: Callable[[BlockScaledTensor], Any], works: Iterable[tuple[int, Any, DType]]
) -> Iterator[Found]:
    import torch

    from blockscale.tensor import torch_dtype

    for m, work, out_dtype in works:
        dtype = torch_dtype(out_dtype)
        activation, weight = _operands(m, k_of(work.k_blocks))
        product = product_of(weight.to("cuda"))
        product.use(work, m, dtype)
        out = torch.full((m, N), float("nan"), dtype=dtype, device="cuda")
        product(activation.to("cuda"), out, None)
        yield f"{work.name} M={m}", _error(out, activation, weight)


def _operands(m: int, k: int) -> tuple[BlockScaledTensor, BlockScaledTensor]:
    import torch

    from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, MN_MAJOR_TMA_ALIGNED
    from blockscale.reference import quantize, relayout

    torch.manual_seed(m)
    weight = quantize(torch.randn(N, k), FP8_128X128_FP32)
    activation = quantize(torch.randn(m, k), FP8_1X128_FP32)
    return relayout(activation, MN_MAJOR_TMA_ALIGNED), weight


def _error(out: torch.Tensor, activation: BlockScaledTensor, weight: BlockScaledTensor) -> float:
    from blockscale.reference import dequantize

    exact = dequantize(activation).double() @ dequantize(weight).double().T
    return float((out.cpu().double() - exact).norm() / exact.norm())


def _grouped(scope: Scope) -> Iterator[Found]:
    """Products over groups, exact; how many groups are wrong."""
    from blockscale.kernels.cuda.grouped_product import CudaGroupedProduct
    from blockscale.kernels.gluon.grouped_product import GroupedProduct

    def few(weight: BlockScaledTensor) -> GroupedProduct:
        product = GroupedProduct(weight)
        product._processors = FEW  # noqa: SLF001 - so many programs it starts
        return product

    yield from _grouped_products(few, grouped_gluon(scope))
    need_nvrtc()
    yield from _grouped_products(CudaGroupedProduct, grouped_cuda(scope))


def _grouped_products(
    product_of: Callable[[BlockScaledTensor], Any], cases: Iterable[Grouped]
) -> Iterator[Found]:
    import torch

    from blockscale.testing.exact_groups import Contiguous, Masked, Weights

    weights: dict[int, Weights] = {}
    for case in cases:
        k = k_of(case.k_blocks)
        if k not in weights:
            weights[k] = Weights(len(COUNTS), N, k, product_of)
            weights[k].tensor = weights[k].tensor.to("cpu")
        rows = (
            Contiguous(weights[k], COUNTS, case.alignment)
            if case.alignment
            else Masked(weights[k], COUNTS, SLOT_ROWS)
        )
        out = rows.run(case.work, torch.bfloat16).cpu()
        rows.activation = rows.activation.to("cpu")
        yield case.name, float(len(rows.wrong(out)))


def _layers(_scope: Scope) -> Iterator[Found]:
    """Planned layers: quantizer and product in one step."""
    import torch

    from blockscale import BlockScaledLinear, LinearRequest, PlanPolicy, plan_linear
    from blockscale.backends.registry import BACKENDS
    from blockscale.formats import FP8_128X128_FP32, DType
    from blockscale.probe.machine import read_machine
    from blockscale.reference import quantize

    machine = read_machine()
    for name in _backends(machine):
        n, k = 320, 640
        request = LinearRequest(name, n, k, FP8_128X128_FP32, DType.FLOAT16, DType.FLOAT16)
        plan = plan_linear(request, machine, PlanPolicy(backends=(name,)), BACKENDS)
        weight = quantize(torch.randn(n, k), FP8_128X128_FP32)
        layer = BlockScaledLinear(plan, weight.to("cuda"))
        for m in LAYER_TOKENS:
            values = torch.randn(m, k, dtype=torch.float16)
            activation = quantize(values, plan.choices[0].offer.activation.format)  # type: ignore[union-attr]  # all of them quantize activations
            yield (f"{name} M={m}", _error(layer(values.cuda()), activation, weight))


def _backends(machine: Device) -> list[str]:
    """Those with kernels of ours, and what they need."""
    has_cuda = any(name == "cuda-bindings" for name, _ in machine.packages)
    if not has_cuda:
        print("cuda: left out: pip install 'blockscale[cuda]'", flush=True)
    return ["gluon", "triton", *["cuda"] * has_cuda]


def _quantizers(_scope: Scope) -> Iterator[Found]:
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


def _experts(scope: Scope) -> Iterator[Found]:
    """Layers of experts: rows are arranged, gathered, multiplied twice and combined."""
    from blockscale.formats import DType
    from blockscale.modules.experts import BlockScaledExperts
    from blockscale.planning.decision import Arrangement, GroupedRows, MRange
    from blockscale.probe.machine import read_machine
    from blockscale.tensor import torch_dtype
    from blockscale.testing import expert_cases as cases

    dtype, machine = DType.BFLOAT16, read_machine()
    for name in _backends(machine):
        planned = cases.plan_for(name, dtype, device=machine)
        for arrangement in Arrangement:
            rows = GroupedRows(MRange(), arrangement, 128)
            layer = BlockScaledExperts(
                cases.with_rows(planned, rows), *(w.to("cuda") for w in cases.exact_weights())
            )
            for tokens in EXPERT_TOKENS[scope]:
                hidden = cases.exact_tokens(tokens).to(torch_dtype(dtype))
                ids, weights = cases.routing(tokens)
                out = layer(hidden.cuda(), ids.cuda(), weights.cuda()).cpu()
                exact = cases.exact_result(hidden, ids, weights)
                differs = float((out != exact).double().mean())
                yield (f"{name} {arrangement.value} {tokens} tokens", differs)


def _control(_scope: Scope) -> Iterator[Found]:
    """How Triton hands work to warps, and a ring; nothing else (``racecheck``)."""
    import triton

    if triton.knobs.runtime.interpret:
        msg = "Triton's interpreter has no warps"
        raise ImportError(msg)

    from hand_over import wrong_counts
    from scale_ring import wrong_sums

    for rounds, mbarriers in CONTROLS:
        name = f"hand-over, {rounds} rounds, {mbarriers} mbarriers"
        yield name, wrong_counts(rounds, mbarriers)
    yield f"ring, {NUMBERS} numbers", wrong_sums(NUMBERS)


FAMILIES: dict[str, Callable[[Scope], Iterator[Found]]] = {
    "control": _control,
    "gluon": _gluon,
    "cuda": _cuda,
    "grouped": _grouped,
    "layers": _layers,
    "quantizers": _quantizers,
    "experts": _experts,
}
