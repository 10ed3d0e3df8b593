"""``publish`` and ``update``: one rounding, all or nothing, the same storages."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from blockscale.backends.registry import BACKENDS
from blockscale.errors import ModelError
from blockscale.formats import (
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    BlockFormat,
    DType,
    PowerOfTwo,
    ScaleFormat,
)
from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.linear import BlockScaledLinear
from blockscale.modules.weight_sync import publish, update
from blockscale.planning.device import Device
from blockscale.planning.expert_sets import experts_plan
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.reference import dequantize, quantize, relayout, requantize

if TYPE_CHECKING:
    from blockscale.planning.contract import Contract
    from blockscale.planning.plan import ModelPlan

N, K = 192, 320
NAMES = ("layers.0.o_proj", "layers.1.o_proj")
X = torch.randn(3, K, generator=torch.Generator().manual_seed(11))


def plan_for(
    backend: str = "cpu", fmt: BlockFormat = FP8_128X128_FP32, *, has_bias: bool = True
) -> ModelPlan:
    known = PowerOfTwo.YES if fmt.scale is ScaleFormat.UE8M0 else PowerOfTwo.UNKNOWN
    requests = [
        LinearRequest(name, N, K, fmt, DType.FLOAT32, DType.FLOAT32, known, has_bias=has_bias)
        for name in NAMES
    ]
    return plan_model(requests, Device.named("cpu"), PlanPolicy(backends=(backend,)), BACKENDS)


def masters(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {"norm.weight": torch.ones(K)}
    for name in NAMES:
        found[f"{name}.weight"] = torch.randn(N, K, generator=generator).to(torch.bfloat16)
        found[f"{name}.bias"] = torch.randn(N, generator=generator).to(torch.bfloat16)
    return found


def model_of(plan: ModelPlan, seed: int = 0) -> nn.Sequential:
    values = masters(seed)
    layers = []
    for layer in plan.layers:
        weight = quantize(values[f"{layer.name}.weight"], layer.request.format)
        bias = values[f"{layer.name}.bias"] if layer.request.has_bias else None
        layers.append(BlockScaledLinear(layer, weight, bias))
    return nn.Sequential(*layers)


def answers(model: nn.Sequential) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [layer(X) for layer in model]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("fmt", [FP8_128X128_FP32, FP8_128X128_UE8M0], ids=str)
def test_an_updated_model_is_the_model_of_the_new_masters(backend: str, fmt: BlockFormat) -> None:
    plan = plan_for(backend, fmt)
    model = model_of(plan)
    places = [(m.data.data_ptr(), m.scales.data_ptr(), m.bias.data_ptr()) for m in model]
    result = update(model, publish(plan.contract(), masters(1)))
    assert (result.layers, result.untouched) == (NAMES, ())
    assert places == [(m.data.data_ptr(), m.scales.data_ptr(), m.bias.data_ptr()) for m in model]
    assert same(answers(model), answers(model_of(plan, seed=1)))


def test_updates_can_be_repeated_and_come_in_buckets() -> None:
    plan = plan_for()
    contract, model = plan.contract(), model_of(plan)
    for seed in (1, 2, 1):
        for name in NAMES:
            part = {k: v for k, v in masters(seed).items() if k.startswith(name)}
            result = update(model, publish(contract, part))
            assert result.layers == (name,)
            assert result.untouched == tuple(other for other in NAMES if other != name)
        assert same(answers(model), answers(model_of(plan, seed)))
    assert [layer.updates for layer in model] == [3, 3]


def test_threads_take_turns() -> None:
    plan = plan_for()
    contract, model = plan.contract(), model_of(plan)
    sent = {seed: publish(contract, masters(seed)) for seed in (1, 2)}
    threads = [threading.Thread(target=update, args=(model, sent[s])) for s in (1, 2) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [answers(model_of(plan, seed)) for seed in (1, 2)]
    assert any(same(answers(model), one) for one in wanted)


def test_masters_are_rounded_once() -> None:
    """Where the engine multiplies UE8M0, sending the checkpoint's FP32 form would round twice."""
    lossy = PlanPolicy(backends=("deep_gemm",), exactness=Exactness.ALLOW_LOSSY)
    request = LinearRequest(
        "layer", 256, 256, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16, PowerOfTwo.NO
    )
    plan = plan_model([request], Device.named("sm_100"), lossy, BACKENDS)
    form = plan.layers[0].weight
    assert form is not None
    assert form.format == FP8_128X128_UE8M0
    master = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    sent = publish(plan.contract(), {"layer.weight": master})
    once = relayout(quantize(master, FP8_128X128_UE8M0), form.layout)
    assert torch.equal(sent["layer.weight"].view(torch.uint8), once.data.view(torch.uint8))
    assert torch.equal(sent["layer.weight_scale"], once.scales)
    twice = requantize(quantize(master, FP8_128X128_FP32), FP8_128X128_UE8M0).tensor

    def error(tensor: object) -> float:
        return float((dequantize(tensor) - master).norm() / master.norm())  # type: ignore[arg-type]

    assert error(once) < 0.9 * error(twice)


SCALES = {"NaN scale": float("nan"), "infinite scale": float("inf"), "1.5": 1.5}


def broken(contract: Contract, how: str) -> dict[str, torch.Tensor]:
    """A message whose *last* layer is wrong: the first must not be taken either."""
    sent = publish(contract, masters(1))
    name = NAMES[-1]
    codes, scales = sent[f"{name}.weight"], sent[f"{name}.weight_scale"]
    if how == "shape":
        sent[f"{name}.weight"] = codes[:-1].contiguous()
    elif how == "dtype":
        sent[f"{name}.weight"] = codes.float()
    elif how == "scale dtype":
        sent[f"{name}.weight_scale"] = scales.to(torch.bfloat16)
    elif how == "scale shape":
        sent[f"{name}.weight_scale"] = scales[:, :1].contiguous()
    elif how == "half a layer":
        del sent[f"{name}.weight_scale"]
    elif how == "no bias":
        del sent[f"{name}.bias"]
    elif how == "unknown":
        sent["layers.9.o_proj.weight"] = codes
    elif how == "NaN code":
        codes.view(torch.uint8)[3, 5] = 0x7F
    elif how == "NaN bias":
        sent[f"{name}.bias"][7] = float("nan")
    else:
        scales[0, 0] = SCALES[how]
    return sent


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("shape", r"layers\.1\.o_proj\.weight: has shape \(191, 320\), wanted \(192, 320\)"),
        ("dtype", r"layers\.1\.o_proj\.weight: is torch\.float32, wanted torch\.float8_e4m3fn"),
        ("scale dtype", "weight_scale: is torch.bfloat16, wanted torch.float32"),
        ("scale shape", r"weight_scale: has shape \(2, 1\), wanted \(2, 3\)"),
        ("half a layer", "weight_scale: missing"),
        ("no bias", "bias: missing"),
        ("unknown", r"layers\.9\.o_proj\.weight: no planned layer wants it"),
        ("NaN code", r"layers\.1\.o_proj: the codes hold NaN"),
        ("NaN scale", r"layers\.1\.o_proj: the scales hold NaN or infinity"),
        ("infinite scale", "the scales hold NaN or infinity"),
        ("NaN bias", r"layers\.1\.o_proj: its bias holds NaN"),
    ],
)
def test_a_wrong_message_is_refused_and_changes_nothing(
    how: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_for()
    model = model_of(plan)
    before = answers(model)
    with caplog.at_level(logging.INFO, "blockscale"), pytest.raises(ModelError, match=reason):
        update(model, broken(plan.contract(), how))
    assert same(answers(model), before)
    assert [layer.updates for layer in model] == [0, 0]
    (record,) = [r for r in caplog.records if r.name == "blockscale.update"]
    assert record.levelname == "WARNING"
    assert len(record.blockscale["refused"]) == 1  # type: ignore[attr-defined]  # the extra field
    update(model, publish(plan.contract(), masters(1)))
    assert same(answers(model), answers(model_of(plan, seed=1)))


def test_layers_of_one_name_are_refused_and_one_layer_in_two_places_is_not() -> None:
    plan = plan_for()
    model, sent = model_of(plan), publish(plan.contract(), masters(1))
    twice = nn.Sequential(model, model)
    assert update(twice, sent).layers == NAMES
    with pytest.raises(ModelError, match=r"two layers .* planned as 'layers\.0\.o_proj'"):
        update(nn.Sequential(model, model_of(plan)), sent)


def test_every_reason_is_collected(caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_for()
    sent = {name: tensor.double() for name, tensor in publish(plan.contract(), masters(1)).items()}
    with (
        caplog.at_level(logging.INFO, "blockscale"),
        pytest.raises(ModelError, match="and 3 more"),
    ):
        update(model_of(plan), sent)
    assert len(caplog.records[-1].blockscale["refused"]) == 6  # type: ignore[attr-defined]  # as above


def test_scales_that_the_checkpoint_could_not_hold_are_refused() -> None:
    """The CPU kernel reads UE8M0 scales as float32; 1.5 would run, but could not be saved."""
    plan = plan_for("cpu", FP8_128X128_UE8M0)
    model = model_of(plan)
    before = answers(model)
    with pytest.raises(ModelError, match=r"layers\.1\.o_proj: .* not powers of two"):
        update(model, broken(plan.contract(), "1.5"))
    assert same(answers(model), before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers.0.o_proj.weight": torch.zeros(3, 3)}, r"has shape \(3, 3\)"),
        ({"layers.0.o_proj.weight": torch.full((N, K), float("nan"))}, "NaN or infinity"),
        ({"layers.0.o_proj.weight": torch.full((N, K), float("inf"))}, "NaN or infinity"),
        ({"layers.0.o_proj.bias": torch.full((N,), float("nan"))}, "its bias holds NaN"),
        ({"layers.0.o_proj.bias": None}, "wants a bias"),
        ({"layers.0.o_proj.weight": None}, "its bias came without its weight"),
    ],
)
def test_masters_that_do_not_fit_are_not_published(
    change: dict[str, torch.Tensor | None], reason: str
) -> None:
    values = {**masters(0), **change}
    with pytest.raises(ModelError, match=reason):
        publish(plan_for().contract(), {k: v for k, v in values.items() if v is not None})


def test_stacks_of_experts_take_new_weights() -> None:
    requests = [
        LinearRequest(
            name,
            n,
            k,
            FP8_128X128_FP32,
            DType.FLOAT32,
            DType.FLOAT32,
            PowerOfTwo.UNKNOWN,
            experts=3,
        )
        for name, n, k in (("experts.w13", 256, 256), ("experts.w2", 256, 128))
    ]
    plan = plan_model(requests, Device.named("cpu"), PlanPolicy(backends=("cpu",)), BACKENDS)

    def values(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {f"{r.name}.weight": torch.randn(3, r.n, r.k, generator=generator) for r in requests}

    def experts_of(seed: int) -> BlockScaledExperts:
        w13, w2 = (quantize(value, FP8_128X128_FP32) for value in values(seed).values())
        return BlockScaledExperts(experts_plan(plan, "experts"), w13, w2)

    hidden = torch.randn(5, 256, generator=torch.Generator().manual_seed(4))
    ids, weights = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]]), torch.full((5, 2), 0.5)
    model = experts_of(0)
    result = update(model, publish(plan.contract(), values(1)))
    assert result.layers == ("experts.w13", "experts.w2")
    assert torch.equal(model(hidden, ids, weights), experts_of(1)(hidden, ids, weights))
    assert model.updates == 2, "each stack came once"
    form = model.w13
    with pytest.raises(ModelError, match=r"not 'experts\.w2' as"):
        model.take("experts.w2", form)
    with pytest.raises(ModelError, match="not 'another' as"):
        model.take("another", form)
