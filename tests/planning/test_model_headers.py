"""The invented checkpoints of famous models: real headers, no data, the published shapes."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open

from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.schema import SchemeKind, read_layers
from blockscale.testing.model_shapes import (
    SHARD_BYTES,
    ModelShape,
    TensorShape,
    deepseek_v3,
    minimax_m25,
    qwen3_8b,
    write_model_headers,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# FP8 weights, and billions of parameters as published (embedding and head included).
MODELS = [
    (minimax_m25, 62 * (4 + 3 * 256), 230),
    (deepseek_v3, 61 * 5 + 3 * 3 + 58 * 3 * 257, 671),
    (qwen3_8b, 36 * 7, 8.2),
]


@pytest.mark.parametrize(("model", "quantized", "billions"), MODELS)
def test_sizes_are_the_published_ones(
    model: Callable[[], ModelShape], quantized: int, billions: float
) -> None:
    shape = model()
    names = Counter(tensor.name for tensor in shape.tensors)
    assert max(names.values()) == 1
    weights = [t for t in shape.tensors if t.dtype == "F8_E4M3"]
    assert len(weights) == quantized
    assert sum(name.endswith(".weight_scale_inv") for name in names) == quantized
    total = sum(
        t.shape[0] * t.shape[1]
        for t in shape.tensors
        if t.name.endswith(".weight") and len(t.shape) == 2
    )
    assert total / 1e9 == pytest.approx(billions, rel=0.01)


def test_deepseek_v3_reads_back_as_block_fp8_over_many_shards(tmp_path: Path) -> None:
    shape = deepseek_v3()
    write_model_headers(tmp_path, shape)
    checkpoint = read_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == [tensor.name for tensor in shape.tensors]
    assert len(checkpoint.files) > 100
    layers = read_layers(checkpoint)
    assert layers.scheme.kind is SchemeKind.BLOCK_FP8
    assert str(layers.scheme.block) == "128x128"
    assert layers.findings == ()
    assert checkpoint.tensor_bytes == sum(tensor.length for tensor in shape.tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.tensor_bytes


def test_files_take_no_disk_and_the_safetensors_library_reads_them(tmp_path: Path) -> None:
    whole = qwen3_8b()
    shape = ModelShape(whole.name, whole.config, whole.tensors[:15])
    write_model_headers(tmp_path, shape)
    (file,) = tmp_path.glob("*.safetensors")
    status = file.stat()
    assert status.st_size > 1e9
    assert status.st_blocks * 512 < 1e6
    with safe_open(file, framework="numpy") as opened:
        assert set(opened.keys()) == {tensor.name for tensor in shape.tensors}
        scale = opened.get_slice("model.layers.0.self_attn.k_proj.weight_scale_inv")
        assert scale.get_shape() == [8, 32]
        assert scale.get_dtype() == "F32"


def test_a_shard_holds_at_most_its_limit_unless_one_tensor_is_larger(tmp_path: Path) -> None:
    half = SHARD_BYTES // 2
    sizes = (half, half, half, SHARD_BYTES + 1, 16)
    tensors = tuple(TensorShape(f"t{i}", "F8_E4M3", (size,)) for i, size in enumerate(sizes))
    write_model_headers(tmp_path / "made", ModelShape("odd", {}, tensors))
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    shards = [index["weight_map"][tensor.name] for tensor in tensors]
    assert shards == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 1, 2, 3, 4)]
