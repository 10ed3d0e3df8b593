"""llm-compressor, from its own environment (``make test-peers``): FP8_BLOCK and MXFP8 on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.checkpoint.convert import (
    ConvertOptions,
    Dialect,
    ScaleStorage,
    convert_checkpoint,
)
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.schema import read_layers
from blockscale.checkpoint.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Values = dict[str, torch.Tensor]

pytestmark = pytest.mark.peers


def dequantized(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(run_compressed=False)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config
    )


def oneshot(source: Path, scheme: str, target: Path) -> Path:
    import llmcompressor
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    llmcompressor.oneshot(model=model, recipe=recipe)
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize(("scheme", "scales"), [("FP8_BLOCK", "BF16"), ("MXFP8", "U8")])
def test_we_read_and_respell_what_it_writes(
    scheme: str,
    scales: str,
    tmp_path: Path,
    save_llama: Callable[[], Path],
    our_values: Callable[[Path], Values],
    assert_same_weights: Callable[[torch.nn.Module, Values], None],
) -> None:
    from transformers import AutoModelForCausalLM

    source = save_llama()
    theirs = oneshot(source, scheme, tmp_path / "ct")
    checkpoint = read_checkpoint(theirs)
    assert {layer.scale.dtype for layer in read_layers(checkpoint).quantized} == {scales}
    assert_same_weights(dequantized(theirs), our_values(theirs))
    # Its codes fit its bf16 scales: the error is that of one FP8 rounding.
    result = verify_checkpoint(checkpoint, read_checkpoint(source))
    assert not result.has_fault
    for check in result.layers:
        assert check.error is not None
        assert 0.02 < check.error.relative_error < 0.035
    storage = ScaleStorage.FP32 if scheme == "FP8_BLOCK" else ScaleStorage.KEEP
    convert_checkpoint(checkpoint, tmp_path / "hf", ConvertOptions(Dialect.HF_FP8, storage))
    for name, value in our_values(tmp_path / "hf").items():
        assert torch.equal(value, our_values(theirs)[name])
    if scheme == "FP8_BLOCK":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
        assert_same_weights(model, our_values(theirs))
