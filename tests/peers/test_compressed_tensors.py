"""The compressed-tensors package: it reads what we write, and we read what it writes."""

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
from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.errors import CheckpointError
from blockscale.formats import FP8_128X128_FP32, MXFP8, BlockFormat
from blockscale.planning.policy import Exactness
from blockscale.reference.quantize import block_amax

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Values = dict[str, torch.Tensor]

pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")
# It says that a declaration is overwritten by the one that asks for dequantized weights.
pytestmark = pytest.mark.filterwarnings("ignore:You passed .quantization_config.")

SIZES = {"whole blocks": (256, 384), "ragged": (192, 320)}


def dequantized(folder: Path) -> torch.nn.Module:
    """The checkpoint as compressed-tensors decompresses it."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("fmt", [FP8_128X128_FP32, MXFP8], ids=str)
def test_it_reads_what_we_write(
    fmt: BlockFormat,
    sizes: str,
    tmp_path: Path,
    save_llama: Callable[[int, int], Path],
    our_values: Callable[[Path], Values],
    assert_same_weights: Callable[[torch.nn.Module, Values], None],
) -> None:
    source = save_llama(*SIZES[sizes])
    quantize_checkpoint(read_checkpoint(source), tmp_path / "q", QuantizeOptions(fmt))
    storage = ScaleStorage.E8M0 if fmt is MXFP8 else ScaleStorage.KEEP
    options = ConvertOptions(Dialect.COMPRESSED_TENSORS, storage)
    convert_checkpoint(read_checkpoint(tmp_path / "q"), tmp_path / "ct", options)
    assert_same_weights(dequantized(tmp_path / "ct"), our_values(tmp_path / "ct"))
    for name, value in our_values(tmp_path / "q").items():
        assert torch.equal(our_values(tmp_path / "ct")[name], value)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("preset", ["FP8_BLOCK", "MXFP8"])
def test_we_read_what_it_writes(
    preset: str,
    sizes: str,
    tmp_path: Path,
    save_llama: Callable[[int, int], Path],
    our_values: Callable[[Path], Values],
    assert_same_weights: Callable[[torch.nn.Module, Values], None],
) -> None:
    folder = compressed(save_llama(*SIZES[sizes]), preset, tmp_path / "ct")
    assert_same_weights(dequantized(folder), our_values(folder))


@pytest.mark.parametrize("preset", ["FP8_BLOCK", "MXFP8"])
def test_what_it_writes_is_the_same_in_our_other_spellings(
    preset: str,
    tmp_path: Path,
    save_llama: Callable[[], Path],
    our_values: Callable[[Path], Values],
    assert_same_weights: Callable[[torch.nn.Module, Values], None],
) -> None:
    """To ModelOpt's spelling, from there to Hugging Face's, and back into the package."""
    theirs = compressed(save_llama(), preset, tmp_path / "ct")
    folder = theirs
    storage = ScaleStorage.FP32 if preset == "FP8_BLOCK" else ScaleStorage.KEEP
    for dialect in (Dialect.MODELOPT, Dialect.HF_FP8, Dialect.COMPRESSED_TENSORS):
        target = tmp_path / dialect.value
        convert_checkpoint(read_checkpoint(folder), target, ConvertOptions(dialect, storage))
        folder = target
    assert_same_weights(dequantized(folder), our_values(theirs))


def test_it_misreads_e8m0_in_blocks_and_so_we_refuse_to_write_them(
    fp8_checkpoint: Path, tmp_path: Path
) -> None:
    """The package decompresses into the dtype of the scales, and E8M0 has neither sign nor zero."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(256, 256, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.25, 0.5], [2.0, 4.0]])
    right = codes.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact = compressor.decompress({"weight": codes, "weight_scale": scale}, scheme)["weight"]
    assert torch.equal(exact, right)
    stored = {"weight": codes, "weight_scale": scale.to(torch.float8_e8m0fnu)}
    misread = compressor.decompress(stored, scheme)["weight"]
    assert misread.dtype is torch.float8_e8m0fnu
    assert float((misread.float() != right).float().mean()) > 0.9
    options = ConvertOptions(Dialect.COMPRESSED_TENSORS, ScaleStorage.E8M0, Exactness.ALLOW_LOSSY)
    with pytest.raises(CheckpointError, match="compressed-tensors does not read"):
        convert_checkpoint(read_checkpoint(fp8_checkpoint), tmp_path / "out", options)


def compressed(source: Path, preset: str, target: Path) -> Path:
    """Quantized and saved by the package; it leaves finding the scales to its user."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.FROZEN,
    )
    apply_quantization_config(model, config)
    block = FP8_128X128_FP32.block if preset == "FP8_BLOCK" else MXFP8.block
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            scale = block_amax(module.weight.detach(), block) / 448
            if preset == "MXFP8":
                scale = 2.0 ** torch.ceil(torch.log2(scale))
            assert scale.shape == module.weight_scale.shape
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)
    return target
