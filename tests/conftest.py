"""Fixtures that many folders share: a tiny float checkpoint and the real weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import warm_client
from safetensors.torch import save_file
from warm_python import warm_python

from blockscale.checkpoint.quantize import quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-goldens`` rewrites tests/golden; review what git shows."""
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/golden")


ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / ".cache" / "weights"


@pytest.fixture
def float_checkpoint(tmp_path: Path) -> Path:
    """Two small linear layers (one ragged), a norm and an embedding, in bfloat16."""
    folder = tmp_path / "float"
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    save_file(
        {
            "model.embed_tokens.weight": normal(64, 256),
            "model.layers.0.self_attn.o_proj.weight": normal(256, 256),
            "model.layers.0.mlp.down_proj.weight": normal(192, 320),
            "model.layers.0.mlp.down_proj.bias": normal(192),
            "model.norm.weight": normal(256),
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "dtype": "bfloat16"}))
    return folder


@pytest.fixture
def fp8_checkpoint(float_checkpoint: Path, tmp_path: Path) -> Path:
    """``float_checkpoint`` quantized to 128x128 blocks with FP32 scales."""
    target = tmp_path / "fp8"
    quantize_checkpoint(read_checkpoint(float_checkpoint), target)
    return target


@pytest.fixture(scope="session")
def warm_program() -> Iterator[str]:
    """What ``forked`` puts in Python's place, for fixtures that live longer than a test."""
    with warm_python(["torch"], warm_client.TORCH) as program:
        yield program


@pytest.fixture(scope="session")
def warm_transformers() -> Iterator[str]:
    """The same, where transformers is imported too."""
    modules = [
        "torch._dynamo",
        "torch.distributed.tensor",
        "transformers.models.auto.modeling_auto",
    ]
    modules += ["transformers.modeling_utils", "transformers.generation.utils", "accelerate"]
    with warm_python(modules, warm_client.TRANSFORMERS) as program:
        yield program


@pytest.fixture
def forked(warm_program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``sys.executable`` starts forks of a Python that has imported torch: see warm_server.py.

    For tests of what a process does and how it ends, not of what Python imports or how it starts.
    """
    monkeypatch.setattr(sys, "executable", warm_program)


@pytest.fixture
def forked_transformers(warm_transformers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``forked``, for programs that load models."""
    monkeypatch.setattr(sys, "executable", warm_transformers)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, as `make test` fetches it."""
    return _weights("smollm2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a BERT encoder, as `make test` fetches it."""
    return _weights("minilm")


def _weights(name: str) -> Path:
    folder = WEIGHTS / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is missing; fetch it with `make weights`")
    return folder
