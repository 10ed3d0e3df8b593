"""Converting spellings: no value changes, what would lose is refused before a byte is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from blockscale.checkpoint.convert import (
    ConvertOptions,
    Dialect,
    ScaleStorage,
    convert_checkpoint,
)
from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.schema import read_layers
from blockscale.checkpoint.tensors import read_block_scaled
from blockscale.errors import CheckpointError
from blockscale.formats import FP8_128X128_UE8M0, ScaleFormat
from blockscale.reference import dequantize

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def ue8m0_checkpoint(float_checkpoint: Path, tmp_path: Path) -> Path:
    target = tmp_path / "ue8m0"
    quantize_checkpoint(
        read_checkpoint(float_checkpoint), target, QuantizeOptions(FP8_128X128_UE8M0)
    )
    return target


def convert(source: Path, target: Path, dialect: Dialect, storage: ScaleStorage) -> Path:
    convert_checkpoint(read_checkpoint(source), target, ConvertOptions(dialect, storage))
    return target


def values(folder: Path) -> dict[str, torch.Tensor]:
    layers = read_layers(read_checkpoint(folder)).quantized
    return {layer.name: dequantize(read_block_scaled(layer)) for layer in layers}


@pytest.mark.parametrize("storage", list(ScaleStorage))
@pytest.mark.parametrize("dialect", list(Dialect))
def test_no_value_changes(
    ue8m0_checkpoint: Path, tmp_path: Path, dialect: Dialect, storage: ScaleStorage
) -> None:
    converted = values(convert(ue8m0_checkpoint, tmp_path / "out", dialect, storage))
    original = values(ue8m0_checkpoint)
    assert converted.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(converted[name], value)


@pytest.mark.parametrize("storage", [ScaleStorage.KEEP, ScaleStorage.E8M0])
def test_there_and_back_gives_the_same_bytes(
    ue8m0_checkpoint: Path, tmp_path: Path, storage: ScaleStorage
) -> None:
    there = convert(ue8m0_checkpoint, tmp_path / "there", Dialect.COMPRESSED_TENSORS, storage)
    last = ScaleStorage.KEEP if storage is ScaleStorage.KEEP else ScaleStorage.FP32
    back = convert(there, tmp_path / "back", Dialect.HF_FP8, last)
    first = (ue8m0_checkpoint / "model.safetensors").read_bytes()
    assert (back / "model.safetensors").read_bytes() == first


def test_names_and_config_are_the_dialects(fp8_checkpoint: Path, tmp_path: Path) -> None:
    out = convert(fp8_checkpoint, tmp_path / "ct", Dialect.COMPRESSED_TENSORS, ScaleStorage.KEEP)
    tensors = load_file(out / "model.safetensors")
    assert "model.layers.0.mlp.down_proj.weight_scale" in tensors
    assert not any(name.endswith("_scale_inv") for name in tensors)
    declared = json.loads((out / "config.json").read_text())["quantization_config"]
    weights = declared["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["block_structure"]) == ("block", [128, 128])
    assert "model.embed_tokens" in declared["ignore"]


def test_e8m0_is_stored_as_e8m0(ue8m0_checkpoint: Path, tmp_path: Path) -> None:
    out = convert(ue8m0_checkpoint, tmp_path / "out", Dialect.HF_FP8, ScaleStorage.E8M0)
    layers = read_layers(read_checkpoint(out)).quantized
    assert {layer.scale.dtype for layer in layers} == {"F8_E8M0"}
    assert {layer.format.scale for layer in layers} == {ScaleFormat.UE8M0}


def test_what_would_lose_is_refused_before_writing(fp8_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no powers of two") as caught:
        convert(fp8_checkpoint, tmp_path / "out", Dialect.HF_FP8, ScaleStorage.E8M0)
    assert caught.value.tensor is not None
    assert caught.value.tensor.endswith("weight_scale_inv")
    assert not (tmp_path / "out").exists()


def test_a_float_checkpoint_is_refused(float_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not quantized"):
        convert(float_checkpoint, tmp_path / "out", Dialect.HF_FP8, ScaleStorage.KEEP)
