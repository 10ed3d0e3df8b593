"""What an engine wants to receive, as plain values and JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.errors import FormatError, PlanError
from blockscale.formats import FP8_128X128_FP32, FP8_128X128_UE8M0, DType, PowerOfTwo
from blockscale.planning.contract import Role, contract_of, contract_of_json
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest

DENSE = LinearRequest(
    "model.o_proj", 512, 1024, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16, has_bias=True
)
UE8M0 = replace(DENSE, format=FP8_128X128_UE8M0, power_of_two=PowerOfTwo.YES)


def test_dense_layers_as_the_checkpoint_has_them() -> None:
    plan = plan_model([DENSE], Device.named("sm_90"), PlanPolicy(backends=("triton",)), BACKENDS)
    (layer,) = plan.contract().document()["layers"]
    assert layer == {
        "name": "model.o_proj",
        "n": 512,
        "k": 1024,
        "experts": None,
        "parts": [512],
        "quantize_to": "e4m3fn/128x128/fp32",
        "format": "e4m3fn/128x128/fp32",
        "scale_layout": "k_major",
        "tensors": [
            {
                "name": "model.o_proj.weight",
                "role": "codes",
                "shape": [512, 1024],
                "dtype": "float8_e4m3fn",
            },
            {
                "name": "model.o_proj.weight_scale",
                "role": "scales",
                "shape": [4, 8],
                "dtype": "float32",
            },
            {"name": "model.o_proj.bias", "role": "bias", "shape": [512], "dtype": "bfloat16"},
        ],
    }


def test_packed_scales_are_asked_for_packed() -> None:
    """DeepGEMM on SM100 reads four exponents in one int32, a row of them for every row of N."""
    policy = PlanPolicy(backends=("deep_gemm",))
    plan = plan_model([replace(UE8M0, has_bias=False)], Device.named("sm_100"), policy, BACKENDS)
    (layer,) = plan.contract().layers
    scales = layer.tensor(Role.SCALES)
    assert scales is not None
    assert (scales.dtype, scales.shape) == ("int32", (512, 2))
    assert layer.format == "e4m3fn/128x128/ue8m0"
    assert layer.tensor(Role.BIAS) is None


def test_experts_are_stacked() -> None:
    experts = replace(DENSE, name="experts.w13", experts=8, has_bias=False)
    plan = plan_model([experts], Device.named("sm_90"), PlanPolicy(), BACKENDS)
    (layer,) = plan.contract().layers
    assert layer.master_shape == (8, 512, 1024)
    assert {t.shape[0] for t in layer.tensors} == {8}


@pytest.mark.parametrize("device", ["cpu", "sm_90", "sm_100", "sm_120"])
def test_json_goes_both_ways(device: str) -> None:
    requests = [replace(DENSE, has_bias=False), replace(UE8M0, name="other", has_bias=False)]
    plan = plan_model(requests, Device.named(device), PlanPolicy(), BACKENDS)
    contract = plan.contract()
    again = contract_of_json(json.dumps(json.loads(contract.to_json())))
    assert again == contract
    assert again.digest == contract.digest
    for layer in again.layers:
        stored = layer.layout.stored(layer.n, layer.k, layer.block_format)
        scales = layer.tensor(Role.SCALES)
        assert scales is not None
        assert prod(scales.shape) <= stored.elements


def test_another_want_has_another_digest() -> None:
    digests = set()
    for request in (DENSE, replace(DENSE, n=640, parts=()), replace(DENSE, has_bias=False)):
        plan = plan_model([request], Device.named("cpu"), PlanPolicy(), BACKENDS)
        digests.add(plan.contract().digest)
    assert len(digests) == 3


def test_a_layer_without_backend_wants_nothing() -> None:
    plan = plan_model([DENSE], Device.named("cpu"), PlanPolicy(backends=("gluon",)), BACKENDS)
    with pytest.raises(PlanError, match=r"model\.o_proj"):
        contract_of(plan)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not a contract"),
        ('{"schema":1}', "layers"),
        ('{"schema":1,"layers":[],"x":1}', "unknown field"),
        ('{"schema":2,"layers":[]}', "schema 2"),
    ],
)
def test_what_is_no_contract_is_refused(text: str, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        contract_of_json(text)
