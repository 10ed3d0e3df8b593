"""DeepGEMM (deepseek-ai/DeepGEMM; wheels: sgl-deep-gemm), JIT-compiled Hopper and Blackwell GEMMs.

Architectures: SM90, SM100, SM103. Blocks: weights 128x128, activations 1x128. Output: bfloat16.
SM90 reads float32 scales: weights as stored, activations MN-major and TMA-aligned.
SM100 reads UE8M0 packed four to an int32, weights with one scale per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.backends.gates import Gates, bias_notes
from blockscale.errors import BackendError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW,
    BlockShape,
    DType,
)
from blockscale.planning.decision import (
    Arrangement,
    Evidence,
    GroupedRows,
    MRange,
    Offer,
    OperandForm,
    Readiness,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    import torch

    from blockscale.backends.base import Multiply, MultiplyContiguous, MultiplyMasked
    from blockscale.planning.decision import Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

PACKAGE = "sgl-deep-gemm"

# csrc/apis/layout.hpp: default recipe by architecture (upstream 54e2261).
_FP32_FORMS = (
    OperandForm(FP8_128X128_FP32, K_MAJOR),
    OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
)
_PACKED_FORMS = (
    OperandForm(FP8_128X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW),
    OperandForm(FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED),
)
FORMS = {(9, 0): _FP32_FORMS, (10, 0): _PACKED_FORMS, (10, 3): _PACKED_FORMS}

# Upstream 54e2261 dispatches on architectures 9 and 10 only.
MISSING = {
    (11, 0): "upstream has no kernel for it",
    (12, 0): "only forks have it, with differing ABIs; upstream raises 'Unknown SF transformation'",
    (12, 1): "only forks have it, with differing ABIs; upstream raises 'Unknown SF transformation'",
}

# README: CUDA 12.3 for SM90, 12.9 for SM100.
CUDA = {(9, 0): (12, 3), (10, 0): (12, 9), (10, 3): (12, 9)}

# SGLang's and vLLM's gate. On an H200, 0.1.5 computed N = 192, 200 and K = 1088, 960 correctly
# (benchmarks/gate_facts.py, 2026-11-23); other versions and SM100 were not asked, so it stands.
N_MULTIPLE, K_MULTIPLE = 64, 128

# N and K as constants of the compiled kernel. The wheel's own default leaves them to run time, with
# less unrolling.
COMPILED_DIMS = "nk"

# Rows of a row block: get_mk_alignment_for_contiguous_layout() on SM90. The masked kernel stores
# whole tiles of 64 or 128 rows into flattened slots, so those must be a multiple of it too.
ALIGNMENT = 128

# tests/gpu passed on this one, with dense layers and with experts.
TESTED = (9, 0)

# One kernel serves a range of M whose bounds depend on (N, K) and the GPU (csrc heuristics); these
# token counts meet the row tiles of 16, 32, 64, 128 and 256 rows and the usual column tiles.
COMPILED_TOKENS = (16, 32, 64, 128, 256, 1024, 4096)

ROWS = (GroupedRows(MRange(), Arrangement.CONTIGUOUS, ALIGNMENT),)

# (device, experts, n, k) that prepare has compiled for in this process.
_compiled: set[tuple[torch.device, tuple[int, ...], int, int]] = set()


class DeepGemm:
    """DeepGEMM: runs on SM90; Blackwell is planned."""

    name = "deep_gemm"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or every reason against one."""
        gates = Gates(self.name, request, device)
        gates.architectures(FORMS, MISSING)
        gates.package(PACKAGE)
        gates.blocks((BlockShape(128, 128),))
        gates.out_dtypes((DType.BFLOAT16,), f"a {request.out_dtype.value} model cannot run on it")
        gates.multiples(N_MULTIPLE, K_MULTIPLE)
        gates.whole_blocks()
        gates.no_bias_of_experts()
        if device.capability in CUDA:
            gates.cuda_at_least(*CUDA[device.capability])
        if gates.rejections or device.capability is None:
            return gates.rejections
        weight, activation = FORMS[device.capability]
        is_runnable = device.capability == TESTED
        return Offer(
            self.name,
            weight,
            activation,
            evidence=Evidence.TESTED if is_runnable else Evidence.DOCUMENTED,
            readiness=Readiness.RUNNABLE if is_runnable else Readiness.PLAN_ONLY,
            notes=(
                f"compiles at prepare, once per (N, K), for M of {_listed(COMPILED_TOKENS)}",
                "another M may need a kernel that is compiled when it comes",
                *bias_notes(request),
            ),
            rows=() if request.experts is None else ROWS,
        )

    def estimate_us(self, request: LinearRequest, device: Device, m: int) -> float | None:  # noqa: ARG002 - the protocol's signature
        """For experts, as GPUs of SM90 ran them beside the own kernels; None for dense layers."""
        from blockscale.kernels.grouped_times import deep_gemm_us

        if request.experts is None:
            return None
        return deep_gemm_us(m, request.experts, (request.n, request.k), request.out_dtype)

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:  # noqa: ARG002 - the protocol's signature
        """The weight in contiguous memory, after running DeepGEMM once for each row tile.

        Half a minute per (N, K) on a machine that never ran it: DeepGEMM calls nvcc, and keeps what
        it built in ~/.deep_gemm. Raises BackendError if it cannot be imported or does not build.
        """
        from blockscale.tensor import BlockScaledTensor

        provider = _provider()
        if not weight.data.is_contiguous():
            data = weight.data.contiguous()
            weight = BlockScaledTensor(data, weight.scales, weight.format, weight.layout)
        key = (weight.device, weight.leading, weight.mn, weight.k)
        if key not in _compiled:
            try:
                (_compile_grouped if weight.leading else _compile)(provider, weight)
            except (RuntimeError, AssertionError, OSError) as error:
                words = " ".join(str(error).split())[:300]
                msg = f"DeepGEMM failed on a {weight.mn}x{weight.k} weight: {words}"
                raise BackendError(msg) from error
            _compiled.add(key)
        return weight

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:
        """By one Triton kernel, straight into DeepGEMM's layout: nothing is left to transpose."""
        from blockscale.kernels.triton.quantize import quantize_rows

        assert offer.activation is not None
        return quantize_rows(activation, offer.activation.format, offer.activation.layout)

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:  # noqa: ARG002 - the protocol's signature
        """One DeepGEMM call; a bias is added by a second kernel, after rounding."""
        gemm = _provider().fp8_gemm_nt
        operand = (weight.data, weight.scales)

        def multiply(
            activation: BlockScaledTensor, out: torch.Tensor, bias: torch.Tensor | None
        ) -> None:
            gemm((activation.data, activation.scales), operand, out, compiled_dims=COMPILED_DIMS)
            if bias is not None:
                out.add_(bias)

        return multiply

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:  # noqa: ARG002 - the protocol's signature
        """One DeepGEMM call, after a small kernel that says each row's expert."""
        gemm = _provider().m_grouped_fp8_gemm_nt_contiguous
        operand = (weight.data, weight.scales)

        def multiply(
            activation: BlockScaledTensor, groups: torch.Tensor, out: torch.Tensor
        ) -> None:
            if out.shape[0] == 0:
                return
            of_rows = groups.repeat_interleave(ALIGNMENT)
            pair = (activation.data, activation.scales)
            gemm(pair, operand, out, of_rows, compiled_dims=COMPILED_DIMS)

        return multiply

    def bind_masked(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyMasked:  # noqa: ARG002 - the protocol's signature
        """One DeepGEMM call."""
        gemm = _provider().fp8_m_grouped_gemm_nt_masked
        operand = (weight.data, weight.scales)

        def multiply(
            activation: BlockScaledTensor,
            counts: torch.Tensor,
            out: torch.Tensor,
            expected_rows: int,
        ) -> None:
            pair = (activation.data, activation.scales)
            likely = max(1, min(expected_rows, out.shape[1]))
            gemm(pair, operand, out, counts, likely, compiled_dims=COMPILED_DIMS)

        return multiply


def _compile(provider: ModuleType, weight: BlockScaledTensor) -> None:
    """Run on zeros for every token count of ``COMPILED_TOKENS``."""
    import torch

    from blockscale.tensor import empty_scales

    n, k = weight.data.shape
    _, form = FORMS[TESTED]
    device = weight.device
    with torch.cuda.device(device):
        for m in COMPILED_TOKENS:
            codes = torch.zeros((m, k), dtype=torch.uint8, device=device)
            scales = empty_scales(m, k, form.format, form.layout, device)
            out = torch.empty((m, n), dtype=torch.bfloat16, device=device)
            provider.fp8_gemm_nt(
                (codes.view(torch.float8_e4m3fn), scales),
                (weight.data, weight.scales),
                out,
                compiled_dims=COMPILED_DIMS,
            )
        torch.cuda.synchronize(device)


def _compile_grouped(provider: ModuleType, weight: BlockScaledTensor) -> None:
    """The contiguous kernel, which has one tile for every number of rows."""
    import torch

    from blockscale.tensor import empty_scales

    n, k = weight.mn, weight.k
    _, form = FORMS[TESTED]
    device = weight.device
    with torch.cuda.device(device):
        codes = torch.zeros((ALIGNMENT, k), dtype=torch.uint8, device=device)
        scales = empty_scales(ALIGNMENT, k, form.format, form.layout, device)
        out = torch.empty((ALIGNMENT, n), dtype=torch.bfloat16, device=device)
        groups = torch.zeros(ALIGNMENT, dtype=torch.int32, device=device)
        provider.m_grouped_fp8_gemm_nt_contiguous(
            (codes.view(torch.float8_e4m3fn), scales),
            (weight.data, weight.scales),
            out,
            groups,
            compiled_dims=COMPILED_DIMS,
        )
        torch.cuda.synchronize(device)


def _provider() -> ModuleType:
    try:
        import deep_gemm
    except (ImportError, OSError, AssertionError, RuntimeError, AttributeError) as error:
        msg = f"DeepGEMM cannot be imported (pip install {PACKAGE}==0.1.5): {error}"
        raise BackendError(msg) from error
    module: ModuleType = deep_gemm
    return module


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
