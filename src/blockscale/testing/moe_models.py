"""Small Qwen3-MoE and MiniMax-M2 models of transformers, and their checkpoints as on the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

HIDDEN, INNER, EXPERTS, CHOICES, LAYERS = 256, 256, 8, 2, 3
FAMILIES = ("qwen3_moe", "minimax_m2")


def new_model(family: str) -> PreTrainedModel:
    """A model with random weights that bfloat16 holds, and routers with wide margins."""
    from transformers import (  # noqa: PLC0415 - not every test of this package has it
        MiniMaxM2Config,
        MiniMaxM2ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    shared: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts_per_tok": CHOICES,
        "initializer_range": 0.06,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(11)
    model: Any
    if family == "qwen3_moe":
        qwen = Qwen3MoeConfig(
            **shared,
            num_experts=EXPERTS,
            moe_intermediate_size=INNER,
            intermediate_size=384,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        )
        model = Qwen3MoeForCausalLM(qwen)
    else:
        minimax = MiniMaxM2Config(**shared, num_local_experts=EXPERTS, intermediate_size=INNER)
        model = MiniMaxM2ForCausalLM(minimax)
    model.eval().requires_grad_(requires_grad=False)
    for name, value in model.state_dict().items():
        if name.endswith("mlp.gate.weight"):
            value.mul_(4)
        if name.endswith("e_score_correction_bias"):
            value.normal_(std=0.1)
        if value.is_floating_point():
            value.copy_(value.to(torch.bfloat16))
    return model  # type: ignore[no-any-return]  # two classes of one base


def names_on_disk(family: str, name: str) -> list[tuple[str, int | None, int | None]]:
    """(stored name, expert, half) of one tensor of transformers' state."""
    prefix, _, leaf = name.rpartition(".")
    if family == "minimax_m2":
        prefix = prefix.replace(".mlp", ".block_sparse_moe")
    if leaf not in {"gate_up_proj", "down_proj"}:
        return [(f"{prefix}.{leaf}" if prefix else leaf, None, None)]
    gate, up, down = ("w1", "w3", "w2")
    if family == "qwen3_moe":
        gate, up, down = "gate_proj", "up_proj", "down_proj"
    if leaf == "down_proj":
        return [(f"{prefix}.{e}.{down}.weight", e, None) for e in range(EXPERTS)]
    halves = ((gate, 0), (up, 1))
    return [(f"{prefix}.{e}.{own}.weight", e, half) for e in range(EXPERTS) for own, half in halves]


def write_checkpoint(model: PreTrainedModel, family: str, folder: Path) -> None:
    """Every tensor under its name on the Hub, in bfloat16; MiniMax's routers in float32."""
    tensors = {}
    for name, value in model.state_dict().items():
        for stored, expert, half in names_on_disk(family, name):
            part = value if expert is None else value[expert]
            part = part if half is None else part.chunk(2)[half]
            is_float32 = stored.endswith(("gate.weight", "e_score_correction_bias"))
            dtype = torch.float32 if is_float32 and family == "minimax_m2" else torch.bfloat16
            tensors[stored] = part.to(dtype).clone()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)


class FixedRouter(nn.Module):
    """A router that weighs by its own logits, among experts that were chosen before."""

    def __init__(self, router: nn.Module, chosen: torch.Tensor) -> None:
        super().__init__()
        self.router, self.chosen = router, chosen

    def forward(
        self, hidden: torch.Tensor, *bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, weights and experts, as transformers' routers give them."""
        logits, own, _ = self.router(hidden, *bias)
        scores = logits.float().sigmoid() if bias else logits.float().softmax(-1)
        weights = scores.gather(1, self.chosen)
        # In the router's own dtype: weights that round otherwise change codes all over the model.
        return logits, (weights / weights.sum(-1, keepdim=True)).to(own.dtype), self.chosen
