"""NVIDIA ModelOpt, from its own environment (``make test-peers``): FP8_PB_WO on a CPU."""

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
from blockscale.checkpoint.quantize import quantize_checkpoint
from blockscale.checkpoint.read import MODELOPT_NAME, read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Values = dict[str, torch.Tensor]

pytestmark = pytest.mark.peers


def exported(source: Path, target: Path) -> Path:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model = mtq.quantize(model, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, None)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=str(target))
    return target


def dequantized(folder: Path) -> Values:
    """The files as ModelOpt's own tensor class understands them, in float32."""
    from modelopt.torch.quantization.qtensor import FP8QTensor

    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, scale in tensors.items():
        if name.endswith(".weight_scale"):
            codes = tensors[name.removesuffix("_scale")]
            rows, _, columns, _ = scale.shape
            packed = FP8QTensor(codes.shape, torch.float32, codes)
            found[name.removesuffix(".weight_scale")] = packed.dequantize(
                torch.float32,
                scale=scale.reshape(rows, columns),
                block_sizes={-1: 128, -2: 128},
            )
    return found


def test_we_read_and_respell_what_it_writes(
    tmp_path: Path,
    save_llama: Callable[[], Path],
    our_values: Callable[[Path], Values],
    assert_same_weights: Callable[[torch.nn.Module, Values], None],
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = exported(save_llama(), tmp_path / "mo")
    ours = our_values(theirs)
    expected = dequantized(theirs)
    assert len(ours) == len(expected) == 7
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    convert_checkpoint(read_checkpoint(theirs), tmp_path / "hf", ConvertOptions(Dialect.HF_FP8))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    assert_same_weights(model, ours)
    back = tmp_path / "back"
    convert_checkpoint(read_checkpoint(tmp_path / "hf"), back, ConvertOptions(Dialect.MODELOPT))
    for name in ("model.safetensors", "config.json", MODELOPT_NAME):
        if name == "model.safetensors":
            before, after = load_file(theirs / name), load_file(back / name)
            assert before.keys() == after.keys()
            assert all(torch.equal(bits(before[key]), bits(after[key])) for key in before)
        else:
            assert json.loads((back / name).read_text()) == json.loads((theirs / name).read_text())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_it_understands_what_we_write(
    tmp_path: Path, save_llama: Callable[[], Path], our_values: Callable[[Path], Values]
) -> None:
    quantize_checkpoint(read_checkpoint(save_llama()), tmp_path / "q")
    options = ConvertOptions(Dialect.MODELOPT, ScaleStorage.KEEP)
    convert_checkpoint(read_checkpoint(tmp_path / "q"), tmp_path / "mo", options)
    theirs = dequantized(tmp_path / "mo")
    ours = our_values(tmp_path / "q")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    declared = json.loads((tmp_path / "mo" / MODELOPT_NAME).read_text())["quantization"]
    assert set(declared) == {"quant_algo", "kv_cache_quant_algo", "exclude_modules"}
