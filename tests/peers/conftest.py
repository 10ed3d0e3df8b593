"""A small Llama with random weights, and what both sides make of its linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Save = Callable[..., Path]
    Values = dict[str, torch.Tensor]

# q, k, v, o, gate, up, down.
LINEARS = 7


@pytest.fixture
def save_llama(tmp_path: Path) -> Save:
    """Saves a bf16 Llama of one decoder layer; sizes that are no multiples of 128 on request."""

    def save(hidden: int = 256, intermediate: int = 384) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "float")
        return tmp_path / "float"

    return save


@pytest.fixture
def our_values() -> Callable[[Path], Values]:
    """Every block-FP8 layer of a checkpoint as this library reads it, in float32."""
    return _our_values


@pytest.fixture
def assert_same_weights() -> Callable[[torch.nn.Module, Values], None]:
    """Their dequantized weights are ours, rounded to their dtype once: bit for bit."""
    return _assert_same_weights


def _our_values(folder: Path) -> Values:
    from blockscale.checkpoint.read import read_checkpoint
    from blockscale.checkpoint.schema import read_layers
    from blockscale.checkpoint.tensors import read_block_scaled
    from blockscale.reference import dequantize

    layers = read_layers(read_checkpoint(folder))
    assert layers.findings == ()
    return {layer.name: dequantize(read_block_scaled(layer)) for layer in layers.quantized}


def _assert_same_weights(model: torch.nn.Module, ours: Values) -> None:
    assert len(ours) == LINEARS
    for name, value in ours.items():
        weight = model.get_parameter(name + ".weight")
        assert torch.equal(weight, value.to(weight.dtype)), name
