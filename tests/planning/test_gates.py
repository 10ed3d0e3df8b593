"""Each backend's gates, one fact at a time, on invented devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockscale.backends.gates import Gates
from blockscale.backends.registry import BACKENDS, backend_named
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_32X32_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    MXFP8,
    DType,
    PowerOfTwo,
    ScaleFormat,
)
from blockscale.planning.decision import (
    Evidence,
    MRange,
    Obstacle,
    Offer,
    Rejection,
)
from blockscale.planning.device import KNOWN_DEVICES, Device, Proof, Verdict
from blockscale.planning.planner import plan_experts, plan_linear
from blockscale.planning.policy import Determinism, Exactness, PlanPolicy, Proving
from blockscale.planning.request import LinearRequest, Shard, ShardStyle

BF16, FP16, FP32 = DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32
ARCHITECTURES = [device.name for device in KNOWN_DEVICES]
BY_NAME = {backend.name: backend for backend in BACKENDS}

# Which architectures each backend serves a plain bfloat16 layer on. Sources: the second
# table of docs/backends.md.
SERVES = {
    "deep_gemm": {"sm_90", "sm_100", "sm_103"},
    "flashinfer_trtllm": {"sm_100", "sm_103"},
    "gluon": {"sm_90"},
    "torch_scaled_mm": {"sm_90"},
    "sgl_cutlass": {"sm_120", "sm_121"},
    "flashinfer_cutlass": {"sm_100", "sm_103", "sm_120", "sm_121"},
    "triton": {"sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"},
    "cuda": {"sm_90"},
    "flashinfer_sm90": {"sm_90"},
    "cpu": {"cpu"},
    "reference": set(ARCHITECTURES),
}


def request(**changes: object) -> LinearRequest:
    plain = LinearRequest("layer", 4096, 4096, FP8_128X128_FP32, BF16, BF16, PowerOfTwo.YES)
    return replace(plain, **{"parts": (), **changes})


def obstacles(backend: str, asked: LinearRequest, device: str | Device) -> set[Obstacle]:
    on = Device.named(device) if isinstance(device, str) else device
    answer = BY_NAME[backend].evaluate(asked, on)
    return set() if isinstance(answer, Offer) else {rejection.obstacle for rejection in answer}


def test_the_table_names_every_backend() -> None:
    assert set(SERVES) == set(BY_NAME)
    for name in SERVES:
        assert backend_named(name).name == name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", SERVES)
def test_architectures(backend: str, architecture: str) -> None:
    found = obstacles(backend, request(), architecture)
    assert (found == set()) == (architecture in SERVES[backend])
    if architecture not in SERVES[backend] and backend != "torch_scaled_mm":
        assert Obstacle.ARCHITECTURE in found


# (backend, device, changes, obstacle): every line is a documented gate.
GATES = [
    ("deep_gemm", "sm_90", {"out_dtype": FP16}, Obstacle.OUT_DTYPE),
    ("deep_gemm", "sm_100", {"out_dtype": FP16}, Obstacle.OUT_DTYPE),
    ("deep_gemm", "sm_90", {"n": 4128}, Obstacle.ALIGNMENT),
    ("deep_gemm", "sm_90", {"k": 4160}, Obstacle.ALIGNMENT),
    ("deep_gemm", "sm_90", {"format": FP8_32X32_UE8M0}, Obstacle.BLOCK_SHAPE),
    ("flashinfer_trtllm", "sm_100", {"out_dtype": FP16}, Obstacle.OUT_DTYPE),
    ("flashinfer_trtllm", "sm_100", {"k": 128}, Obstacle.ALIGNMENT),
    ("flashinfer_trtllm", "sm_100", {"n": 576}, Obstacle.ALIGNMENT),
    ("flashinfer_trtllm", "sm_100", {"experts": 8}, Obstacle.GROUPING),
    ("flashinfer_cutlass", "sm_120", {"out_dtype": FP32}, Obstacle.OUT_DTYPE),
    ("flashinfer_cutlass", "sm_120", {"n": 2112}, Obstacle.ALIGNMENT),
    ("flashinfer_sm90", "sm_90", {"n": 100}, Obstacle.ALIGNMENT),
    ("gluon", "sm_90", {"k": 4100}, Obstacle.ALIGNMENT),
    ("gluon", "sm_90", {"format": MXFP8}, Obstacle.BLOCK_SHAPE),
    ("cuda", "sm_90", {"k": 4100}, Obstacle.ALIGNMENT),
    ("cuda", "sm_90", {"format": MXFP8}, Obstacle.BLOCK_SHAPE),
    ("cuda", "sm_90", {"experts": 8, "has_bias": True}, Obstacle.GROUPING),
    ("torch_scaled_mm", "sm_90", {"n": 4104}, Obstacle.ALIGNMENT),
    ("torch_scaled_mm", "sm_90", {"k": 576}, Obstacle.ALIGNMENT),
    ("torch_scaled_mm", "sm_100", {}, Obstacle.SCALE_FORMAT),
    ("sgl_cutlass", "sm_120", {"out_dtype": FP32}, Obstacle.OUT_DTYPE),
    ("triton", "sm_90", {"format": FP8_1X128_FP32}, Obstacle.BLOCK_SHAPE),
    ("cpu", "cpu", {"out_dtype": FP32}, Obstacle.OUT_DTYPE),
]


@pytest.mark.parametrize(("backend", "device", "changes", "obstacle"), GATES)
def test_gate_refuses(
    backend: str, device: str, changes: dict[str, object], obstacle: Obstacle
) -> None:
    assert obstacle in obstacles(backend, request(**changes), device)


# What must *not* be refused: gates copied too wide cost users their fastest kernel.
OFFERS = [
    ("deep_gemm", "sm_90", {"n": 576, "k": 7168}),
    ("deep_gemm", "sm_90", {"n": 2112, "parts": (1536, 576)}),
    ("deep_gemm", "sm_90", {"experts": 32}),
    ("flashinfer_cutlass", "sm_100", {"out_dtype": FP16}),
    ("gluon", "sm_90", {"out_dtype": FP16, "n": 200, "k": 592}),
    ("gluon", "sm_90", {"out_dtype": FP32, "n": 4100}),
    ("cuda", "sm_90", {"out_dtype": FP16, "n": 200, "k": 592}),
    ("cuda", "sm_90", {"out_dtype": FP32, "n": 4100}),
    ("cuda", "sm_90", {"experts": 256}),
    ("torch_scaled_mm", "sm_90", {"out_dtype": FP16, "k": 2304}),
    ("torch_scaled_mm", "sm_100", {"format": MXFP8}),
    ("torch_scaled_mm", "sm_100", {"format": FP8_128X128_UE8M0}),
    ("triton", "sm_89", {"n": 77, "k": 333, "out_dtype": FP16}),
    ("cpu", "cpu", {"n": 77, "k": 333, "format": FP8_32X32_UE8M0}),
]


@pytest.mark.parametrize(("backend", "device", "changes"), OFFERS)
def test_gate_lets_pass(backend: str, device: str, changes: dict[str, object]) -> None:
    assert obstacles(backend, request(**changes), device) == set()


def test_all_reasons_are_collected_not_the_first() -> None:
    found = obstacles("deep_gemm", request(n=100, k=100, out_dtype=FP16), "sm_120")
    assert found >= {Obstacle.ARCHITECTURE, Obstacle.OUT_DTYPE, Obstacle.ALIGNMENT}


def test_every_offer_states_forms_that_can_hold_their_scales() -> None:
    for device in KNOWN_DEVICES:
        for fmt in (FP8_128X128_FP32, FP8_128X128_UE8M0, MXFP8):
            for backend in BACKENDS:
                answer = backend.evaluate(request(format=fmt), device)
                if isinstance(answer, Offer):
                    for form in (answer.weight, answer.activation):
                        if form is not None:
                            form.layout.stored(128, 256, form.format)


def collected(asked: LinearRequest, device: Device, policy: PlanPolicy) -> list[Rejection]:
    return list(plan_linear(asked, device, policy, BACKENDS).rejected)


class _Picky:
    """An invented backend: serves few tokens, on another prepared weight, in no fixed order."""

    name = "picky"

    def evaluate(self, asked: LinearRequest, device: Device) -> Offer:
        weight = BY_NAME["torch_scaled_mm"].evaluate(asked, Device.named("sm_90"))
        assert isinstance(weight, Offer)
        assert not device.is_cpu
        return Offer(
            self.name, weight.weight, weight.activation, MRange(1, 16), is_deterministic=False
        )


class _QuantizesInside:
    """An invented backend: its kernel reads float activations of one type."""

    name = "quantizes_inside"

    def evaluate(self, asked: LinearRequest, device: Device) -> list[Rejection]:
        gates = Gates(self.name, asked, device)
        gates.activation_dtypes((BF16,), "it quantizes inside")
        return gates.rejections


def test_every_obstacle_occurs() -> None:
    """No member of the enum is dead: each is found in some plan."""
    h200 = Device.named("sm_90")
    b200, rtx_pro = Device.named("sm_100"), Device.named("sm_120")
    bare = h200.with_packages(("torch", "2.11.0"))
    old = replace(h200, cuda=(12, 0))
    failed = replace(h200, proofs=(Proof("gluon", BF16, Verdict.FAILED, "wrong by 12 %"),))
    split = Shard(ShardStyle.ROW, 8, ("192 columns per rank are 1.5 blocks of 128",))
    exact, lossy = PlanPolicy(), PlanPolicy(exactness=Exactness.ALLOW_LOSSY)
    seen = [
        *collected(request(out_dtype=FP16, k=100), h200, exact),
        *collected(request(), bare, exact),
        *collected(request(), old, exact),
        *collected(request(experts=8, format=MXFP8), h200, exact),
        *collected(request(power_of_two=PowerOfTwo.UNKNOWN), b200, exact),
        *collected(request(power_of_two=PowerOfTwo.NO), b200, exact),
        *collected(request(k=192, shard=split), h200, lossy),
        *collected(request(), failed, exact),
        *collected(request(), h200, PlanPolicy(backends=("triton",))),
        *collected(request(), h200, PlanPolicy(proving=Proving.REQUIRED)),
        *collected(request(), h200, PlanPolicy(backends=("flashinfer_sm90",))),
        *collected(request(), rtx_pro.with_packages(("sgl-kernel", "0.3.0")), exact),
    ]
    seen += plan_linear(request(), h200, PlanPolicy(), [_Picky(), BY_NAME["triton"]]).rejected
    half = request(activation_dtype=FP16)
    seen += plan_linear(half, h200, PlanPolicy(), [_QuantizesInside(), BY_NAME["triton"]]).rejected
    seen += plan_linear(
        request(), h200, PlanPolicy(determinism=Determinism.REQUIRED), [_Picky()]
    ).rejected
    # One weight of the set has 1000 columns, which DeepGEMM refuses: it gets neither.
    one, other = request(experts=8), request(experts=8, k=1000)
    seen += plan_experts([one, other], h200, PlanPolicy(), BACKENDS)[0].rejected
    assert set(Obstacle) == {rejection.obstacle for rejection in seen}


def test_trtllm_takes_fp16_only_where_the_probe_proved_it() -> None:
    b200 = Device.named("sm_100")
    proven = replace(b200, proofs=(Proof("flashinfer_trtllm", FP16, Verdict.PROVEN, "ok"),))
    asked = request(out_dtype=FP16, activation_dtype=FP16)
    assert Obstacle.OUT_DTYPE in obstacles("flashinfer_trtllm", asked, b200)
    assert obstacles("flashinfer_trtllm", asked, proven) == set()


def test_a_proof_becomes_evidence() -> None:
    proven = replace(Device.named("sm_90"), proofs=(Proof("triton", BF16, Verdict.PROVEN, "1e-3"),))
    plan = plan_linear(request(), proven, PlanPolicy(backends=("triton",)), BACKENDS)
    assert plan.choices[0].offer.evidence is Evidence.PROVEN


def test_ragged_merged_parts_are_refused_unless_last() -> None:
    ragged_first = request(n=960, parts=(576, 192, 192))
    assert Obstacle.ALIGNMENT in obstacles("triton", ragged_first, "sm_90")
    assert obstacles("triton", request(n=2112, parts=(1536, 576)), "sm_90") == set()


def test_bf16_scales_are_read() -> None:
    fmt = FP8_128X128_FP32.with_scale(ScaleFormat.BF16)
    plan = plan_linear(request(format=fmt), Device.named("sm_90"), PlanPolicy(), BACKENDS)
    assert plan.is_servable
    assert plan.is_lossless
