"""One rank that loads its share of small random transformers models, and one process's whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

from blockscale.checkpoint.quantize import quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.errors import ModelError
from blockscale.formats import DType
from blockscale.integrations.transformers import load_model
from blockscale.integrations.transformers_parallel import GatheredLinear, load_model_shard
from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.linear import BlockScaledLinear
from blockscale.parallel.ranks import Ranks
from blockscale.planning.request import RemedyKind
from blockscale.testing.ranks import serve_cases

if TYPE_CHECKING:
    from pathlib import Path

# 384 columns are three blocks: two ranks have one and a half each, and their scales are repeated.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
MODELS = ("llama", "qwen3", "tied", "qwen3-moe")
# Experts of 384 columns: 192 on each of two ranks, in blocks of 64; or two whole experts each.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 384}


def prepare(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

    torch.manual_seed(1)
    made = {
        "llama": LlamaConfig(**SIZES, attention_bias=True),
        "qwen3": Qwen3Config(**SIZES),
        "tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
        "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True, mlp_only_layers=[1]),
    }
    for name, config in made.items():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            # Transformers begins with 0.02 and zero biases: too near to nothing for a comparison.
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.08)
        model.save_pretrained(folder / f"{name}-float")
        quantize_checkpoint(read_checkpoint(folder / f"{name}-float"), folder / name)


def logits_are_those_of_one_process(folder: Path, ranks: Ranks) -> None:
    tokens = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(2))
    for name in MODELS:
        for dtype, limit in ((DType.FLOAT32, 2e-6), (DType.BFLOAT16, 2e-2)):
            whole = load_model(folder / name, dtype=dtype).model
            shard = load_model_shard(folder / name, ranks, dtype=dtype)
            expected, found = (m(tokens).logits.float() for m in (whole, shard.model))
            assert expected.std() > 0.1
            change = (found - expected).norm() / expected.norm()
            assert change <= limit, (name, dtype, change)
            others = [torch.empty_like(found) for _ in range(ranks.size)]
            distributed.all_gather(others, found)
            assert all(torch.equal(found, other) for other in others), "ranks disagree"


def experts_are_cut_or_dealt(folder: Path, ranks: Ranks) -> None:
    tokens = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(4))
    path = folder / "qwen3-moe"
    expected = load_model(path, dtype=DType.FLOAT32).model(tokens).logits
    for expert_parallel, held, width in ((1, 4, 192), (2, 2, 384)):
        shard = load_model_shard(path, ranks, dtype=DType.FLOAT32, expert_parallel=expert_parallel)
        (experts,) = [m for m in shard.model.modules() if isinstance(m, BlockScaledExperts)]
        assert experts.w2.data.shape == (held, 256, width)
        found = shard.model(tokens).logits
        assert (found - expected).norm() <= 2e-6 * expected.norm(), expert_parallel


def generation_chooses_the_same_tokens(folder: Path, ranks: Ranks) -> None:
    tokens = torch.tensor([[5, 17, 99, 3]])
    for name in MODELS:
        whole = load_model(folder / name, dtype=DType.FLOAT32).model
        shard = load_model_shard(folder / name, ranks, dtype=DType.FLOAT32).model
        first, second = (
            m.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
            for m in (whole, shard)
        )
        assert torch.equal(first, second), name


def a_rank_holds_its_share(folder: Path, ranks: Ranks) -> None:
    whole = load_model(folder / "qwen3", dtype=DType.BFLOAT16)
    shard = load_model_shard(folder / "qwen3", ranks, dtype=DType.BFLOAT16)
    codes = [
        sum(m.weight.data.numel() for m in model.modules() if isinstance(m, BlockScaledLinear))
        for model in (whole.model, shard.model)
    ]
    assert codes[1] * ranks.size == codes[0]
    assert isinstance(shard.model.lm_head, GatheredLinear)
    split = {
        layer.name.rpartition(".")[2]
        for layer in shard.plan.plan.layers
        if layer.request.shard.remedy is RemedyKind.REFINE
    }
    assert split == {"gate_proj", "up_proj", "down_proj", "k_proj", "v_proj"}
    tied = load_model_shard(folder / "tied", ranks, dtype=DType.BFLOAT16).model
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


def layers_around_an_activation_are_cut_together(folder: Path, ranks: Ranks) -> None:
    """A checkpoint that kept down_proj unquantized runs on one rank only, and is told so."""
    kept = folder / f"kept{ranks.rank}"
    from blockscale.checkpoint.quantize import QuantizeOptions

    quantize_checkpoint(
        read_checkpoint(folder / "qwen3-float"), kept, QuantizeOptions(kept=("down_proj",))
    )
    try:
        load_model_shard(kept, ranks)
    except ModelError as error:
        assert "down_proj is not block FP8" in str(error)  # noqa: PT017 - no pytest here
    else:
        message = "accepted"
        raise AssertionError(message)
    load_model_shard(kept, Ranks())


def heads_that_do_not_divide_are_named(folder: Path, ranks: Ranks) -> None:  # noqa: ARG001 - every case has the same signature
    try:
        load_model_shard(folder / "qwen3", Ranks(0, 3))
    except ModelError as error:
        assert "heads cannot be divided evenly over tensor parallel degree 3" in str(error)  # noqa: PT017 - as above
    else:
        message = "accepted"
        raise AssertionError(message)


CASES = (
    logits_are_those_of_one_process,
    experts_are_cut_or_dealt,
    generation_chooses_the_same_tokens,
    a_rank_holds_its_share,
    layers_around_an_activation_are_cut_together,
    heads_that_do_not_divide_are_named,
)

if __name__ == "__main__":
    serve_cases(CASES, prepare)
