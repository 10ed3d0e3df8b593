"""Experts read one at a time, however they are stored."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint.experts import StoredExperts, stored_experts
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import Merging, RequestOptions, merged_layers
from blockscale.checkpoint.schema import read_layers
from blockscale.errors import CheckpointError
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.reference import expert_of, quantize

if TYPE_CHECKING:
    from pathlib import Path

    from blockscale.tensor import BlockScaledTensor

EXPERTS, INNER, HIDDEN = 12, 128, 200
PREFIX = "model.layers.0.mlp.experts"


def stack(rows: int, columns: int, seed: int) -> BlockScaledTensor:
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(EXPERTS, rows, columns, generator=generator), FP8_128X128_FP32)


GATE_UP, DOWN = stack(2 * INNER, HIDDEN, 0), stack(HIDDEN, INNER, 1)


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors"
    )
    config = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def one_by_one() -> dict[str, torch.Tensor]:
    tensors = {}
    for expert in range(EXPERTS):
        rows = {
            "gate_proj": (GATE_UP, slice(0, INNER), slice(0, 1)),
            "up_proj": (GATE_UP, slice(INNER, None), slice(1, None)),
            "down_proj": (DOWN, slice(None), slice(None)),
        }
        for leaf, (whole, data, scales) in rows.items():
            name = f"{PREFIX}.{expert}.{leaf}.weight"
            tensors[name] = whole.data[expert, data]
            tensors[name + "_scale_inv"] = whole.scales[expert, scales]
    return tensors


def stacked() -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}.{leaf}{suffix}": value
        for leaf, whole in (("gate_up_proj", GATE_UP), ("down_proj", DOWN))
        for suffix, value in (("", whole.data), ("_scale_inv", whole.scales))
    }


def stored(folder: Path) -> dict[str, StoredExperts]:
    checkpoint = read_checkpoint(folder)
    options = RequestOptions(DType.BFLOAT16, merging=Merging.MODULE)
    merged = merged_layers(checkpoint, read_layers(checkpoint), options)
    return {layer.whole.request.name: stored_experts(layer) for layer in merged.layers}


@pytest.mark.parametrize("make", [one_by_one, stacked])
def test_each_expert_comes_with_its_parts_in_order(make: object, tmp_path: Path) -> None:
    """Expert 10 is not read before expert 2, and gate comes before up."""
    found = stored(write(tmp_path / "model", make()))  # type: ignore[operator]
    assert set(found) == {f"{PREFIX}.w13", f"{PREFIX}.w2"}
    for name, whole in ((f"{PREFIX}.w13", GATE_UP), (f"{PREFIX}.w2", DOWN)):
        assert found[name].stacked == (make is stacked)
        for expert in range(EXPERTS):
            parts = list(found[name].read(expert))
            wanted = expert_of(whole, expert)
            data = torch.cat([part.data.view(torch.uint8) for part in parts])
            assert torch.equal(data, wanted.data.view(torch.uint8))
            assert torch.equal(torch.cat([part.scales for part in parts]), wanted.scales)


def test_a_missing_number_is_named(tmp_path: Path) -> None:
    tensors = {name: value for name, value in one_by_one().items() if ".experts.7." not in name}
    with pytest.raises(CheckpointError, match="number 7 is missing"):
        stored(write(tmp_path / "model", tensors))
