"""One rank of a test: ``python worker.py RANK SIZE FOLDER``, over gloo.

Every rank also computes what one process would, and compares.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import distributed

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.rank_plan import RankPlan, plan_rank
from blockscale.checkpoint.read import Checkpoint, read_checkpoint
from blockscale.checkpoint.requests import MergedLayer, RequestOptions
from blockscale.checkpoint.schema import read_layers
from blockscale.errors import ModelError
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.modules.linear import BlockScaledLinear
from blockscale.parallel.experts import SummedExperts, TravellingExperts
from blockscale.parallel.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    parallel_linear,
)
from blockscale.parallel.ranks import Ranks
from blockscale.planning.device import Device
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import RemedyKind
from blockscale.planning.sharded import Target
from blockscale.planning.sharding import Parallelism
from blockscale.reference import dequantize, quantize
from blockscale.tensor import torch_dtype
from blockscale.testing.ranks import serve_cases

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, WIDTH, HEAD = 256, 768, 64
HEADS, KV_HEADS = 8, 4
TOKENS = (1, 7, 40)
QKV, OUT = "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"
GATE_UP, DOWN = "model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"
BITS = {DType.BFLOAT16: 8, DType.FLOAT16: 11, DType.FLOAT32: 24}


def write_checkpoint(folder: Path) -> None:
    """One decoder layer's linear layers, q, k, v and o with a bias."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    prefix = "model.layers.0"
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (WIDTH, HIDDEN),
        "mlp.up_proj": (WIDTH, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDTH),
    }
    for name, (n, k) in shapes.items():
        weight = quantize(torch.randn(n, k, generator=generator) / k**0.5, FP8_128X128_FP32)
        tensors[f"{prefix}.{name}.weight"] = weight.data
        tensors[f"{prefix}.{name}.weight_scale_inv"] = weight.scales
        if name.startswith("self_attn"):
            tensors[f"{prefix}.{name}.bias"] = torch.randn(n, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    declared = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {
        "quantization_config": declared,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }
    (folder / "config.json").write_text(json.dumps(config))


class Planned:
    """A checkpoint planned for some ranks, and its layers by name."""

    def __init__(
        self, folder: Path, ranks: Ranks, dtype: DType, remedy: RemedyKind | None = None
    ) -> None:
        self.checkpoint: Checkpoint = read_checkpoint(folder / "checkpoint")
        self.ranks = ranks
        self.dtype = dtype
        target = Target(Device.named("cpu"), PlanPolicy(), BACKENDS, remedy)
        options = RequestOptions(dtype, Parallelism(ranks.size))
        self.plan: RankPlan = plan_rank(
            self.checkpoint, read_layers(self.checkpoint), options, target, ranks.rank
        )
        self.layers: dict[str, MergedLayer] = {
            layer.whole.request.name: layer for layer in self.plan.merged.layers
        }

    def module(self, name: str) -> ColumnParallelLinear | RowParallelLinear | BlockScaledLinear:
        return parallel_linear(self.checkpoint, self.plan, self.layers[name], self.ranks)

    def columns(self, name: str) -> ColumnParallelLinear:
        module = self.module(name)
        assert isinstance(module, ColumnParallelLinear)
        return module

    def rows(self, name: str) -> RowParallelLinear:
        module = self.module(name)
        assert isinstance(module, RowParallelLinear)
        return module

    def activation(self, tokens: int, width: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randn(tokens, width, generator=generator).to(torch_dtype(self.dtype))


def column_parallel_is_bitwise(folder: Path, ranks: Ranks) -> None:
    for dtype in DType:
        ours, alone = Planned(folder, ranks, dtype), Planned(folder, Ranks(), dtype)
        for name in (QKV, GATE_UP):
            module, whole = ours.columns(name), alone.module(name)
            pieces = ours.plan.piece(ours.layers[name]).rows
            sizes = ours.layers[name].whole.request.parts
            for tokens in TOKENS:
                activation = ours.activation(tokens, HIDDEN)
                expected = [
                    part[:, span.first : span.end]
                    for part, span in zip(whole(activation).split(sizes, -1), pieces, strict=True)
                ]
                found = module.split(module(activation))
                for mine, theirs in zip(found, expected, strict=True):
                    assert torch.equal(mine, theirs), (dtype, name, tokens)


def row_parallel_is_within_the_rounding_of_its_sum(folder: Path, ranks: Ranks) -> None:
    """Each partial product and each sum of two rounds once: half a unit in the last place."""
    for dtype in DType:
        ours, alone = Planned(folder, ranks, dtype), Planned(folder, Ranks(), dtype)
        for name in (OUT, DOWN):
            module, whole = ours.rows(name), alone.module(name)
            assert isinstance(whole, BlockScaledLinear)
            span = ours.plan.piece(ours.layers[name]).columns
            values = dequantize(whole.weight).double()
            for tokens in TOKENS:
                activation = ours.activation(tokens, whole.in_features)
                mine = module(activation[:, span.first : span.end])
                size = activation.double().abs() @ values.abs().T
                size += 0 if whole.bias is None else whole.bias.double().abs()
                roundings = 2 * ranks.size + 1
                limit = size * roundings * 2.0 ** -BITS[dtype] * 1.01
                change = (mine.double() - whole(activation).double()).abs()
                assert bool((change <= limit).all()), (dtype, name, tokens)
                others = [torch.empty_like(mine) for _ in range(ranks.size)]
                distributed.all_gather(others, mine)
                assert all(torch.equal(mine, other) for other in others), "ranks disagree"


def remedies_compute_the_whole_mlp(folder: Path, ranks: Ranks) -> None:
    """768 columns are six blocks: four ranks have one and a half each, and two ranks three."""
    dtype = DType.FLOAT32
    alone = Planned(folder, Ranks(), dtype)
    whole_up, whole_down = alone.module(GATE_UP), alone.module(DOWN)
    activation = alone.activation(9, HIDDEN)
    gate, up = whole_up(activation).chunk(2, -1)
    expected = whole_down(torch.nn.functional.silu(gate) * up)
    for remedy in (RemedyKind.REFINE, RemedyKind.UNEVEN, RemedyKind.PAD):
        ours = Planned(folder, ranks, dtype, remedy)
        first = ours.columns(GATE_UP)
        held = first.linear.plan.request.shard.remedy
        assert held is (remedy if ranks.size == 4 else None)
        gate, up = first.split(first(activation))
        found = ours.rows(DOWN)(torch.nn.functional.silu(gate) * up)
        assert (found - expected).norm() <= 2e-6 * expected.norm(), remedy


def attention_remedies_keep_heads(folder: Path, ranks: Ranks) -> None:
    """Four ranks have one key head of 64 rows each, half a block."""
    dtype = DType.FLOAT32
    alone = Planned(folder, Ranks(), dtype)
    activation = alone.activation(3, HIDDEN)
    whole = alone.module(QKV)(activation).split(
        (HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD), -1
    )
    for remedy in (RemedyKind.REFINE, RemedyKind.PAD):
        ours = Planned(folder, ranks, dtype, remedy)
        module = ours.columns(QKV)
        found = module.split(module(activation))
        for mine, part in zip(found, whole, strict=True):
            size = part.shape[-1] // ranks.size
            assert torch.equal(mine, part[:, size * ranks.rank :][:, :size]), remedy


def gathered_outputs_are_the_whole_output(folder: Path, ranks: Ranks) -> None:
    ours, alone = Planned(folder, ranks, DType.BFLOAT16), Planned(folder, Ranks(), DType.BFLOAT16)
    activation = ours.activation(7, HIDDEN)
    _, up = (module := ours.columns(GATE_UP)).split(module(activation))
    assert torch.equal(ranks.side_by_side(up), alone.module(GATE_UP)(activation)[:, WIDTH:])


def a_plan_for_other_ranks_is_refused(folder: Path, ranks: Ranks) -> None:
    ours = Planned(folder, ranks, DType.BFLOAT16)
    ours.ranks = replace(ranks, rank=(ranks.rank + 1) % ranks.size)
    try:
        ours.module(DOWN)
    except ModelError as error:
        assert f"of {ranks.size}" in str(error)  # noqa: PT017 - no pytest in this process
    else:
        message = "accepted"
        raise AssertionError(message)


EXPERTS, CHOICES = 8, 3


class ToyExperts:
    """Some of eight experts, each a matrix; an id outside the stack adds nothing."""

    def __init__(self, first: int, held: int) -> None:
        generator = torch.Generator().manual_seed(1)
        every = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
        self.weights = every[first : first + held]

    def __call__(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for token, row in enumerate(hidden):
            for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
                if 0 <= expert < len(self.weights):
                    out[token] += (torch.mv(self.weights[expert], row) * weight).to(out.dtype)
        return out


def routed(tokens: int, seed: int, hot: int | None = None) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    if hot is not None:
        scores[:, hot] = 2
    weights, ids = scores.topk(CHOICES)
    return hidden, ids, weights


def travelling_experts_are_bitwise_those_of_one_process(folder: Path, ranks: Ranks) -> None:  # noqa: ARG001 - every case has the same signature
    held = EXPERTS // ranks.size
    mine = TravellingExperts(ToyExperts(ranks.rank * held, held), EXPERTS, ranks)
    alone = TravellingExperts(ToyExperts(0, EXPERTS), EXPERTS, Ranks())
    for seed, hot in ((0, None), (1, 0), (2, EXPERTS - 1)):
        # Ranks have different numbers of tokens, one of them none.
        hidden, ids, weights = routed(ranks.rank * 5, 10 * seed + ranks.rank, hot)
        assert torch.equal(mine(hidden, ids, weights), alone(hidden, ids, weights)), (seed, hot)


def summed_experts_are_those_of_one_process(folder: Path, ranks: Ranks) -> None:  # noqa: ARG001 - as above
    held = EXPERTS // ranks.size
    first = ranks.rank * held
    mine = SummedExperts(ToyExperts(first, held), first, held, ranks)
    hidden, ids, weights = routed(11, 4)
    expected = ToyExperts(0, EXPERTS)(hidden, ids, weights)
    assert (mine(hidden, ids, weights) - expected).norm() <= 1e-6 * expected.norm()


CASES = (
    column_parallel_is_bitwise,
    row_parallel_is_within_the_rounding_of_its_sum,
    remedies_compute_the_whole_mlp,
    attention_remedies_keep_heads,
    gathered_outputs_are_the_whole_output,
    a_plan_for_other_ranks_is_refused,
    travelling_experts_are_bitwise_those_of_one_process,
    summed_experts_are_those_of_one_process,
)

if __name__ == "__main__":
    serve_cases(CASES, lambda folder: write_checkpoint(folder / "checkpoint"))
