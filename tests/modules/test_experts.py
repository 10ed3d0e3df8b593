"""``BlockScaledExperts``: exact results on exact experts, then kernel errors on random ones."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from blockscale import expert_ops
from blockscale.errors import BackendError, ModelError, PlanError
from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, FP8_128X128_UE8M0, DType
from blockscale.modules.experts import BlockScaledExperts
from blockscale.planning.decision import Arrangement, GroupedRows, MRange
from blockscale.planning.expert_sets import ExpertsPlan
from blockscale.reference import dequantize, expert_of, quantize
from blockscale.tensor import torch_dtype
from blockscale.testing import expert_cases as cases

if TYPE_CHECKING:
    from blockscale.tensor import BlockScaledTensor

BACKENDS = ("cpu", "reference")
MASKED = GroupedRows(MRange(), Arrangement.MASKED, 8)
ALIGNED = GroupedRows(MRange(), Arrangement.CONTIGUOUS, 16)
UNPADDED = GroupedRows(MRange(), Arrangement.CONTIGUOUS, 1)
BY_TOKENS = (
    GroupedRows(MRange(0, 4), Arrangement.MASKED, 4),
    GroupedRows(MRange(5), Arrangement.CONTIGUOUS, 32),
)


@pytest.fixture(scope="module")
def exact() -> tuple[BlockScaledTensor, BlockScaledTensor]:
    return cases.exact_weights()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_exact_experts_give_the_same_bits_everywhere(
    exact: tuple[BlockScaledTensor, BlockScaledTensor], backend: str, dtype: DType, tokens: int
) -> None:
    layer = BlockScaledExperts(cases.plan_for(backend, dtype), *exact)
    hidden = cases.exact_tokens(tokens).to(torch_dtype(dtype))
    ids, weights = cases.routing(tokens)
    result = layer(hidden, ids, weights)
    assert result.dtype is torch_dtype(dtype)
    assert torch.equal(result, cases.exact_result(hidden, ids, weights))


@pytest.mark.parametrize("rows", [(MASKED,), (ALIGNED,), BY_TOKENS], ids=["masked", "aligned", "m"])
@pytest.mark.parametrize("tokens", [1, 4, 5, 33])
def test_the_arrangement_of_rows_changes_no_bit(
    exact: tuple[BlockScaledTensor, BlockScaledTensor], rows: tuple[GroupedRows, ...], tokens: int
) -> None:
    layer = BlockScaledExperts(cases.with_rows(cases.plan_for("reference"), *rows), *exact)
    hidden, (ids, weights) = cases.exact_tokens(tokens), cases.routing(tokens)
    assert torch.equal(layer(hidden, ids, weights), cases.exact_result(hidden, ids, weights))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_of_other_ranks_add_nothing(
    exact: tuple[BlockScaledTensor, BlockScaledTensor], backend: str
) -> None:
    layer = BlockScaledExperts(cases.plan_for(backend), *exact)
    hidden, (ids, weights) = cases.exact_tokens(9), cases.routing(9)
    ids[::2, 1], ids[3, 0], ids[5] = cases.EXPERTS, -1, 77
    result = layer(hidden, ids, weights)
    assert torch.equal(result, cases.exact_result(hidden, ids, weights))
    assert not result[5].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_expert(exact: tuple[BlockScaledTensor, BlockScaledTensor], backend: str) -> None:
    layer = BlockScaledExperts(cases.plan_for(backend), *exact)
    hidden = cases.exact_tokens(20)
    ids, weights = torch.full((20, 1), 4), torch.full((20, 1), 0.5)
    assert torch.equal(layer(hidden, ids, weights), cases.exact_result(hidden, ids, weights))


def test_ranks_of_an_expert_parallel_group_add_up(
    exact: tuple[BlockScaledTensor, BlockScaledTensor],
) -> None:
    """Two stacks of three experts, ids shifted by the first expert of each."""
    hidden, (ids, weights) = cases.exact_tokens(8), cases.routing(8)
    total = torch.zeros_like(hidden)
    whole = cases.plan_for()
    half = ExpertsPlan(
        *(replace(p, request=replace(p.request, experts=3)) for p in (whole.w13, whole.w2))
    )
    for first in (0, 3):
        w13, w2 = (
            type(w)(w.data[first : first + 3], w.scales[first : first + 3], w.format, w.layout)
            for w in exact
        )
        total += BlockScaledExperts(half, w13, w2)(hidden, ids - first, weights)
    assert torch.equal(total, cases.exact_result(hidden, ids, weights))


def random_weights(seed: int = 0) -> tuple[BlockScaledTensor, BlockScaledTensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2 * cases.INNER, cases.HIDDEN), (cases.HIDDEN, cases.INNER)
    w13, w2 = (
        torch.randn(cases.EXPERTS, *shape, generator=generator) / shape[1] ** 0.5
        for shape in shapes
    )
    return quantize(w13, FP8_128X128_FP32), quantize(w2, FP8_128X128_FP32)


def float64_result(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, quantizes: bool
) -> torch.Tensor:
    """The layer on dequantized operands in float64; activations quantized where a backend does."""

    def operand(values: torch.Tensor) -> torch.Tensor:
        if not quantizes:
            return values.double()
        return dequantize(quantize(values.float(), FP8_1X128_FP32)).double()

    up, down = (dequantize(weight).double() for weight in random_weights())
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    rows = operand(hidden)
    for token in range(hidden.shape[0]):
        for choice, expert in enumerate(ids[token].tolist()):
            gate, other = (up[expert] @ rows[token]).chunk(2)
            activated = operand((torch.nn.functional.silu(gate) * other)[None])[0]
            out[token] += weights[token, choice] * (down[expert] @ activated)
    return out


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_kernel_error_without_quantized_activations(tokens: int) -> None:
    """Float32 sums of at most 384 products, three roundings: 1e-6 of the norm is generous."""
    layer = BlockScaledExperts(cases.plan_for("cpu"), *random_weights())
    hidden = torch.randn(tokens, cases.HIDDEN, generator=torch.Generator().manual_seed(4))
    ids, weights = cases.routing(tokens)
    exact = float64_result(hidden, ids, weights, quantizes=False)
    assert (layer(hidden, ids, weights).double() - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_kernel_error_with_quantized_activations(tokens: int) -> None:
    """As above, but a hidden value beside a boundary may get the neighbouring code.

    One code in 16 of a value off by one changes a product of 384 by 6 % / sqrt(384); float32 sums
    put about one value in 1e5 on the other side, so 1e-4 of the norm leaves room for some.
    """
    layer = BlockScaledExperts(cases.plan_for("reference"), *random_weights())
    hidden = torch.randn(tokens, cases.HIDDEN, generator=torch.Generator().manual_seed(4))
    ids, weights = cases.routing(tokens)
    exact = float64_result(hidden, ids, weights, quantizes=True)
    assert (layer(hidden, ids, weights).double() - exact).norm() / exact.norm() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_no_choices(backend: str) -> None:
    layer = BlockScaledExperts(cases.plan_for(backend), *random_weights())
    none = torch.zeros(0, 3, dtype=torch.int64)
    assert layer(torch.zeros(0, cases.HIDDEN), none, none.float()).shape == (0, cases.HIDDEN)
    result = layer(torch.ones(2, cases.HIDDEN), none.view(2, 0)[:, :0], torch.zeros(2, 0))
    assert torch.equal(result, torch.zeros(2, cases.HIDDEN))


def test_leading_axes_and_strides_are_kept(
    exact: tuple[BlockScaledTensor, BlockScaledTensor],
) -> None:
    layer = BlockScaledExperts(cases.plan_for(), *exact)
    flat, (ids, weights) = cases.exact_tokens(6), cases.routing(6)
    turned = torch.stack([flat, flat]).permute(1, 2, 0).contiguous()[..., 0]
    result = layer(turned.view(2, 3, cases.HIDDEN), ids.int(), weights.to(torch.bfloat16))
    assert result.shape == (2, 3, cases.HIDDEN)
    assert torch.equal(result.view(6, -1), cases.exact_result(flat, ids, weights))


@pytest.mark.parametrize(
    ("hidden", "ids", "words"),
    [
        (torch.zeros(2, 255), torch.zeros(2, 1), r"planned for \(\.\.\., 256\) torch.float32"),
        (torch.zeros(2, 256).half(), torch.zeros(2, 1), "plan them for this dtype"),
        (torch.zeros(2, 256), torch.zeros(3, 1), r"shape \(2, choices\), got \(3, 1\)"),
        (torch.zeros(2, 256), torch.zeros(2), r"shape \(2, choices\)"),
    ],
    ids=["k", "dtype", "tokens", "axes"],
)
def test_what_was_not_planned_is_refused(
    hidden: torch.Tensor, ids: torch.Tensor, words: str
) -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights())
    with pytest.raises(BackendError, match=words):
        layer(hidden, ids.long(), torch.ones_like(ids))


def test_ids_that_are_no_integers_are_refused() -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights())
    ids, weights = cases.routing(2)
    with pytest.raises(BackendError, match=r"integer ids, got torch\.float32"):
        layer(torch.zeros(2, cases.HIDDEN), ids.float(), weights)


@pytest.mark.parametrize("odd", [0, 1, 2], ids=["hidden", "ids", "weights"])
def test_operands_on_another_device_are_refused(odd: int) -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights())
    operands = [torch.ones(2, cases.HIDDEN), *cases.routing(2)]
    operands[odd] = operands[odd].to("meta")
    with pytest.raises(BackendError, match=r"are on cpu, but a tensor of .* on meta"):
        layer(*operands)


def test_weights_read_expert_by_expert_are_the_same_stack() -> None:
    w13, w2 = random_weights()

    def halves(expert: int) -> tuple[BlockScaledTensor, ...]:
        one = expert_of(w13, expert)
        block = cases.INNER // 128
        return tuple(
            type(one)(data, scales, one.format, one.layout)
            for data, scales in (
                (one.data[: cases.INNER], one.scales[:block]),
                (one.data[cases.INNER :], one.scales[block:]),
            )
        )

    layer = BlockScaledExperts(cases.plan_for(), halves, lambda expert: (expert_of(w2, expert),))
    for found, wanted in ((layer.w13, w13), (layer.w2, w2)):
        assert torch.equal(found.data.view(torch.uint8), wanted.data.view(torch.uint8))
        assert torch.equal(found.scales, wanted.scales)
    assert BlockScaledExperts(cases.plan_for(), w13, w2).w13.data.data_ptr() == w13.data.data_ptr()


def test_update_expert_serves_the_new_weights_from_the_same_storages() -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights(0))
    new = random_weights(1)
    places = layer.w13.data.data_ptr(), layer.w2.scales.data_ptr()
    for expert in range(cases.EXPERTS):
        layer.update_expert(expert, [expert_of(new[0], expert)], [expert_of(new[1], expert)])
    assert (layer.w13.data.data_ptr(), layer.w2.scales.data_ptr()) == places
    hidden, (ids, weights) = torch.randn(3, cases.HIDDEN), cases.routing(3)
    fresh = BlockScaledExperts(cases.plan_for(), *new)
    assert torch.equal(layer(hidden, ids, weights), fresh(hidden, ids, weights))


def test_an_update_that_does_not_fit_changes_nothing() -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights(0))
    new = random_weights(1)
    before = layer.w13.data.view(torch.uint8).clone()
    with pytest.raises(ModelError, match="no expert 6, there are 6"):
        layer.update_expert(6, [expert_of(new[0], 0)], [expert_of(new[1], 0)])
    down = expert_of(new[1], 0)
    with pytest.raises(PlanError, match="a part of 256 rows starts at row 256"):
        layer.update_expert(0, [expert_of(new[0], 0)], [down, down])
    with pytest.raises(PlanError, match="planned with 256 rows, got 0"):
        layer.update_expert(0, [expert_of(new[0], 0)], [])
    assert torch.equal(layer.w13.data.view(torch.uint8), before)


def test_weights_that_were_not_planned_are_refused() -> None:
    w13, w2 = random_weights()
    with pytest.raises(PlanError, match="planned for 6 experts"):
        BlockScaledExperts(cases.plan_for(), expert_of(w13, 0), w2)
    with pytest.raises(PlanError, match="plan again"):
        BlockScaledExperts(cases.plan_for(fmt=FP8_128X128_UE8M0), w13, w2)
    with pytest.raises(PlanError, match="plan again"):
        BlockScaledExperts(cases.plan_for(), lambda expert: (expert_of(w2, expert),), w2)


def test_plans_of_different_sets_are_refused() -> None:
    plan = cases.plan_for()
    with pytest.raises(PlanError, match="no set of experts"):
        ExpertsPlan(plan.w2, plan.w13)
    with pytest.raises(PlanError, match="not planned together"):
        ExpertsPlan(plan.w13, cases.plan_for("reference").w2)
    with pytest.raises(PlanError, match="one dtype from end to end"):
        ExpertsPlan(plan.w13, cases.plan_for(dtype=DType.BFLOAT16).w2)


def test_a_backend_without_its_arrangement_is_refused() -> None:
    plan = cases.with_rows(cases.plan_for("cpu"), MASKED)
    with pytest.raises(BackendError, match="offers masked rows, but has no bind_masked"):
        BlockScaledExperts(plan, *random_weights())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend: str) -> None:
    layer = BlockScaledExperts(cases.plan_for(backend), *random_weights())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 5):
        hidden, (ids, weights) = torch.randn(tokens, cases.HIDDEN), cases.routing(tokens)
        assert torch.equal(compiled(hidden, ids, weights), layer(hidden, ids, weights))


def test_operator_has_a_fake_of_the_same_shape_and_dtype() -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights())
    ids, weights = cases.routing(2)
    torch.library.opcheck(
        torch.ops.blockscale.experts.default,
        (torch.randn(2, cases.HIDDEN), ids, weights, layer._handle),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_casting_and_moving_touch_no_code() -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights()).half().to("cpu")
    assert layer.w13_data.dtype is torch.float8_e4m3fn
    assert layer.w13_scales.dtype is torch.float32
    ids, weights = cases.routing(2)
    assert layer(torch.randn(2, cases.HIDDEN), ids, weights).dtype is torch.float32


def test_dropped_experts_release_their_weights() -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights())
    handle = layer._handle
    assert handle in expert_ops._BOUND
    del layer
    gc.collect()
    assert handle not in expert_ops._BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_owns_its_weights_and_outlives_the_original(backend: str) -> None:
    layer = BlockScaledExperts(cases.plan_for(backend), *random_weights(0))
    hidden, (ids, weights) = torch.randn(3, cases.HIDDEN), cases.routing(3)
    before = layer(hidden, ids, weights)
    copied = copy.deepcopy(layer)
    new = random_weights(1)
    for expert in range(cases.EXPERTS):
        layer.update_expert(expert, [expert_of(new[0], expert)], [expert_of(new[1], expert)])
    assert not torch.equal(layer(hidden, ids, weights), before)
    del layer
    gc.collect()
    assert torch.equal(copied(hidden, ids, weights), before)
    assert copied.w13_data.data_ptr() == copied.w13.data.data_ptr()


def test_a_gradient_is_refused_and_not_dropped_in_silence() -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights())
    hidden, (ids, weights) = torch.randn(3, cases.HIDDEN), cases.routing(3)
    with pytest.raises(ModelError, match="have no gradient"):
        layer(hidden.requires_grad_(), ids, weights)
    with pytest.raises(ModelError, match="have no gradient"):
        layer(hidden.detach(), ids, weights.requires_grad_())
    with torch.no_grad():
        assert not layer(hidden, ids, weights).requires_grad


def test_repr_names_shapes_format_and_backend() -> None:
    text = repr(BlockScaledExperts(cases.plan_for(), *random_weights()))
    assert "6 x (256, 384, 256), e4m3fn/128x128/fp32, cpu (M >= 0)" in text


def test_fake_tokens_give_a_fake_result() -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights())
    with FakeTensorMode() as mode:
        operands = (torch.ones(3, cases.HIDDEN), *cases.routing(3))
        result = layer(*(mode.from_tensor(operand) for operand in operands))
    assert isinstance(result, FakeTensor)
    assert result.shape == (3, cases.HIDDEN)


def test_experts_stay_on_the_kind_of_device_they_were_planned_for() -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights())
    with pytest.raises(ModelError, match="planned for cpu, not for meta"):
        layer.to("meta")


@pytest.mark.parametrize("name", ["w13_data", "w13_scales", "w2_data", "w2_scales"])
def test_what_kernels_read_cannot_be_replaced(name: str) -> None:
    layer = BlockScaledExperts(cases.plan_for(), *random_weights())
    with pytest.raises(ModelError, match=f"{name} is the memory"):
        setattr(layer, name, getattr(layer, name).clone())


def test_a_loaded_state_dict_is_what_runs() -> None:
    source = BlockScaledExperts(cases.plan_for(), *random_weights())
    layer = copy.deepcopy(source)
    layer.w13.data.view(torch.uint8).zero_()
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    operands = (torch.ones(3, cases.HIDDEN), *cases.routing(3))
    assert torch.equal(layer(*operands), source(*operands))
