"""A model's experts with few tokens: rows of experts one after the other, or in slots.

    python benchmarks/expert_slots.py [--model NAME] [--backend gluon] [--out FILE]
    python benchmarks/expert_slots.py --smoke            tiny, proves nothing

The whole layer, from tokens to tokens, as one CUDA graph. ``grouped.py`` says that the products
take 0 to 3 % less in slots; the steps between them go through as many rows as all slots have, which
grows with the tokens and not with the experts that they choose. No offer lists slots: it would
where this says that the layer takes less. Half a minute a model on an H100.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockscale.backends.registry import BACKENDS
from blockscale.formats import DType
from blockscale.modules.experts import BlockScaledExperts
from blockscale.planning.decision import Arrangement, GroupedRows, MRange
from blockscale.planning.expert_sets import ExpertsPlan
from blockscale.planning.planner import plan_experts
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import detect_device
from blockscale.testing.expert_cases import with_rows
from moe_layer import AGREE, FMT, MINIMAX, SMOKE, inputs_of, made
from record import append, append_to, need_gpu, record
from timing import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_layer import Inputs, Size, Weights

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
# Their experts, as published; what else a layer has does not count here.
MODELS = {
    "MiniMax-M2.5": MINIMAX,
    "Qwen3-235B-A22B": replace(MINIMAX, hidden=4096, experts=128),
    "Qwen3-30B-A3B": replace(MINIMAX, hidden=2048, inner=768, experts=128),
    "DeepSeek-V3": replace(MINIMAX, hidden=7168, inner=2048),
}
# Rows of a slot are a multiple of this: the lowest tile of few rows, or a wave.
SLOT_MULTIPLE = {"gluon": 8, "cuda": 64, "triton": 16}


def main() -> int:
    """Build both, compare, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="tiny layer, for tests")
    parser.add_argument("--model", default="MiniMax-M2.5", choices=sorted(MODELS))
    parser.add_argument("--backend", default="gluon", choices=sorted(SLOT_MULTIPLE))
    parser.add_argument("--out", type=Path, help="JSON lines here, not among the results")
    options = parser.parse_args()
    need_gpu()
    size = SMOKE if options.smoke else MODELS[options.model]
    weights = made(size, "cuda")
    plan = planned(size, options.backend)
    rows = GroupedRows(MRange(), Arrangement.MASKED, SLOT_MULTIPLE[options.backend])
    ways = {"rows": layer(plan, weights), "slots": layer(with_rows(plan, rows), weights)}
    print(" tokens |     rows us |    slots us | rows / slots")
    for tokens in size.tokens if options.smoke else TOKENS:
        inputs = inputs_of(size, tokens, DType.FLOAT16, "cuda")
        document = measured(ways, inputs, size, options.backend)
        document["model"] = "smoke" if options.smoke else options.model
        if options.out is not None:
            append_to(options.out, document)
        elif not options.smoke:
            append(document)
    return 0


def planned(size: Size, backend: str) -> ExpertsPlan:
    """One backend's plan for all token counts, in float16."""
    out, inner = DType.FLOAT16, size.inner
    w13 = LinearRequest(
        "experts.w13", 2 * inner, size.hidden, FMT, out, out, parts=(inner, inner),
        experts=size.experts,
    )  # fmt: skip
    w2 = LinearRequest("experts.w2", size.hidden, inner, FMT, out, out, experts=size.experts)
    policy = PlanPolicy(backends=(backend,))
    return ExpertsPlan(*plan_experts([w13, w2], detect_device(), policy, BACKENDS))


def layer(plan: ExpertsPlan, weights: Weights) -> BlockScaledExperts:
    """Weights that are right already are shared."""
    return BlockScaledExperts(plan, weights.w13, weights.w2)


def measured(
    ways: dict[str, BlockScaledExperts], inputs: Inputs, size: Size, backend: str
) -> dict[str, object]:
    """A record, and its line of the table. Exits if the two do not compute the same."""

    def calling(experts: BlockScaledExperts) -> Callable[[], torch.Tensor]:
        return lambda: experts(inputs.hidden, inputs.ids, inputs.weights)

    calls = {name: calling(experts) for name, experts in ways.items()}
    one, other = (call().float() for call in calls.values())
    if not (one - other).norm() <= AGREE * one.norm():
        sys.exit(f"M={len(one)}: rows and slots disagree")
    times = interleaved(calls, size.rounds, size.replays)
    rows, slots = (times[name].median_us for name in ("rows", "slots"))
    print(f"{len(one):7d} | {rows:11.1f} | {slots:11.1f} | {rows / slots:.3f}", flush=True)
    return record(
        "expert_slots",
        m=len(one),
        experts=size.experts,
        backend=backend,
        out_dtype="float16",
        rows_us=round(rows, 2),
        slots_us=round(slots, 2),
        timing="cuda_graph",
    )


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
