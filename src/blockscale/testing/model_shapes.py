"""Checkpoints shaped like famous models: names, dtypes and shapes, and no data.

``write_model_headers`` makes sparse safetensors files: headers are real, the bytes behind them are
holes that take no disk and read as zeros. Every linear layer is there, norms only in part. Names
and shapes: the models' config.json and index files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from blockscale.formats import BlockShape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_BLOCK = BlockShape(128, 128)
_DTYPE_BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A tensor by name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model: config.json and all tensors in file order."""

    name: str
    config: Mapping[str, Any]
    tensors: tuple[TensorShape, ...]


def write_model_headers(directory: Path, model: ModelShape) -> None:
    """Write config.json, sparse shards of about ``SHARD_BYTES`` and their index.

    Needs a file system with holes (ext4, xfs, APFS, tmpfs); ``directory`` is made if missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(model.config), indent=2))
    shards = list(_shards(model.tensors))
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file_name, shard)
        weight_map.update((tensor.name, file_name) for tensor in shard)
    document = {
        "metadata": {"total_size": sum(tensor.length for tensor in model.tensors)},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(document))


def minimax_m25(layers: int = 62) -> ModelShape:
    """MiniMax-M2.5: 62 layers, 256 experts of 1536, 48 attention heads, 8 for keys and values."""
    hidden, experts, intermediate = 3072, 256, 1536
    tensors = [TensorShape("model.embed_tokens.weight", "BF16", (200064, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        tensors += _linear(f"{attention}.q_proj", 6144, hidden)
        tensors += _linear(f"{attention}.k_proj", 1024, hidden)
        tensors += _linear(f"{attention}.v_proj", 1024, hidden)
        tensors += _linear(f"{attention}.o_proj", hidden, 6144)
        moe = f"{prefix}.block_sparse_moe"
        tensors.append(TensorShape(f"{moe}.gate.weight", "F32", (experts, hidden)))
        tensors.append(TensorShape(f"{moe}.e_score_correction_bias", "F32", (experts,)))
        for expert in range(experts):
            tensors += _linear(f"{moe}.experts.{expert}.w1", intermediate, hidden)
            tensors += _linear(f"{moe}.experts.{expert}.w2", hidden, intermediate)
            tensors += _linear(f"{moe}.experts.{expert}.w3", intermediate, hidden)
        tensors += _norms(prefix, hidden)
    tensors.append(TensorShape("model.norm.weight", "BF16", (hidden,)))
    tensors.append(TensorShape("lm_head.weight", "BF16", (200064, hidden)))
    config = {
        "model_type": "minimax_m2",
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": experts,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    }
    return ModelShape("MiniMax-M2.5", config, tuple(tensors))


def deepseek_v3(layers: int = 61) -> ModelShape:
    """DeepSeek-V3 without its MTP layer: 45,000 FP8 weights and as many scales.

    More or fewer ``layers`` than its 61 give a larger or smaller checkpoint of the same kind.
    """
    hidden, heads, experts = 7168, 128, 256
    tensors = [TensorShape("model.embed_tokens.weight", "BF16", (129280, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        tensors += _linear(f"{attention}.q_a_proj", 1536, hidden)
        tensors.append(TensorShape(f"{attention}.q_a_layernorm.weight", "BF16", (1536,)))
        tensors += _linear(f"{attention}.q_b_proj", heads * 192, 1536)
        tensors += _linear(f"{attention}.kv_a_proj_with_mqa", 512 + 64, hidden)
        tensors.append(TensorShape(f"{attention}.kv_a_layernorm.weight", "BF16", (512,)))
        tensors += _linear(f"{attention}.kv_b_proj", heads * 256, 512)
        tensors += _linear(f"{attention}.o_proj", hidden, heads * 128)
        dense_layers = 3
        if layer < dense_layers:
            tensors += _gated(f"{prefix}.mlp", hidden, 18432)
        else:
            tensors.append(TensorShape(f"{prefix}.mlp.gate.weight", "BF16", (experts, hidden)))
            tensors.append(
                TensorShape(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (experts,))
            )
            tensors += _gated(f"{prefix}.mlp.shared_experts", hidden, 2048)
            for expert in range(experts):
                tensors += _gated(f"{prefix}.mlp.experts.{expert}", hidden, 2048)
        tensors += _norms(prefix, hidden)
    tensors.append(TensorShape("model.norm.weight", "BF16", (hidden,)))
    tensors.append(TensorShape("lm_head.weight", "BF16", (129280, hidden)))
    config = {
        "model_type": "deepseek_v3",
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }
    return ModelShape("DeepSeek-V3", config, tuple(tensors))


def qwen3_8b() -> ModelShape:
    """Qwen3-8B-FP8: dense, 36 layers, attention 32 heads and 8 for keys and values."""
    hidden, layers = 4096, 36
    tensors = [TensorShape("model.embed_tokens.weight", "BF16", (151936, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        tensors += _linear(f"{attention}.q_proj", 4096, hidden)
        tensors += _linear(f"{attention}.k_proj", 1024, hidden)
        tensors += _linear(f"{attention}.v_proj", 1024, hidden)
        tensors += _linear(f"{attention}.o_proj", hidden, 4096)
        tensors += _gated(f"{prefix}.mlp", hidden, 12288)
        tensors += _norms(prefix, hidden)
    tensors.append(TensorShape("model.norm.weight", "BF16", (hidden,)))
    tensors.append(TensorShape("lm_head.weight", "BF16", (151936, hidden)))
    config = {
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        },
    }
    return ModelShape("Qwen3-8B-FP8", config, tuple(tensors))


def qwen3_30b_a3b() -> ModelShape:
    """Qwen3-30B-A3B-FP8: 48 layers, 128 experts of 768."""
    return _qwen3_moe("Qwen3-30B-A3B-FP8", Qwen3Moe(2048, 32, 4, 128, 768, 48))


def qwen3_235b_a22b() -> ModelShape:
    """Qwen3-235B-A22B-FP8: 94 layers, 128 experts of 1536."""
    return _qwen3_moe("Qwen3-235B-A22B-FP8", Qwen3Moe(4096, 64, 4, 128, 1536, 94))


def qwen3_coder_480b() -> ModelShape:
    """Qwen3-Coder-480B-A35B-FP8: 62 layers, 160 experts of 2560."""
    return _qwen3_moe("Qwen3-Coder-480B-A35B-FP8", Qwen3Moe(6144, 96, 8, 160, 2560, 62))


@dataclass(frozen=True, slots=True)
class Qwen3Moe:
    """The sizes of a Qwen3 mixture of experts; attention heads are 128 wide."""

    hidden: int
    heads: int
    kv_heads: int
    experts: int
    intermediate: int
    layers: int


def _qwen3_moe(name: str, size: Qwen3Moe) -> ModelShape:
    hidden, vocabulary, head = size.hidden, 151936, 128
    tensors = [TensorShape("model.embed_tokens.weight", "BF16", (vocabulary, hidden))]
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        tensors += _linear(f"{attention}.q_proj", size.heads * head, hidden)
        tensors += _linear(f"{attention}.k_proj", size.kv_heads * head, hidden)
        tensors += _linear(f"{attention}.v_proj", size.kv_heads * head, hidden)
        tensors += _linear(f"{attention}.o_proj", hidden, size.heads * head)
        tensors.append(TensorShape(f"{prefix}.mlp.gate.weight", "BF16", (size.experts, hidden)))
        for expert in range(size.experts):
            tensors += _gated(f"{prefix}.mlp.experts.{expert}", hidden, size.intermediate)
        tensors += _norms(prefix, hidden)
    tensors.append(TensorShape("model.norm.weight", "BF16", (hidden,)))
    tensors.append(TensorShape("lm_head.weight", "BF16", (vocabulary, hidden)))
    config = {
        "model_type": "qwen3_moe",
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": head,
        "num_experts": size.experts,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "gate"],
        },
    }
    return ModelShape(name, config, tuple(tensors))


def _linear(name: str, n: int, k: int) -> list[TensorShape]:
    return [
        TensorShape(f"{name}.weight", "F8_E4M3", (n, k)),
        TensorShape(f"{name}.weight_scale_inv", "F32", _BLOCK.grid(n, k)),
    ]


def _gated(prefix: str, hidden: int, intermediate: int) -> list[TensorShape]:
    return [
        *_linear(f"{prefix}.gate_proj", intermediate, hidden),
        *_linear(f"{prefix}.up_proj", intermediate, hidden),
        *_linear(f"{prefix}.down_proj", hidden, intermediate),
    ]


def _norms(prefix: str, hidden: int) -> list[TensorShape]:
    return [
        TensorShape(f"{prefix}.input_layernorm.weight", "BF16", (hidden,)),
        TensorShape(f"{prefix}.post_attention_layernorm.weight", "BF16", (hidden,)),
    ]


def _shards(tensors: tuple[TensorShape, ...]) -> Iterator[list[TensorShape]]:
    shard: list[TensorShape] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.length > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.length
    yield shard


def _write_shard(path: Path, tensors: list[TensorShape]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.length
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
