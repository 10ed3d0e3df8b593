"""``BlockScaledExperts`` on a GPU: exact experts, the reference's bits, graphs, no waiting."""

from __future__ import annotations

import gc
import warnings
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton: rows of experts are moved by it")

from blockscale.expert_ops import TorchRows
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    BlockFormat,
    DType,
    ScaleLayout,
)
from blockscale.kernels.triton.rows import ContiguousRows, MaskedRows, RowsSpec
from blockscale.modules.experts import BlockScaledExperts
from blockscale.planning.decision import (
    Arrangement,
    GroupedRows,
    MRange,
    Obstacle,
    OperandForm,
)
from blockscale.probe.machine import read_machine
from blockscale.reference import expert_of, scale_values
from blockscale.tensor import torch_dtype
from blockscale.testing import expert_cases as cases

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockscale.reference.experts import ArrangedRows
    from blockscale.tensor import BlockScaledTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs SM90 (H100, H200)",
    ),
]

NAMES = ("gluon", "cuda", "triton", "deep_gemm")
MB = 1_000_000


def layer_of(name: str, dtype: DType = DType.BFLOAT16, *rows: GroupedRows) -> BlockScaledExperts:
    plan = cases.plan_for(name, dtype, device=read_machine())
    missing = [r.reason for r in plan.w13.rejected if r.obstacle is Obstacle.NOT_INSTALLED]
    if missing:
        pytest.skip("; ".join(missing))
    if not plan.w13.is_servable:
        pytest.skip("; ".join(r.reason for r in plan.w13.rejected if r.backend == name))
    plan = cases.with_rows(plan, *rows) if rows else plan
    return BlockScaledExperts(plan, *(weight.to("cuda") for weight in cases.exact_weights()))


def case(
    tokens: int, dtype: DType = DType.BFLOAT16, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = cases.exact_tokens(tokens, seed).to(torch_dtype(dtype))
    ids, weights = cases.routing(tokens, seed)
    return hidden, ids, weights


def on_gpu(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.cuda() for tensor in tensors)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16], ids=lambda dtype: dtype.value)
def test_exact_experts(name: str, dtype: DType) -> None:
    """The bits that the CPU gives, for every arrangement that the backend offers."""
    layer = layer_of(name, dtype)
    for tokens in (1, 2, 7, 40, 130):
        inputs = case(tokens, dtype)
        result = layer(*on_gpu(*inputs)).cpu()
        exact = cases.exact_result(*inputs)
        # Large sums of float16 overflow in both.
        finite = exact.isfinite()
        assert torch.equal(result[finite], exact[finite]), tokens
        assert finite.float().mean() > 0.9


@pytest.mark.parametrize("name", ["gluon", "triton"])
@pytest.mark.parametrize(
    ("arrangement", "alignment"),
    [
        (Arrangement.CONTIGUOUS, 16),
        (Arrangement.CONTIGUOUS, 64),
        (Arrangement.CONTIGUOUS, 128),
        (Arrangement.MASKED, 64),
    ],
)
def test_the_arrangement_of_rows_changes_no_bit(
    name: str, arrangement: Arrangement, alignment: int
) -> None:
    layer = layer_of(name, DType.BFLOAT16, GroupedRows(MRange(), arrangement, alignment))
    for tokens in (1, 33):
        inputs = case(tokens)
        assert torch.equal(layer(*on_gpu(*inputs)).cpu(), cases.exact_result(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_other_ranks_add_nothing_and_one_expert_may_have_all(name: str) -> None:
    layer = layer_of(name)
    hidden, ids, weights = case(20)
    ids[::2, 1], ids[3, 0], ids[5] = cases.EXPERTS, -1, 77
    result = layer(*on_gpu(hidden, ids, weights)).cpu()
    assert torch.equal(result, cases.exact_result(hidden, ids, weights))
    hot = torch.full((20, 1), 4), torch.full((20, 1), 0.5)
    result = layer(*on_gpu(hidden, *hot)).cpu()
    assert torch.equal(result, cases.exact_result(hidden, *hot))
    nobody = layer(*on_gpu(hidden, torch.full_like(ids, -1), weights))
    assert not nobody.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_a_graph_serves_every_routing(name: str, tokens: int) -> None:
    layer = layer_of(name)
    held = on_gpu(*case(tokens))
    for _ in range(2):
        layer(*held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(*held)
    for seed in range(1, 5):
        inputs = case(tokens, seed=seed)
        if seed == 4:
            inputs[1][:] = inputs[1][:1]
        for place, new in zip(held, inputs, strict=True):
            place.copy_(new)
        graph.replay()
        assert torch.equal(out.cpu(), cases.exact_result(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_leaves_nothing_in_memory(name: str) -> None:
    """Not at a token count's first call either: that may be a graph's, with a pool of its own."""
    layer = layer_of(name)
    inputs = [on_gpu(*case(tokens)) for tokens in (1, 5, 40)]
    gc.collect()  # What earlier tests left in cycles is not to be freed in between.
    before = torch.cuda.memory_allocated()
    for held in inputs:
        layer(*held)
        assert torch.cuda.memory_allocated() == before


@pytest.mark.filterwarnings("ignore")  # Inductor advises on speed.
@pytest.mark.parametrize("name", NAMES)
def test_compiles_with_inductor_s_own_graphs(name: str) -> None:
    """It runs, captures and replays. What stays in a graph's pool and is no result is an error."""
    layer = layer_of(name)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        inputs = case(5, seed=seed)
        with torch.inference_mode():
            found = compiled(*on_gpu(*inputs)).cpu()
        assert torch.equal(found, cases.exact_result(*inputs))


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        # Torch says that the mode does not see every wait yet.
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device(name: str, request: pytest.FixtureRequest) -> None:
    layer = layer_of(name)
    for tokens in (3, 130):
        held = on_gpu(*case(tokens))
        layer(*held)
    torch.cuda.synchronize()
    request.getfixturevalue("waiting_is_an_error")
    for _ in range(2):
        layer(*held)


@pytest.mark.parametrize("name", ["gluon", "triton"])
def test_the_same_bits_on_every_run(name: str) -> None:
    layer = layer_of(name)
    hidden, ids, weights = on_gpu(*case(130))
    hidden = torch.randn_like(hidden)
    first = layer(hidden, ids, weights)
    assert all(torch.equal(layer(hidden, ids, weights), first) for _ in range(5))


@pytest.mark.parametrize(("name", "tokens"), [("gluon", 4), ("triton", 1), ("triton", 4)])
def test_an_update_reaches_a_captured_graph(name: str, tokens: int) -> None:
    layer = layer_of(name)
    held = on_gpu(*case(tokens))
    layer(*held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(*held)
    w13, w2 = cases.exact_weights()
    for expert in range(cases.EXPERTS):
        doubled = expert_of(w2, expert)
        doubled.scales.mul_(2)
        layer.update_expert(expert, [expert_of(w13, expert)], [doubled])
    graph.replay()
    assert torch.equal(out.cpu(), cases.exact_result(*case(tokens)) * 2)


FORMS = [
    (FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
    (FP8_1X128_FP32, K_MAJOR),
    (FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED),
]


def counted(operand: BlockScaledTensor, rows: ArrangedRows) -> tuple[torch.Tensor, torch.Tensor]:
    real = rows.source >= 0
    data = operand.data.view(torch.uint8).reshape(rows.rows, -1)
    return data[real], scale_values(operand).reshape(rows.rows, -1)[real]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("arrangement", "alignment"), [(Arrangement.CONTIGUOUS, 128), (Arrangement.MASKED, 64)]
)
@pytest.mark.parametrize("tokens", [1, 128, 600])
def test_steps_give_the_reference_s_bits_at_the_size_of_models(
    form: tuple[BlockFormat, ScaleLayout], arrangement: Arrangement, alignment: int, tokens: int
) -> None:
    """256 experts, 8 for each token, as in MiniMax-M2.5; narrower rows, so that slots fit."""
    experts, k, inner, dtype = 256, 1152, 640, torch.bfloat16
    spec = RowsSpec(*form, alignment, experts, dtype, k, inner, torch.cuda.current_device())
    steps = (MaskedRows if arrangement is Arrangement.MASKED else ContiguousRows)(spec)
    grouped = GroupedRows(MRange(), arrangement, alignment)
    reference = TorchRows(OperandForm(*form), grouped, experts)
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator, device="cuda").argsort(1)[:, :8]
    rows, wanted = steps.arrange(ids), reference.arrange(ids)
    for name in ("source", "place", "groups"):
        assert torch.equal(getattr(rows, name), getattr(wanted, name)), name
    hidden = torch.randn(tokens, k, generator=generator, device="cuda").to(dtype)
    gate_up = torch.randn(rows.rows, 2 * inner, generator=generator, device="cuda").to(dtype)
    for found, right in (
        (steps.gather(hidden, rows), reference.gather(hidden, wanted)),
        (steps.activate(gate_up, rows), reference.activate(gate_up, wanted)),
    ):
        assert all(map(torch.equal, counted(found, rows), counted(right, wanted)))
    weights = torch.rand(tokens, 8, generator=generator, device="cuda")
    products = torch.randn(rows.rows, k, generator=generator, device="cuda").to(dtype)
    found, right = (torch.empty(tokens, k, dtype=dtype, device="cuda") for _ in range(2))
    steps.combine(products, rows, weights, found)
    reference.combine(products, wanted, weights, right)
    assert torch.equal(found, right)


def test_preparing_holds_one_expert_beside_the_stacks() -> None:
    w13, w2 = cases.exact_weights()
    plan = cases.plan_for("triton", device=read_machine())
    BlockScaledExperts(plan, w13.to("cuda"), w2.to("cuda"))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer = BlockScaledExperts(
        plan,
        lambda expert: (expert_of(w13, expert),),
        lambda expert: (expert_of(w2, expert),),
        device="cuda",
    )
    kept = layer.w13.nbytes + layer.w2.nbytes
    one = kept // cases.EXPERTS
    assert torch.cuda.max_memory_allocated() - before <= kept + one + 64 * MB
