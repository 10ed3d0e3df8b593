"""Tokens per second of a whole transformers model: bf16 or fp16, blockscale, transformers' own FP8.

    python benchmarks/transformers_model.py --out model.jsonl     a Hopper GPU, about two minutes
    python benchmarks/transformers_model.py --smoke               tiny, anywhere, proves nothing

Qwen3-8B's layers (8 of 36), random weights, transformers' own model class and attention. Variants:

float        the model as it is, in the model's dtype
blockscale   its linear layers in 128x128 FP8 blocks, run by blockscale's plan for this machine
finegrained  the same FP8 weights in transformers' own FP8Linear; its kernel comes from the Hub, or
             from its sources in .whl (``finegrained.py``); else it is recorded as missing, with the
             reason. It times itself at first: a minute for each dtype

Decoding: one token for each sequence of a batch, static cache, 1024 tokens of context, 4D mask.
Prefill: one sequence, logits of the last token. On a GPU each is captured in a CUDA graph and the
variants are replayed in turns. The output head is not quantized, as in every FP8 checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import finegrained
from blockscale.backends.registry import BACKENDS
from blockscale.formats import FP8_128X128_FP32
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy, Strictness
from blockscale.planning.request import LinearRequest
from blockscale.probe import detect_device
from blockscale.reference import quantize
from blockscale.tensor import dtype_of
from record import append_to, record
from timing import capture

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

# Qwen3-8B: hidden, intermediate, heads, key-value heads, head size, vocabulary.
EIGHT_B = (4096, 12288, 32, 8, 128, 151_936)
TINY = (256, 512, 4, 2, 64, 512)
# Random weights of 0.02 give near-zero activations after some layers; these keep the norm.
INITIALIZER_RANGE = 0.02
# Activations and weights in E4M3 cost about 4 % a layer, which adds up over random layers. Another
# model is off by 1.
LARGEST_ERROR = 0.4


@dataclass(frozen=True)
class Size:
    """What is measured."""

    shape: tuple[int, int, int, int, int, int]
    layers: int
    context: int
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    rounds: int
    replays: int


FULL = Size(EIGHT_B, 8, 1024, (1, 8, 16, 64), (512, 4096), rounds=10, replays=10)
SMOKE = Size(TINY, 2, 16, (1, 2), (32,), rounds=2, replays=1)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> int:
    """Build, check, measure, print a table, write records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two tiny layers, for tests")
    parser.add_argument("--layers", type=int, help="decoder layers, 8 by default")
    parser.add_argument("--backends", help="that the plan may take, separated by commas; else any")
    parser.add_argument("--out", type=Path, help="JSON lines, one record for each measurement")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    backends = tuple(options.backends.split(",")) if options.backends else None
    policy = PlanPolicy(backends=backends, strictness=Strictness.RAISE)
    for name in DTYPES:
        lines = measure_dtype(size, options.layers or size.layers, name, policy)
        if options.out:  # After each dtype: a time limit must not lose the first one.
            append_to(options.out, *lines)
    return 0


def measure_dtype(size: Size, layers: int, name: str, policy: PlanPolicy) -> list[dict[str, Any]]:
    """All variants and phases in one model dtype."""
    started = time.perf_counter()
    dtype = DTYPES[name]
    base = float_model(size, layers, dtype)
    models = {"float": base, "blockscale": planned_model(base, dtype, policy)}
    missing, kernel = None, None
    try:
        if DEVICE == "cuda" and finegrained.is_here():
            kernel = finegrained.give_to_transformers()
        models["finegrained"] = finegrained_model(base, models["blockscale"])
    except Exception as error:  # noqa: BLE001 - whatever the provider raises is the finding
        missing = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    error = relative_error(models, size)
    seconds = time.perf_counter() - started
    print(f"{name}: built in {seconds:.1f} s, relative error {error}", flush=True)
    if missing:
        print(f"  finegrained is missing: {missing}")
    shared = {
        "dtype": name,
        "layers": layers,
        "relative_error": error,
        "missing": missing,
        "finegrained_kernel": kernel,
    }
    found = []
    for batch in size.batches:
        calls = {key: decode_call(model, size, batch) for key, model in models.items()}
        found += records("decode", calls, {"batch": batch, "context": size.context}, size, shared)
    for prompt in size.prompts:
        calls = {key: prefill_call(model, prompt) for key, model in models.items()}
        found += records("prefill", calls, {"batch": 1, "prompt": prompt}, size, shared)
    backends = sorted({b for m in planned(models["blockscale"]) for b in m.plan.backends})
    return [{**line, "backends": backends} for line in found]


def float_model(size: Size, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """Qwen3 with random weights, on the device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, intermediate, heads, kv_heads, head_dim, vocabulary = size.shape
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(requires_grad=False)


def planned_model(base: PreTrainedModel, dtype: torch.dtype, policy: PlanPolicy) -> PreTrainedModel:
    """A copy that shares embeddings, norms and head; its linear layers run by plan."""
    model = without_linears(base)
    device = detect_device()
    for name, linear in linears(base):
        n, k = linear.weight.shape
        planned_dtype = dtype_of(dtype)
        request = LinearRequest(name, n, k, FP8_128X128_FP32, planned_dtype, planned_dtype)
        plan = plan_linear(request, device, policy, BACKENDS)
        model.set_submodule(
            name, BlockScaledLinear(plan, quantize(linear.weight, FP8_128X128_FP32))
        )
    return model


def finegrained_model(base: PreTrainedModel, ours: PreTrainedModel) -> PreTrainedModel:
    """The same codes and scales in transformers' own layer; raises what its kernel raises."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model = without_linears(base)
    for name, linear in linears(base):
        n, k = linear.weight.shape
        with torch.device("meta"):
            layer = FP8Linear(k, n, block_size=(128, 128))
        weight = ours.get_submodule(name).weight
        layer.weight = nn.Parameter(weight.data, requires_grad=False)
        layer.weight_scale_inv = nn.Parameter(weight.scales, requires_grad=False)
        model.set_submodule(name, layer)
    with torch.inference_mode():
        model(torch.zeros(1, 32, dtype=torch.long, device=DEVICE), use_cache=False)
    return model


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """What an FP8 checkpoint quantizes: every linear layer but the head."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [(name, module) for name, module in found if not name.endswith("lm_head")]


def without_linears(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree whose parameters are the original's, not copies."""
    shared = {id(p): p for p in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def planned(model: nn.Module) -> list[BlockScaledLinear]:
    """The layers that run by plan."""
    return [m for m in model.modules() if isinstance(m, BlockScaledLinear)]


def relative_error(models: dict[str, PreTrainedModel], size: Size) -> dict[str, float]:
    """Distance of each variant's logits from the float model's; exits if it is absurd."""
    ids = torch.randint(size.shape[-1], (1, 32), device=DEVICE)
    with torch.inference_mode():
        logits = {k: m(ids, use_cache=False).logits.float() for k, m in models.items()}
    exact = logits.pop("float")
    found = {k: round(float((v - exact).norm() / exact.norm()), 4) for k, v in logits.items()}
    for name, error in found.items():
        if not error < LARGEST_ERROR:
            sys.exit(f"{name} is {error} away from the float model: it computes something else")
    return found


@dataclass(frozen=True)
class Call:
    """One forward pass, how many tokens it answers for, and what must be undone before it."""

    run: Callable[[], object]
    tokens: int
    reset: Callable[[], object]


def decode_call(model: PreTrainedModel, size: Size, batch: int) -> Call:
    """One token for each sequence, after ``size.context`` tokens that are already cached."""
    from transformers import StaticCache

    # Room for every replay before the next reset, warm-up included.
    length = size.context + 4 * (size.replays + 4)
    cache = StaticCache(config=model.config, max_cache_len=length)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE)
    positions = torch.full((1, 1), size.context, device=DEVICE)
    seen = torch.arange(length, device=DEVICE) <= size.context
    mask = {"full_attention": seen.expand(batch, 1, 1, length)}

    def step() -> torch.Tensor:
        return model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).logits

    def reset() -> None:
        with torch.inference_mode():
            for layer in cache.layers:
                layer.cumulative_length.fill_(size.context)

    with torch.inference_mode():
        step()  # Allocates the cache.
    reset()
    return Call(step, batch, reset)


def prefill_call(model: PreTrainedModel, prompt: int) -> Call:
    """A whole prompt, without a cache, logits of its last token."""
    ids = torch.zeros(1, prompt, dtype=torch.long, device=DEVICE)

    # A mask by name is taken as it is; to look for one, transformers waits for the GPU.
    causal = {"full_attention": None}

    def run() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=causal, use_cache=False, logits_to_keep=1).logits

    return Call(run, prompt, lambda: None)


def records(
    phase: str,
    calls: dict[str, Call],
    what: dict[str, int],
    size: Size,
    shared: dict[str, Any],
) -> list[dict[str, Any]]:
    """Time all variants in turns; one record each."""
    times = in_turns(calls, size)
    found = []
    for name, milliseconds in times.items():
        ordered = sorted(milliseconds)
        tenth = len(ordered) // 10
        middle = median(ordered)
        speed = calls[name].tokens / middle * 1000
        found.append(
            record(
                "transformers_model",
                phase=phase,
                variant=name,
                **what,
                **shared,
                time_ms=round(middle, 4),
                p10_ms=round(ordered[tenth], 4),
                p90_ms=round(ordered[-1 - tenth], 4),
                tokens_per_second=round(speed, 1),
                timing="cuda_graph" if DEVICE == "cuda" else "eager",
            )
        )
    base = median(times["float"])
    shown = "  ".join(f"{k} {median(v):.3f} ms ({base / median(v):.2f}x)" for k, v in times.items())
    print(f"  {phase} {what}: {shown}", flush=True)
    return found


def in_turns(calls: dict[str, Call], size: Size) -> dict[str, list[float]]:
    """Milliseconds of one forward pass, ``size.rounds`` times for each variant."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        runs = {}
        for name, call in calls.items():
            call.reset()
            runs[name] = capture(call.run).replay if DEVICE == "cuda" else call.run
        for turn in range(size.rounds + 2):
            for name, run in runs.items():
                calls[name].reset()
                run()
                elapsed = clock(run, size.replays)
                if turn >= 2:  # Clocks rise under load: the first turns are warm-up.
                    found[name].append(elapsed / size.replays)
    return found


def clock(run: Callable[[], object], times: int) -> float:
    """Milliseconds of ``times`` calls."""
    if DEVICE == "cpu":
        started = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - started) * 1000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


if __name__ == "__main__":
    sys.exit(main())
