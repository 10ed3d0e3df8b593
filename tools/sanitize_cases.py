"""What the sanitizer watches: small products by every kernel, each checked against the reference.

One case for each way through the code, not for each tile: see ``cuda_kind`` and ``gluon_kind``. N,
K and M are ragged. K has more blocks than any ring has slots, so every ring goes round. Launches
are for ``FEW`` multiprocessors, so that a kernel's blocks take several tiles; for other numbers
where a form is for no such launch. Forms are those that the choices may give: results written at
once and late, one wave and two in flight.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

    import torch

    from blockscale.kernels.cuda.work import Form as CudaForm
    from blockscale.kernels.cuda.work import Work as CudaWork
    from blockscale.kernels.gluon.build import Form as GluonForm
    from blockscale.kernels.gluon.grouped_work import AnyGroupedVariant
    from blockscale.kernels.gluon.work import Work as GluonWork
    from blockscale.planning.device import Device
    from blockscale.tensor import BlockScaledTensor

N, K = 392, 1680
# Half of it has more blocks than the deepest ring of a kernel that can split.
SPLIT_K = 2192
TOKENS = (1, 40, 129, 300, 600)
LAYER_TOKENS = (7, 40, 300)
FEW = 3
# Tried in this order, until there is a case of each kind.
PROCESSORS = (FEW, 12, 132, 1, 2)
# Of groups: rows of each, and of a slot. Row blocks have one of the heights below.
COUNTS, SLOT_ROWS = (0, 65, 190, 1), 200
ALIGNMENTS = (64, 128)
# Rows of a slot that are said to be likely: few and many to a tile.
LIKELY = (40, 150)
# Of the control: meetings of a partition's warps, and mbarriers.
CONTROLS = ((0, 0), (96, 0), (96, 2))
# Relative Frobenius error: far above what any output dtype rounds, far below a wrong scale.
MAX_ERROR = 5e-3

# Processes that compile, half a gigabyte each.
MOST_WORKERS = 16

Found = tuple[str, float]
Work = TypeVar("Work")


@dataclass(frozen=True, slots=True)
class Grouped:
    """A product over groups: in slots if ``alignment`` is 0, else in row blocks of so many rows."""

    work: Any
    alignment: int

    @property
    def name(self) -> str:
        """The form's."""
        return str(self.work.name)


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
        except ImportError as error:  # noqa: PERF203 - a few families
            print(f"{family}: left out: {error}", flush=True)
        except Exception as error:  # noqa: BLE001 - the other families are still wanted
            wrong += 1
            print(f"{family}: FAILED: {type(error).__name__}: {error}", flush=True)
    return int(wrong > 0)


def compile_cases() -> list[str]:
    """Fill the caches on all cores; what could not be compiled, and why."""
    forms: list[CudaForm | GluonForm] = []
    if importlib.util.find_spec("triton"):
        forms += gluon_forms()
    with suppress(ImportError):
        need_nvrtc()
        forms += cuda_forms()
    context = multiprocessing.get_context("spawn")
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context) as pool:
        return [words for words in pool.map(compile_one, dict.fromkeys(forms)) if words]


def compile_one(form: CudaForm | GluonForm) -> str:
    """Compile one; nothing, or what went wrong: its case will say it again."""
    from blockscale.kernels.cuda import build as cuda_build
    from blockscale.kernels.cuda.work import Form

    try:
        if isinstance(form, Form):
            cuda_build.compile_form(form)
        else:
            from blockscale.kernels.gluon.build import compile_ahead

            compile_ahead(form)
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        return f"{form.name}: {' '.join(str(error).split())[:300]}"
    return ""


# ---- which works


def gluon_works() -> list[tuple[int, GluonWork]]:
    """(M, work) of each kind that the choice of the Gluon kernels may give."""
    from blockscale.kernels.gluon.choice import candidates

    found = [
        (m, work)
        for m in TOKENS
        for processors in PROCESSORS
        for work in candidates(m, N, SPLIT_K, 2, processors)
    ]
    return one_of_each(found, gluon_kind, gluon_turns)


def gluon_kind(work: GluonWork) -> Hashable:
    """What decides the way through the code."""
    from blockscale.kernels.gluon.work import DenseWork

    variant: Any = work.variant
    if isinstance(work, DenseWork):
        return variant.rows, variant.rest > 0, variant.split, variant.narrow
    # A box of scales is wider than a tile of few tokens.
    return variant.weights, variant.tokens < 32, variant.split  # noqa: PLR2004 - a box's scales


def gluon_turns(work: GluonWork) -> float:
    """Items that a program takes."""
    from blockscale.kernels.gluon.work import DenseWork

    if isinstance(work, DenseWork):
        return (work.items + work.narrow_tiles) / work.programs
    return 1


def cuda_works() -> list[tuple[int, CudaWork]]:
    """(M, work) of each kind that the choice of ``gemm.cu`` may give, as it would write them."""
    from blockscale.formats import DType
    from blockscale.kernels.cuda.choice import candidates
    from blockscale.kernels.cuda.work import written

    found = [
        (m, written(work))
        for m in TOKENS
        for processors in PROCESSORS
        for work in candidates(m, N, K, DType.BFLOAT16, processors)
    ]
    return one_of_each(found, cuda_kind, cuda_turns)


def cuda_kind(work: CudaWork) -> Hashable:
    """What decides the way through the code; a tile's width decides only how often."""
    form, stores = work.form, work.form.stores
    return (
        *(form.rows, form.grouping, form.share, form.beside, form.flight),
        *(stores.when, stores.box_rows, work.early_blocks > 0),
    )


def cuda_turns(work: CudaWork) -> float:
    """Units that a block takes."""
    return work.units * work.form.cluster / work.blocks


def grouped_gluon() -> list[Grouped]:
    """Each kind of the Gluon kernels for groups."""
    from blockscale.kernels.gluon.grouped_choice import contiguous_variants, masked_variants

    found = [
        (alignment, variant)
        for alignment in ALIGNMENTS
        for variant in contiguous_variants(alignment, 2)
    ]
    found += [(0, variant) for variant in masked_variants(len(COUNTS), 2)]

    def kind(variant: AnyGroupedVariant) -> Hashable:
        few: Any = variant
        height = few.weights if hasattr(few, "weights") else few.rows
        return type(variant), height, variant.groups

    works = one_of_each(found, kind, lambda _: 1)
    return [Grouped(work, alignment) for alignment, work in works]


def grouped_cuda() -> list[Grouped]:
    """Each kind of ``gemm.cu`` for groups."""
    from blockscale.formats import DType
    from blockscale.kernels.cuda.grouped_choice import contiguous_works, masked_works

    dtype, found = DType.BFLOAT16, []
    for processors in PROCESSORS:
        for alignment in ALIGNMENTS:
            # Three more that belong to no group: as ``exact_groups`` has them.
            blocks = sum(-(-count // alignment) for count in COUNTS) + 3
            rows = (len(COUNTS), blocks, alignment)
            found += [
                (alignment, work) for work in contiguous_works(rows, (N, K), dtype, processors)
            ]
        for likely in LIKELY:
            rows = (len(COUNTS), SLOT_ROWS, likely)
            found += [(0, work) for work in masked_works(rows, (N, K), dtype, processors)]
    works = one_of_each(found, cuda_kind, cuda_turns)
    return [Grouped(work, alignment) for alignment, work in works]


def one_of_each(
    found: Iterable[tuple[int, Work]],
    kind: Callable[[Work], Hashable],
    turns: Callable[[Work], float],
) -> list[tuple[int, Work]]:
    """The first of each kind, or the first with several turns."""
    kept: dict[Hashable, tuple[int, Work]] = {}
    for number, work in found:
        old = kept.get(kind(work))
        if old is None or (turns(work) > 1 >= turns(old[1])):
            kept[kind(work)] = number, work
    return list(kept.values())


def gluon_forms() -> Iterator[GluonForm]:
    """What the Gluon cases compile."""
    import torch

    from blockscale.kernels.gluon.build import Form

    variants = [work.variant for _, work in gluon_works()]
    variants += [case.work for case in grouped_gluon()]
    return (Form(variant, torch.bfloat16, overlap=True) for variant in variants)


def cuda_forms() -> Iterator[CudaForm]:
    """What the ``cuda`` cases compile."""
    return chain(
        (work.form for _, work in cuda_works()), (case.work.form for case in grouped_cuda())
    )


# ---- running them


def _gluon() -> Iterator[Found]:
    from blockscale.kernels.gluon.product import GluonProduct

    return _products(GluonProduct, SPLIT_K, gluon_works())


def _cuda() -> Iterator[Found]:
    from blockscale.kernels.cuda.product import CudaProduct

    need_nvrtc()
    return _products(CudaProduct, K, cuda_works())


def need_nvrtc() -> None:
    """Raises ImportError where ``gemm.cu`` cannot be compiled."""
    from blockscale.errors import BackendError
    from blockscale.kernels.cuda.build import nvrtc

    try:
        nvrtc()
    except BackendError as error:
        raise ImportError(str(error)) from error


def _products(
    product_of: Callable[[BlockScaledTensor], Any], k: int, works: Iterable[tuple[int, Any]]
) -> Iterator[Found]:
    import torch

    for m, work in works:
        activation, weight = _operands(m, k)
        product = product_of(weight)
        product.use(work, m, torch.bfloat16)
        out = torch.full((m, N), float("nan"), dtype=torch.bfloat16, device="cuda")
        product(activation, out, None)
        yield f"{work.name} M={m}", _error(out, activation, weight)


def _operands(m: int, k: int) -> tuple[BlockScaledTensor, BlockScaledTensor]:
    import torch

    from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, MN_MAJOR_TMA_ALIGNED
    from blockscale.reference import quantize, relayout

    torch.manual_seed(m)
    weight = quantize(torch.randn(N, k, device="cuda"), FP8_128X128_FP32)
    activation = quantize(torch.randn(m, k, device="cuda"), FP8_1X128_FP32)
    return relayout(activation, MN_MAJOR_TMA_ALIGNED), weight


def _error(out: torch.Tensor, activation: BlockScaledTensor, weight: BlockScaledTensor) -> float:
    from blockscale.reference import dequantize

    exact = dequantize(activation).double() @ dequantize(weight).double().T
    return float((out.double() - exact).norm() / exact.norm())


def _grouped() -> Iterator[Found]:
    """Products over groups, exact; how many groups are wrong."""
    from blockscale.kernels.cuda.grouped_product import CudaGroupedProduct
    from blockscale.kernels.gluon.grouped_product import GroupedProduct

    def few(weight: BlockScaledTensor) -> GroupedProduct:
        product = GroupedProduct(weight)
        product._processors = FEW  # noqa: SLF001 - so many programs it starts
        return product

    yield from _grouped_products(few, grouped_gluon())
    need_nvrtc()
    yield from _grouped_products(CudaGroupedProduct, grouped_cuda())


def _grouped_products(
    product_of: Callable[[BlockScaledTensor], Any], cases: Iterable[Grouped]
) -> Iterator[Found]:
    import torch

    from blockscale.testing.exact_groups import Contiguous, Masked, Weights

    weights = Weights(len(COUNTS), N, K, product_of)
    for case in cases:
        rows = (
            Contiguous(weights, COUNTS, case.alignment)
            if case.alignment
            else Masked(weights, COUNTS, SLOT_ROWS)
        )
        out = rows.run(case.work, torch.bfloat16)
        yield case.name, float(len(rows.wrong(out)))


def _layers() -> Iterator[Found]:
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
        weight = quantize(torch.randn(n, k, device="cuda"), FP8_128X128_FP32)
        layer = BlockScaledLinear(plan, weight)
        for m in LAYER_TOKENS:
            values = torch.randn(m, k, dtype=torch.float16, device="cuda")
            activation = quantize(values, plan.choices[0].offer.activation.format)  # type: ignore[union-attr]  # all of them quantize activations
            yield (f"{name} M={m}", _error(layer(values), activation, weight))


def _backends(machine: Device) -> list[str]:
    """Those with kernels of ours, and what they need."""
    has_cuda = any(name == "cuda-bindings" for name, _ in machine.packages)
    if not has_cuda:
        print("cuda: left out: pip install 'blockscale[cuda]'", flush=True)
    return ["gluon", "triton", *["cuda"] * has_cuda]


def _quantizers() -> Iterator[Found]:
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


def _experts() -> Iterator[Found]:
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
            for tokens in (3, 40):
                hidden = cases.exact_tokens(tokens).to(torch_dtype(dtype))
                ids, weights = cases.routing(tokens)
                out = layer(hidden.cuda(), ids.cuda(), weights.cuda()).cpu()
                exact = cases.exact_result(hidden, ids, weights)
                differs = float((out != exact).double().mean())
                yield (f"{name} {arrangement.value} {tokens} tokens", differs)


def _control() -> Iterator[Found]:
    """Not ours: how Triton hands work to warps, and nothing else (``racecheck``)."""
    import triton

    if triton.knobs.runtime.interpret:
        msg = "Triton's interpreter has no warps"
        raise ImportError(msg)

    from hand_over import wrong_counts

    for rounds, mbarriers in CONTROLS:
        name = f"hand-over, {rounds} rounds, {mbarriers} mbarriers"
        yield name, wrong_counts(rounds, mbarriers)


FAMILIES: dict[str, Callable[[], Iterator[Found]]] = {
    "control": _control,
    "gluon": _gluon,
    "cuda": _cuda,
    "grouped": _grouped,
    "layers": _layers,
    "quantizers": _quantizers,
    "experts": _experts,
}
