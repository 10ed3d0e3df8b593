"""What client tests load: a tiny Qwen3 in a second, SmolLM2 where the answer must make sense."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.formats import FP8_128X128_FP32, FP8_128X128_UE8M0

if TYPE_CHECKING:
    from pathlib import Path


def save_qwen3(folder: Path, intermediate_size: int) -> Path:
    """A Qwen3 of two layers with random weights, in bfloat16."""
    pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=intermediate_size,
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
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gate and up end inside a block of rows, down inside a block of columns."""
    return save_qwen3(tmp_path_factory.mktemp("qwen3") / "bf16", 320)


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


@pytest.fixture(scope="session")
def whole_blocks_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_fp8``, every block full: transformers alone cannot load the other on a CPU."""
    base = tmp_path_factory.mktemp("qwen3-whole")
    quantize_checkpoint(read_checkpoint(save_qwen3(base / "bf16", 384)), base / "fp8")
    return base / "fp8"


@pytest.fixture(scope="session")
def smollm2_fp8(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in 128x128 blocks with FP32 scales."""
    target = tmp_path_factory.mktemp("smollm2") / "fp8"
    quantize_checkpoint(read_checkpoint(smollm2), target)
    return target
