"""A Qwen3 of two layers with random weights: what a client test loads in a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.formats import FP8_128X128_FP32, FP8_128X128_UE8M0

if TYPE_CHECKING:
    from pathlib import Path

PLANNED_LAYERS = 14


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bf16 model; every second projection ends inside a 128-row block."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen3") / "bf16"
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_fp8(tiny_qwen3: Path) -> Path:
    """``tiny_qwen3`` in 128x128 blocks with FP32 scales."""
    target = tiny_qwen3.parent / "fp8"
    quantize_checkpoint(read_checkpoint(tiny_qwen3), target, QuantizeOptions(FP8_128X128_FP32))
    return target


@pytest.fixture(scope="session")
def tiny_ue8m0(tiny_qwen3: Path) -> Path:
    """``tiny_qwen3`` with power-of-two scales in F32, as DeepSeek-V3.1 stores them."""
    target = tiny_qwen3.parent / "ue8m0"
    quantize_checkpoint(read_checkpoint(tiny_qwen3), target, QuantizeOptions(FP8_128X128_UE8M0))
    return target
