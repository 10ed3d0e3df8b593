"""FlashInfer's calls against a stand-in that holds them to the documentation, without a GPU.

The stand-ins read scales as the kernels do, as memory, and refuse what FlashInfer 0.7.2 refuses.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from blockscale.backends.registry import backend_named, runnable_backend_named
from blockscale.errors import BackendError
from blockscale.formats import FP8_128X128_FP32, K_MAJOR, DType, round_up
from blockscale.modules.prepare import prepare_weight
from blockscale.planning.decision import Obstacle, Offer, Readiness
from blockscale.planning.device import Device, Proof, Verdict
from blockscale.planning.plan import Choice, LinearPlan
from blockscale.planning.planner import conversion_step, plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import cases
from blockscale.reference import dequantize
from blockscale.tensor import BlockScaledTensor

BF16, FP16 = DType.BFLOAT16, DType.FLOAT16
N, K = 384, 512
BACKENDS = [
    ("flashinfer_sm90", "sm_90", (1, 7, 31)),
    ("flashinfer_trtllm", "sm_100", (1, 4, 33)),
    ("flashinfer_cutlass", "sm_100", (1, 4, 33)),
]


def spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return scales.repeat_interleave(128, 1)[:rows, :columns]


class StandIn(ModuleType):
    """``flashinfer.gemm``: checks as documented, numbers as the kernels read memory."""

    def __init__(self) -> None:
        super().__init__("flashinfer.gemm")
        self.calls: list[int] = []

    def fp8_blockscale_gemm_sm90(
        self,
        input: torch.Tensor,  # noqa: A002 - FlashInfer's name
        weight: torch.Tensor,
        input_scale: torch.Tensor,
        weight_scale: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        (m, k), n = input.shape, weight.shape[0]
        self.calls.append(m)
        assert input.is_contiguous()
        assert weight.is_contiguous()
        assert out.shape == (m, n)
        assert out.dtype is torch.bfloat16
        if k % 128 or n % 64:
            raise ValueError
        assert input_scale.dtype is weight_scale.dtype is torch.float32
        assert weight_scale.shape == (-(-n // 128), k // 128)
        assert input_scale.shape == (m, k // 128)
        # (K blocks, M), columns padded to 16 bytes, whatever the strides say.
        columns = input_scale.as_strided((k // 128, m), (round_up(m, 4), 1)).T
        rows = weight_scale.as_strided((-(-n // 128), k // 128), (k // 128, 1))
        self.multiply(input, columns, weight, rows, out)

    def gemm_fp8_nt_groupwise(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        a_scale: torch.Tensor,
        b_scale: torch.Tensor,
        scale_major_mode: str | None,
        out: torch.Tensor,
        backend: str,
    ) -> None:
        (m, k), n = a.shape, b.shape[0]
        self.calls.append(m)
        assert scale_major_mode == {"trtllm": None, "cutlass": "MN"}[backend]
        assert m % 4 == 0
        for scale, shape in ((a_scale, (k // 128, m)), (b_scale, (k // 128, n // 128))):
            assert scale.shape == shape
            assert scale.dtype is torch.float32
            assert scale.is_contiguous()
        assert out.shape == (m, n)
        assert out.dtype in ((torch.bfloat16, torch.float16)[: 1 if backend == "trtllm" else 2])
        self.multiply(a, a_scale.T, b, b_scale.T, out)

    @staticmethod
    def multiply(
        codes: torch.Tensor,
        scales: torch.Tensor,
        weight: torch.Tensor,
        weight_scales: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        (m, k), n = codes.shape, weight.shape[0]
        left = codes.float() * spread(scales, m, k)
        right = weight.float() * spread(weight_scales.repeat_interleave(128, 0), n, k)
        out.copy_((left.double() @ right.double().T).to(out.dtype))


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Importable as ``flashinfer.gemm``."""
    package, module = ModuleType("flashinfer"), StandIn()
    package.gemm = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.gemm", module)
    return module


def proven(name: str, device: str, dtype: DType = BF16) -> Device:
    return replace(
        Device.named(device), proofs=(Proof(name, dtype, Verdict.PROVEN, "relative error 1e-3"),)
    )


def offered(name: str, device: Device, dtype: DType = BF16, n: int = N) -> Offer:
    request = LinearRequest("layer", n, K, FP8_128X128_FP32, dtype, dtype)
    answer = backend_named(name).evaluate(request, device)
    assert isinstance(answer, Offer), answer
    return answer


def prepared(name: str, offer: Offer, weight: BlockScaledTensor) -> BlockScaledTensor:
    request = LinearRequest("layer", weight.mn, weight.k, FP8_128X128_FP32, BF16, BF16)
    step = conversion_step(request, offer.weight)
    assert step.is_lossless
    choices = (Choice(offer.m_range, offer),)
    plan = LinearPlan(
        request, choices, offer.weight, step.conversion, step.is_lossless, rejected=()
    )
    return prepare_weight(plan, weight, [runnable_backend_named(name)], PlanPolicy())


@pytest.mark.parametrize(("name", "device", "tokens"), BACKENDS)
@pytest.mark.parametrize("make", [cases.fingerprint_weight, cases.integer_weight])
def test_products_are_exact_from_the_documented_memory(
    flashinfer: StandIn, name: str, device: str, tokens: tuple[int, ...], make: object
) -> None:
    backend, offer = runnable_backend_named(name), offered(name, proven(name, device))
    weight = make(N, K, FP8_128X128_FP32, "cpu")
    multiply = backend.bind(prepared(name, offer, weight), offer)
    bias = torch.arange(N).to(torch.bfloat16)
    for m in tokens:
        activation = cases.exact_activation(m, K, offer.activation, torch.bfloat16, "cpu")
        wanted = dequantize(activation).double() @ dequantize(weight).double().T
        out = torch.full((m, N), float("nan"), dtype=torch.bfloat16)
        multiply(activation, out, None)
        assert torch.equal(out, wanted.to(torch.bfloat16)), m
        multiply(activation, out, bias)
        assert torch.equal(out, wanted.to(torch.bfloat16) + bias), m
    assert flashinfer.calls


def test_cutlass_writes_float16(flashinfer: StandIn) -> None:
    name = "flashinfer_cutlass"
    offer = offered(name, proven(name, "sm_120", FP16), FP16)
    weight = cases.integer_weight(N, K, FP8_128X128_FP32, "cpu")
    multiply = runnable_backend_named(name).bind(prepared(name, offer, weight), offer)
    activation = cases.exact_activation(5, K, offer.activation, torch.float16, "cpu")
    out = torch.empty((5, N), dtype=torch.float16)
    multiply(activation, out, None)
    wanted = dequantize(activation).double() @ dequantize(weight).double().T
    assert torch.equal(out, wanted.half())
    assert flashinfer.calls == [4, 8]


def test_prepare_meets_every_m_so_that_no_forward_compiles(flashinfer: StandIn) -> None:
    """And rows that do not follow each other are copied: FlashInfer gets pointers."""
    offer = offered("flashinfer_sm90", proven("flashinfer_sm90", "sm_90"), n=192)
    wide = cases.integer_weight(192, 2 * K, FP8_128X128_FP32, "cpu")
    scales = wide.scales[:, : K // 128].contiguous()
    half = BlockScaledTensor(wide.data[:, :K], scales, FP8_128X128_FP32, K_MAJOR)
    ready = prepared("flashinfer_sm90", offer, half)
    assert flashinfer.calls == list(range(1, 32))
    assert ready.data.is_contiguous()
    assert ready.scales.is_contiguous()
    assert torch.equal(dequantize(ready), dequantize(half))


@pytest.mark.parametrize(("name", "device", "tokens"), BACKENDS)
def test_scales_in_another_order_are_refused(
    flashinfer: StandIn, name: str, device: str, tokens: tuple[int, ...]
) -> None:
    """A wrong pointer would be read without an error."""
    del tokens
    offer = offered(name, proven(name, device))
    wrong = replace(offer, weight=replace(offer.weight, layout=offer.activation.layout))
    weight = cases.integer_weight(N, K, FP8_128X128_FP32, "cpu")
    if name != "flashinfer_sm90":
        wrong = offer
    with pytest.raises(BackendError, match="was to get"):
        runnable_backend_named(name).prepare(weight, wrong)
    assert flashinfer.calls == []


def test_what_flashinfer_raises_is_one_line(
    flashinfer: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        msg = "Ninja build failed.\nmany\nlines"
        raise RuntimeError(msg)

    monkeypatch.setattr(flashinfer, "fp8_blockscale_gemm_sm90", fails)
    offer = offered("flashinfer_sm90", proven("flashinfer_sm90", "sm_90"))
    weight = cases.integer_weight(N, K, FP8_128X128_FP32, "cpu")
    with pytest.raises(BackendError, match=r"384x512 weight: Ninja build failed\. many lines"):
        prepared("flashinfer_sm90", offer, weight)
    monkeypatch.setattr(sys.modules["flashinfer"], "gemm", ModuleType("flashinfer.gemm"))
    with pytest.raises(BackendError, match=r"has no gemm\.fp8_blockscale_gemm_sm90"):
        prepared("flashinfer_sm90", offer, weight)
    monkeypatch.setitem(sys.modules, "flashinfer.gemm", None)
    with pytest.raises(BackendError, match="cannot be imported"):
        prepared("flashinfer_sm90", offer, weight)


@pytest.mark.parametrize(("name", "device", "tokens"), BACKENDS)
def test_a_real_machine_runs_it_only_once_proven(
    name: str, device: str, tokens: tuple[int, ...]
) -> None:
    del tokens
    package = ("flashinfer-python", "0.7.2")
    real = Device.named(device).with_packages(package, ("triton", "3.6.0"))
    request = LinearRequest("layer", N, K, FP8_128X128_FP32, BF16, BF16)
    policy = PlanPolicy(backends=(name, "triton"))
    known = [backend_named(name), backend_named("triton")]
    before = plan_linear(request, real, policy, known)
    (refused,) = [one for one in before.rejected if one.backend == name]
    assert refused.obstacle is Obstacle.NOT_PROVEN
    assert "doctor --probe" in refused.reason
    after = plan_linear(request, replace(real, proofs=proven(name, device).proofs), policy, known)
    runs = [choice.offer for choice in after.choices if choice.offer.backend == name]
    if name == "flashinfer_sm90":
        assert [offer.readiness for offer in runs] == [Readiness.RUNNABLE]
        assert after.backends == (name, "triton")
    else:
        assert after.backends == (name,)
