"""One decoder layer of MiniMax-M2.5, attention projections and 256 experts, on a GPU.

    python benchmarks/moe_layer.py [--dtype float16] [--out FILE]    under 100 s on an H100
    python benchmarks/moe_layer.py --smoke                           tiny, anywhere, proves nothing

q, k, v in one product, o, then the experts with 8 of 256 chosen at random for each token: random
weights, no attention, no router. Decode batches and a 4096-token prefill, each as one CUDA graph:

- ``plan``: blockscale's plan for this machine
- ``triton``: the same weights, plain Triton alone
- ``bf16``: the dequantized weights in bfloat16, torch's matmul and its grouped_mm; rows are
  arranged and added by the kernels that the others use

``plan`` and ``triton`` must agree, and ``bf16`` be as far away as quantized activations explain,
before anything is timed. Every token count reads at least 150 MB of weights, three times the L2.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockscale.backends.registry import BACKENDS
from blockscale.expert_ops import TorchRows
from blockscale.formats import FP8_128X128_FP32, DType, PowerOfTwo
from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.decision import Arrangement, GroupedRows, MRange
from blockscale.planning.expert_sets import ExpertsPlan
from blockscale.planning.planner import plan_experts, plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import detect_device
from blockscale.reference import dequantize, expert_of, quantize
from blockscale.tensor import BlockScaledTensor, torch_dtype
from record import append, append_to, need_gpu, record
from timing import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from blockscale.reference.experts import ArrangedRows
    from timing import Timing

FMT = FP8_128X128_FP32
# Relative errors. Two kernels' products differ in last bits of float16, 5e-4. So 1 % of the values
# that are quantized next take the neighbouring code, 6 to 12 % away: 1 to 2 % of the norm, at each
# of three quantizations. A wrong expert or scale is off by 1. Quantized activations cost four times
# 2.65 %, and twice where gate and up meet.
AGREE, QUANTIZED = 0.06, 0.12
# Rows of a row block of torch's grouped_mm: its rows start on 16 bytes whatever they are.
BF16_ALIGNMENT = 16


@dataclass(frozen=True)
class Size:
    """Shapes of the layer; ``tokens``: what is measured, ``rounds`` times."""

    hidden: int
    attention: int
    qkv: int
    inner: int
    experts: int
    choices: int
    tokens: tuple[int, ...]
    rounds: int
    replays: int


MINIMAX = Size(3072, 6144, 8192, 1536, 256, 8, (1, 2, 4, 8, 16, 32, 64, 128, 4096), 20, 5)
SMOKE = Size(256, 256, 512, 128, 8, 2, (1, 3), 2, 1)


@dataclass(frozen=True)
class Weights:
    """The layer's quantized weights; experts as stacks."""

    qkv: BlockScaledTensor
    o: BlockScaledTensor
    w13: BlockScaledTensor
    w2: BlockScaledTensor


@dataclass(frozen=True)
class Inputs:
    """Tokens (M, hidden), expert ids and routing weights (M, choices)."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def main() -> int:
    """Build, check, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="tiny layer, on a CPU too, for tests")
    names = [dtype.value for dtype in (DType.FLOAT16, DType.BFLOAT16)]
    parser.add_argument("--dtype", default="float16", choices=names)
    parser.add_argument("--backends", help="that the plan may take, separated by commas; else any")
    parser.add_argument("--out", type=Path, help="JSON lines here, not among the results")
    options = parser.parse_args()
    if not options.smoke:
        need_gpu()
    size = SMOKE if options.smoke else MINIMAX
    place = "cuda" if torch.cuda.is_available() or not options.smoke else "cpu"
    dtype = DType(options.dtype)
    started = time.perf_counter()
    weights = made(size, place)
    # A CPU has no Triton: the reference stands in, so that three variants run there too.
    slow = "triton" if place == "cuda" else "reference"
    allowed = tuple(options.backends.split(",")) if options.backends else None
    layers: dict[str, Layer] = {
        "plan": Planned(size, weights, dtype, allowed),
        "triton": Planned(size, weights, dtype, (slow,)),
        "bf16": Bfloat16(size, weights, place),
    }
    backends = layers["plan"].backends
    print(f"built in {time.perf_counter() - started:.1f} s; planned: {backends}", flush=True)
    print(" tokens |    plan us  triton us    bf16 us | against triton | against bf16")
    for tokens in size.tokens:
        inputs = inputs_of(size, tokens, dtype, place)
        check(layers, inputs, quantizes=place == "cuda")
        times = measured(layers, inputs, size)
        document = described(times, tokens, dtype, backends)
        # After each: a time limit must not lose those before.
        if options.out is not None:
            append_to(options.out, document)
        elif not options.smoke:
            append(document)
    print(f"done in {time.perf_counter() - started:.1f} s", flush=True)
    return 0


def made(size: Size, place: str) -> Weights:
    """Normal weights, quantized matrix by matrix."""
    generator = torch.Generator(device=place).manual_seed(0)

    def matrix(n: int, k: int) -> BlockScaledTensor:
        floats = torch.randn(n, k, generator=generator, device=place) / k**0.5
        return quantize(floats, FMT)

    def stack(n: int, k: int) -> BlockScaledTensor:
        shape = (size.experts, n, k)
        data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=place)
        scales = torch.empty((size.experts, *FMT.block.grid(n, k)), device=place)
        for expert in range(size.experts):
            one = matrix(n, k)
            data[expert], scales[expert] = one.data, one.scales
        return BlockScaledTensor(data, scales, FMT, one.layout)

    return Weights(
        matrix(size.qkv, size.hidden),
        matrix(size.hidden, size.attention),
        stack(2 * size.inner, size.hidden),
        stack(size.hidden, size.inner),
    )


class Layer:
    """From tokens to tokens: q, k, v; o of as many columns as attention has; experts."""

    backends: Mapping[str, list[str]]

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """(M, hidden) to (M, hidden)."""
        raise NotImplementedError


class Planned(Layer):
    """FP8 weights by a plan; ``backends`` None: the best for this machine."""

    def __init__(
        self, size: Size, weights: Weights, dtype: DType, backends: tuple[str, ...] | None
    ) -> None:
        device, policy = detect_device(), PlanPolicy(backends=backends)

        def request(name: str, weight: BlockScaledTensor) -> LinearRequest:
            experts = weight.leading[0] if weight.leading else None
            halves = (weight.mn // 2, weight.mn // 2) if name.endswith("w13") else ()
            return LinearRequest(
                name, weight.mn, weight.k, FMT, dtype, dtype, PowerOfTwo.NO, halves, experts=experts
            )

        def linear(name: str, weight: BlockScaledTensor) -> BlockScaledLinear:
            plan = plan_linear(request(name, weight), device, policy, BACKENDS)
            return BlockScaledLinear(plan, weight)

        self._attention = size.attention
        self._qkv, self._o = linear("qkv", weights.qkv), linear("o", weights.o)
        both = [request("experts.w13", weights.w13), request("experts.w2", weights.w2)]
        plan = ExpertsPlan(*plan_experts(both, device, policy, BACKENDS))
        self._experts = BlockScaledExperts(plan, weights.w13, weights.w2)
        self.backends = {
            "qkv": sorted(set(self._qkv.plan.backends)),
            "o": sorted(set(self._o.plan.backends)),
            "experts": sorted(set(plan.w13.backends)),
        }

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """As ``Layer``."""
        attended = self._qkv(inputs.hidden)[:, : self._attention]
        return self._experts(self._o(attended), inputs.ids, inputs.weights)


class Bfloat16(Layer):
    """The dequantized weights in bfloat16, by torch."""

    def __init__(self, size: Size, weights: Weights, place: str) -> None:
        self._size = size
        self._qkv, self._o = (dequantize(w).bfloat16() for w in (weights.qkv, weights.o))
        self._w13, self._w2 = _bfloat16(weights.w13), _bfloat16(weights.w2)
        # Experts whose blocks come before each row, to find where each expert's rows end.
        self._each = torch.arange(size.experts, device=place)[:, None]
        rows = GroupedRows(MRange(), Arrangement.CONTIGUOUS, BF16_ALIGNMENT)
        self._rows = TorchRows(None, rows, size.experts)
        if place == "cuda":
            from blockscale.formats import FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED
            from blockscale.kernels.triton.rows import ContiguousRows, RowsSpec

            form = (FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)
            spec = RowsSpec(
                *form, BF16_ALIGNMENT, size.experts, torch.bfloat16, size.hidden, size.inner, 0
            )
            self._rows = ContiguousRows(spec)  # type: ignore[assignment]  # the same steps

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """As ``Layer``."""
        hidden = inputs.hidden.bfloat16()
        attended = (hidden @ self._qkv.T)[:, : self._size.attention]
        hidden = attended @ self._o.T
        rows = self._rows.arrange(inputs.ids)
        ends = self._ends(rows)
        token = rows.source.clamp(min=0) // rows.choices
        gathered = hidden.index_select(0, token)
        gate, up = _grouped(gathered, self._w13, ends).chunk(2, dim=-1)
        products = _grouped(torch.nn.functional.silu(gate) * up, self._w2, ends)
        out = torch.empty_like(hidden)
        self._rows.combine(products, rows, inputs.weights, out)
        return out

    def _ends(self, rows: ArrangedRows) -> torch.Tensor:
        """The row behind the last of each expert, as grouped_mm wants it."""
        before = (rows.groups[None, :] <= self._each) & (rows.groups >= 0)[None, :]
        return (before.sum(1) * BF16_ALIGNMENT).int()


def _bfloat16(stack: BlockScaledTensor) -> torch.Tensor:
    out = torch.empty(stack.data.shape, dtype=torch.bfloat16, device=stack.device)
    for expert in range(stack.leading[0]):
        out[expert] = dequantize(expert_of(stack, expert))
    return out.transpose(1, 2)


def _grouped(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
    return result


def inputs_of(size: Size, tokens: int, dtype: DType, place: str) -> Inputs:
    """Normal tokens; experts drawn without replacement; weights that add up to one."""
    generator = torch.Generator(device=place).manual_seed(tokens)
    hidden = torch.randn(tokens, size.hidden, generator=generator, device=place)
    order = torch.rand(tokens, size.experts, generator=generator, device=place).argsort(1)
    weights = torch.rand(tokens, size.choices, generator=generator, device=place)
    weights /= weights.sum(1, keepdim=True)
    ids = order[:, : size.choices].contiguous()
    return Inputs(hidden.to(torch_dtype(dtype)), ids, weights)


def check(layers: Mapping[str, Layer], inputs: Inputs, *, quantizes: bool) -> None:
    """Exit if the variants do not compute the same layer."""
    plan, triton, floats = (layers[name](inputs).float() for name in ("plan", "triton", "bf16"))
    # On a CPU the plan's backend quantizes no activation, and the other does.
    limit = AGREE if quantizes else QUANTIZED
    if not (plan - triton).norm() <= limit * triton.norm():
        sys.exit(f"M={len(plan)}: the plan and Triton disagree")
    if not (triton - floats).norm() <= QUANTIZED * floats.norm():
        sys.exit(f"M={len(plan)}: wrong by more than quantized activations explain")


def measured(layers: Mapping[str, Layer], inputs: Inputs, size: Size) -> dict[str, float]:
    """Microseconds of each variant."""

    def calling(layer: Layer) -> Callable[[], torch.Tensor]:
        return lambda: layer(inputs)

    calls = {name: calling(layer) for name, layer in layers.items()}
    if inputs.hidden.is_cuda:
        timings: dict[str, Timing] = interleaved(calls, size.rounds, size.replays)
        return {name: timing.median_us for name, timing in timings.items()}
    found = {}
    for name, call in calls.items():
        started = time.perf_counter()
        call()
        found[name] = (time.perf_counter() - started) * 1e6
    return found


def described(
    times: Mapping[str, float], tokens: int, dtype: DType, backends: Mapping[str, list[str]]
) -> dict[str, object]:
    """A record, and its line of the table."""
    plan, triton, floats = (times[name] for name in ("plan", "triton", "bf16"))
    print(
        f"{tokens:7d} | {plan:10.1f} {triton:10.1f} {floats:10.1f} | "
        f"{triton / plan:13.2f}x | {floats / plan:11.2f}x",
        flush=True,
    )
    return record(
        "moe_layer",
        m=tokens,
        activation_dtype=dtype.value,
        plan_us=round(plan, 2),
        triton_us=round(triton, 2),
        bf16_us=round(floats, 2),
        speedup_over_triton=round(triton / plan, 3),
        speedup_over_bf16=round(floats / plan, 3),
        backends=dict(backends),
        timing="cuda_graph" if torch.cuda.is_available() else "once",
    )


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
