"""What each backend wants its operands to be: format and scale layout, by architecture.

Letters are those of ``formats/layout.py``. Forms are compared as shapes, strides and dtypes in
memory too, so that renaming a layout cannot hide a change.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockscale.backends.registry import BACKENDS, backend_named
from blockscale.formats import (
    FP8_32X32_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    MXFP8,
    BlockFormat,
    DType,
    PowerOfTwo,
    ScaleFormat,
)
from blockscale.planning.decision import Offer, OperandForm
from blockscale.planning.device import KNOWN_DEVICES, Device, Proof, Verdict
from blockscale.planning.planner import conversion_step
from blockscale.planning.request import LinearRequest

BF16, FP16 = DType.BFLOAT16, DType.FLOAT16

# One GEMM with N = 640 and K = 1152 (9 K blocks, so that every padding shows) and M = 130 rows.
N, K, M = 640, 1152, 130

# (backend, architectures): weight and activation as (scale, layout), None where it takes floats.
WF32, AF32R = ("fp32", "k_major"), ("fp32", "k_major")
WPK = ("ue8m0", "mn_major_tma_aligned_packed_per_row")
APK = ("ue8m0", "mn_major_tma_aligned_packed")
AF32T, AF32C = ("fp32", "mn_major_tma_aligned"), ("fp32", "mn_major")
WKM = AKM = ("fp32", "k_by_mn")
WCT, AF32CP = ("fp32", "k_major_transposed"), ("fp32", "mn_major_padded")
L4 = ("fp32", "k_major_padded_transposed")
SWIZZLED = ("ue8m0", "swizzled_32_4_4")
FORMS = [
    ("deep_gemm", ("sm_90",), WF32, AF32T),
    ("deep_gemm", ("sm_100", "sm_103"), WPK, APK),
    ("flashinfer_trtllm", ("sm_100", "sm_103"), WKM, AKM),
    ("flashinfer_cutlass", ("sm_100", "sm_103", "sm_120", "sm_121"), WKM, AKM),
    ("flashinfer_sm90", ("sm_90",), WF32, AF32T),
    ("gluon", ("sm_90",), WF32, AF32T),
    ("cuda", ("sm_90",), WF32, AF32T),
    ("sgl_cutlass", ("sm_120", "sm_121"), WCT, AF32CP),
    ("torch_scaled_mm", ("sm_90",), L4, AF32T),
    ("triton", ("sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"), WF32, AF32T),
    ("cpu", ("cpu",), WF32, None),
    ("reference", tuple(device.name for device in KNOWN_DEVICES), WF32, AF32R),
]
CASES = [(name, arch, w, a) for name, archs, w, a in FORMS for arch in archs]

# Shape and strides of the stored scales, worked out by hand from the providers' contracts.
STORED_WEIGHT = {
    "k_major": ((5, 9), (9, 1), "float32"),
    "mn_major_tma_aligned_packed_per_row": ((640, 3), (1, 640), "int32"),
    "k_by_mn": ((9, 5), (5, 1), "float32"),
    "k_major_transposed": ((9, 5), (1, 9), "float32"),
    "k_major_padded_transposed": ((12, 5), (1, 12), "float32"),
}
STORED_ACTIVATION = {
    "k_major": ((130, 9), (9, 1), "float32"),
    "mn_major": ((130, 9), (1, 130), "float32"),
    "mn_major_tma_aligned": ((130, 9), (1, 132), "float32"),
    "mn_major_tma_aligned_packed": ((130, 3), (1, 132), "int32"),
    "k_by_mn": ((9, 130), (130, 1), "float32"),
    "mn_major_padded": ((132, 9), (1, 132), "float32"),
}


def request(**changes: object) -> LinearRequest:
    plain = LinearRequest("layer", N, K, FP8_128X128_FP32, BF16, BF16, PowerOfTwo.YES)
    return replace(plain, **{"parts": (), **changes})


def offer(backend: str, asked: LinearRequest, device: Device) -> Offer:
    answer = backend_named(backend).evaluate(asked, device)
    assert isinstance(answer, Offer), answer
    return answer


def words(form: OperandForm | None) -> tuple[str, str] | None:
    return None if form is None else (form.format.scale.value, form.layout.name)


def in_memory(form: OperandForm, mn: int) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    stored = form.layout.stored(mn, K, form.format)
    return stored.shape, stored.strides, stored.dtype.value


@pytest.mark.parametrize(("backend", "architecture", "weight", "activation"), CASES)
def test_operands_are_wanted_as_the_provider_reads_them(
    backend: str,
    architecture: str,
    weight: tuple[str, str],
    activation: tuple[str, str] | None,
) -> None:
    found = offer(backend, request(), Device.named(architecture))
    assert words(found.weight) == weight
    assert words(found.activation) == activation
    assert str(found.weight.format.block) == "128x128"
    assert in_memory(found.weight, N) == STORED_WEIGHT[weight[1]]
    if activation is not None:
        assert found.activation is not None
        assert str(found.activation.format.block) == "1x128"
        assert in_memory(found.activation, M) == STORED_ACTIVATION[activation[1]]


def test_the_table_has_every_offer_there_is() -> None:
    made = {
        (backend.name, device.name)
        for backend in BACKENDS
        for device in KNOWN_DEVICES
        if isinstance(backend.evaluate(request(), device), Offer)
    }
    assert {(name, architecture) for name, architecture, _, _ in CASES} == made


@pytest.mark.parametrize("architecture", ["sm_100", "sm_103"])
@pytest.mark.parametrize("fmt", [MXFP8, FP8_32X32_UE8M0, FP8_128X128_UE8M0], ids=str)
def test_cublaslt_on_blackwell_serves_ue8m0_blocks_as_mxfp8_without_loss(
    fmt: BlockFormat, architecture: str
) -> None:
    asked = request(format=fmt)
    found = offer("torch_scaled_mm", asked, Device.named(architecture))
    assert words(found.weight) == words(found.activation) == SWIZZLED
    assert found.weight.format == MXFP8
    # 128-row tiles of 4 columns: 640 rows by 36 blocks of 32.
    assert in_memory(found.weight, N) == ((640 * 36,), (1,), "float8_e8m0fnu")
    assert conversion_step(asked, found.weight).is_lossless is True


@pytest.mark.parametrize("fmt", [FP8_128X128_UE8M0, FP8_32X32_UE8M0, MXFP8], ids=str)
def test_the_reference_keeps_the_checkpoints_format(fmt: BlockFormat) -> None:
    found = offer("reference", request(format=fmt), Device.named("cpu"))
    assert found.weight == OperandForm(fmt, K_MAJOR)
    assert found.activation is not None
    assert found.activation.format.scale is fmt.scale
    assert found.activation.format.block.k == fmt.block.k


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "deep_gemm", "torch_scaled_mm"])
def test_bfloat16_scales_are_restated_never_produced(backend: str) -> None:
    asked = request(format=FP8_128X128_FP32.with_scale(ScaleFormat.BF16))
    device = Device.named("cpu" if backend == "cpu" else "sm_90")
    found = offer(backend, asked, device)
    assert found.weight.format.scale is ScaleFormat.FP32
    assert conversion_step(asked, found.weight).is_lossless is True


def test_few_tokens_only_where_the_provider_is_slow_or_crashes_beyond() -> None:
    """fp8_blockscale_gemm_sm90 crashes at M = 0 and is slower from 32 on (SGLang #32843)."""
    bounded = {
        backend.name: str(answer.m_range)
        for backend in BACKENDS
        for device in KNOWN_DEVICES
        if isinstance(answer := backend.evaluate(request(), device), Offer)
        and not answer.m_range.is_unbounded
    }
    assert bounded == {"flashinfer_sm90": "1 <= M <= 31"}


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("flashinfer_trtllm", "sm_100"),
        ("flashinfer_cutlass", "sm_120"),
        ("flashinfer_sm90", "sm_90"),
    ],
)
def test_a_dispute_is_noted_until_the_probe_has_settled_it(backend: str, device: str) -> None:
    open_question = Device.named(device)
    proofs = tuple(
        Proof(backend, dtype, Verdict.PROVEN, "relative error 1e-3") for dtype in (BF16, FP16)
    )
    assert any("unproven here" in note for note in offer(backend, request(), open_question).notes)
    settled = offer(backend, request(), replace(open_question, proofs=proofs))
    assert not any("unproven" in note for note in settled.notes)


@pytest.mark.parametrize("backend", ["deep_gemm", "torch_scaled_mm", "flashinfer_sm90"])
def test_a_bias_the_kernel_does_not_add_is_noted(backend: str) -> None:
    h200 = Device.named("sm_90")
    note = "the bias is added by a second kernel"
    assert note in offer(backend, request(has_bias=True), h200).notes
    assert note not in offer(backend, request(), h200).notes
