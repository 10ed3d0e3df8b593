"""Converting spellings: no value changes, what would lose is refused before a byte is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.checkpoint.convert import (
    ConvertOptions,
    ConvertSummary,
    Dialect,
    ScaleStorage,
    convert_checkpoint,
)
from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import CONFIG_NAME, MODELOPT_NAME, read_checkpoint
from blockscale.checkpoint.schema import read_layers
from blockscale.checkpoint.tensors import read_block_scaled
from blockscale.errors import CheckpointError
from blockscale.formats import FP8_128X128_UE8M0, ScaleFormat
from blockscale.planning.policy import Exactness
from blockscale.reference import dequantize, requantize

if TYPE_CHECKING:
    from pathlib import Path

HF, CT, MO = Dialect
KEEP, FP32, E8M0 = ScaleStorage
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def ue8m0_checkpoint(float_checkpoint: Path, tmp_path: Path) -> Path:
    target = tmp_path / "ue8m0"
    quantize_checkpoint(
        read_checkpoint(float_checkpoint), target, QuantizeOptions(FP8_128X128_UE8M0)
    )
    return target


def convert(source: Path, target: Path, dialect: Dialect, storage: ScaleStorage = KEEP) -> Path:
    convert_checkpoint(read_checkpoint(source), target, ConvertOptions(dialect, storage))
    return target


def lossy(source: Path, target: Path, dialect: Dialect = HF) -> ConvertSummary:
    options = ConvertOptions(dialect, E8M0, Exactness.ALLOW_LOSSY)
    return convert_checkpoint(read_checkpoint(source), target, options)


def values(folder: Path) -> dict[str, torch.Tensor]:
    layers = read_layers(read_checkpoint(folder)).quantized
    return {layer.name: dequantize(read_block_scaled(layer)) for layer in layers}


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the checksums, which list the others."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "SHA256SUMS"}


def write(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    declared: dict[str, Any] | None,
    modelopt: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama"}
    if declared is not None:
        config["quantization_config"] = declared
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    if modelopt is not None:
        (folder / MODELOPT_NAME).write_text(json.dumps(modelopt, indent=2) + "\n")
    return folder


def codes(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("dialect", "storage"),
    [(HF, KEEP), (HF, FP32), (HF, E8M0), (CT, KEEP), (CT, FP32), (MO, KEEP), (MO, FP32)],
)
def test_no_value_changes(
    ue8m0_checkpoint: Path, tmp_path: Path, dialect: Dialect, storage: ScaleStorage
) -> None:
    converted = values(convert(ue8m0_checkpoint, tmp_path / "out", dialect, storage))
    original = values(ue8m0_checkpoint)
    assert converted.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(converted[name], value)


@pytest.mark.parametrize("path", [(CT,), (MO,), (CT, MO)], ids=str)
def test_there_and_back_gives_the_same_files(
    fp8_checkpoint: Path, tmp_path: Path, path: tuple[Dialect, ...]
) -> None:
    folder = fp8_checkpoint
    for step, dialect in enumerate(path):
        folder = convert(folder, tmp_path / str(step), dialect)
    back = convert(folder, tmp_path / "back", HF)
    if len(path) == 1:
        assert files(back) == files(fp8_checkpoint)
    shard = "model.safetensors"
    assert (back / shard).read_bytes() == (fp8_checkpoint / shard).read_bytes()


def test_e8m0_and_back_gives_the_same_files(ue8m0_checkpoint: Path, tmp_path: Path) -> None:
    there = convert(ue8m0_checkpoint, tmp_path / "there", HF, E8M0)
    assert {t.dtype for n, t in load_file(there / "model.safetensors").items() if "scale" in n} == {
        torch.float8_e8m0fnu
    }
    back = convert(there, tmp_path / "back", HF, FP32)
    assert files(back) == files(ue8m0_checkpoint)


V3 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
PB_WO = {"quantization": {"quant_algo": "fp8_pb_wo", "exclude_modules": ["lm_head"]}}
SOURCES = {
    "deepseek names": (
        {"a.weight": codes(128, 128), "a.scale": torch.ones(1, 1)},
        V3,
        None,
        [CT, MO],
    ),
    "modelopt, its own file only": (
        {"a.weight": codes(192, 128), "a.weight_scale": torch.ones(2, 1, 1, 1)},
        None,
        PB_WO,
        [HF, CT],
    ),
    "modelopt, 2-D": (
        {"a.weight": codes(192, 128), "a.weight_scale": torch.ones(2, 1)},
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "ignore": ["lm_head"]},
        None,
        [HF, CT],
    ),
    "mxfp8 in E8M0": (
        {
            "a.weight": codes(16, 64),
            "a.weight_scale_inv": torch.ones(16, 2).to(torch.float8_e8m0fnu),
        },
        {"quant_method": "mxfp8", "ignored_layers": ["lm_head"]},
        None,
        [CT, MO],
    ),
    "compressed-tensors, bf16 scales": (
        {"a.weight": codes(128, 128), "a.weight_scale": torch.ones(1, 1).to(torch.bfloat16)},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 8,
                        "type": "float",
                        "strategy": "block",
                        "block_structure": [128, 128],
                    },
                }
            },
            "ignore": ["re:.*lm_head"],
        },
        None,
        [HF],
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_dialect_goes_there_and_back(name: str, tmp_path: Path) -> None:
    tensors, declared, modelopt, targets = SOURCES[name]
    source = write(tmp_path / "source", tensors, declared, modelopt)
    home = HF if declared and "fp8" in declared["quant_method"] else MO
    home = CT if declared and declared["quant_method"] == CT.value else home
    for target in targets:
        there = convert(source, tmp_path / f"to-{target.value}", target)
        assert values(there)["a"].equal(values(source)["a"])
        back = convert(there, tmp_path / f"from-{target.value}", home)
        assert files(back) == files(source)


def test_compressed_tensors_spelling(fp8_checkpoint: Path, tmp_path: Path) -> None:
    out = convert(fp8_checkpoint, tmp_path / "ct", CT)
    tensors = load_file(out / "model.safetensors")
    assert f"{DOWN}.weight_scale" in tensors
    assert not any(name.endswith("_scale_inv") for name in tensors)
    declared = json.loads((out / "config.json").read_text())["quantization_config"]
    weights = declared["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["block_structure"]) == ("block", [128, 128])
    assert "model.embed_tokens" in declared["ignore"]


def test_modelopt_spelling(fp8_checkpoint: Path, tmp_path: Path) -> None:
    out = convert(fp8_checkpoint, tmp_path / "mo", MO)
    scale = load_file(out / "model.safetensors")[f"{DOWN}.weight_scale"]
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (2, 1, 3, 1))
    quantization = json.loads((out / MODELOPT_NAME).read_text())["quantization"]
    assert quantization["quant_algo"] == "FP8_PB_WO"
    assert set(quantization["exclude_modules"]) == {"model.embed_tokens", "lm_head"}
    assert not (convert(out, tmp_path / "back", HF) / MODELOPT_NAME).exists()


def test_the_skip_list_says_what_is_true_for_every_reader(tmp_path: Path) -> None:
    """MiniMax's ``gate`` names no module to compressed-tensors, which wants whole names."""
    tensors = {
        "m.0.gate.weight": torch.ones(4, 8),
        "m.0.gate_proj.weight": codes(128, 128),
        "m.0.gate_proj.weight_scale_inv": torch.ones(1, 1),
    }
    declared = {**V3, "modules_to_not_convert": ["gate", "lm_head"]}
    out = convert(write(tmp_path / "in", tensors, declared), tmp_path / "out", CT)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["m.0.gate", "lm_head"]
    assert read_layers(read_checkpoint(out)).findings == ()


REFUSED = {
    "E8M0 in compressed-tensors": (
        {"a.weight": codes(128, 128), "a.weight_scale_inv": torch.ones(1, 1)},
        V3,
        (CT, E8M0),
        ["compressed-tensors does not read 128x128 scales in F8_E8M0", "--scales fp32"],
    ),
    "32x32 in ModelOpt, and stacked": (
        {"e.w2_weight": codes(2, 64, 64), "e.w2_weight_scale_inv": torch.ones(2, 2, 2)},
        {**V3, "weight_block_size": [32, 32]},
        (MO, KEEP),
        ["128x128 and 1x32 blocks only, not 32x32", "stacked experts", "e.w2_weight"],
    ),
    "static activations": (
        {
            "a.weight": codes(128, 128),
            "a.weight_scale_inv": torch.ones(1, 1),
            "a.activation_scale": torch.ones(()),
        },
        {**V3, "activation_scheme": "static"},
        (CT, KEEP),
        ["stores scales for activations"],
    ),
    "FP4 experts": (
        {
            "a.weight": codes(128, 128),
            "a.scale": torch.ones(1, 1),
            "e.weight": torch.zeros(32, 32, dtype=torch.int8),
            "e.scale": torch.ones(32, 2).to(torch.float8_e8m0fnu),
        },
        V3,
        (CT, KEEP),
        ["packed FP4", "e.weight"],
    ),
    "MXFP8 in float32, still called mxfp8": (
        {"a.weight": codes(4, 64), "a.weight_scale": torch.full((4, 2), 127).to(torch.uint8)},
        {"quant_method": "mxfp8"},
        (HF, FP32),
        ["hf-fp8 stores the scales of 1x32 blocks as E8M0"],
    ),
    "MXFP8 in float32": (
        {"a.weight": codes(4, 64), "a.weight_scale": torch.full((4, 2), 127).to(torch.uint8)},
        {"quant_method": "mxfp8"},
        (CT, FP32),
        ["1x32 blocks as E8M0"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_spelling_cannot_say_is_refused(name: str, tmp_path: Path) -> None:
    tensors, declared, (dialect, storage), words = REFUSED[name]
    source = write(tmp_path / "source", tensors, declared)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", dialect, storage)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_would_lose_is_refused_before_writing(fp8_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no powers of two.*--allow-lossy") as caught:
        convert(fp8_checkpoint, tmp_path / "out", HF, E8M0)
    assert caught.value.tensor is not None
    assert caught.value.tensor.endswith("weight_scale_inv")
    assert not (tmp_path / "out").exists()


def test_loss_that_is_allowed_is_requantized_and_measured(
    fp8_checkpoint: Path, tmp_path: Path
) -> None:
    """Codes change with their scales; the error printed is that of the files."""
    summary = lossy(fp8_checkpoint, tmp_path / "out")
    before, after = values(fp8_checkpoint), values(tmp_path / "out")
    layers = {x.name: x for x in read_layers(read_checkpoint(fp8_checkpoint)).quantized}
    assert {loss.layer for loss in summary.losses} == set(before)
    for loss in summary.losses:
        wanted = requantize(read_block_scaled(layers[loss.layer]), FP8_128X128_UE8M0)
        assert torch.equal(after[loss.layer], dequantize(wanted.tensor))
        assert loss.error.relative_error == pytest.approx(wanted.relative_error, rel=1e-6)
        assert loss.error.max_error == wanted.max_error
        # Rounding scales alone would cost 20 to 60 %.
        assert 0 < loss.error.relative_error < 0.03
    errors = [loss.error.relative_error for loss in summary.losses]
    assert errors == sorted(errors, reverse=True)
    stored = read_layers(read_checkpoint(tmp_path / "out"))
    assert {layer.scale.dtype for layer in stored.quantized} == {"F8_E8M0"}
    assert {layer.format.scale for layer in stored.quantized} == {ScaleFormat.UE8M0}
    assert stored.findings == ()


def test_only_layers_that_must_change_do(ue8m0_checkpoint: Path, tmp_path: Path) -> None:
    name = f"{DOWN}.weight_scale_inv"
    tensors = load_file(ue8m0_checkpoint / "model.safetensors")
    tensors[name][0, 0] = 1.3229
    save_file(tensors, ue8m0_checkpoint / "model.safetensors")
    summary = lossy(ue8m0_checkpoint, tmp_path / "out")
    assert [loss.layer for loss in summary.losses] == [DOWN]
    assert summary.rewritten == 1
    before, after = values(ue8m0_checkpoint), values(tmp_path / "out")
    assert torch.equal(
        before["model.layers.0.self_attn.o_proj"], after["model.layers.0.self_attn.o_proj"]
    )


def test_lossy_stacks_with_scales_before_weights_in_other_files(tmp_path: Path) -> None:
    """As transformers saves: all scales first; here each tensor in a file of its own."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "a.experts.w2_scale_inv": torch.rand(3, 2, 2, generator=generator) + 0.1,
        "a.experts.w2": codes(3, 192, 160),
    }
    source = write(tmp_path / "source", tensors, V3)
    options = ConvertOptions(HF, E8M0, Exactness.ALLOW_LOSSY, max_shard_bytes=1)
    (loss,) = convert_checkpoint(read_checkpoint(source), tmp_path / "out", options).losses
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    (layer,) = read_layers(read_checkpoint(source)).quantized
    wanted = requantize(read_block_scaled(layer), FP8_128X128_UE8M0)
    assert torch.equal(values(tmp_path / "out")[layer.name], dequantize(wanted.tensor))
    assert loss.error.max_error == wanted.max_error


def test_a_float_checkpoint_is_refused(float_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="declares not quantized"):
        convert(float_checkpoint, tmp_path / "out", HF)


def test_a_declaration_without_data_is_refused(fp8_checkpoint: Path, tmp_path: Path) -> None:
    save_file({"norm.weight": torch.ones(4)}, fp8_checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="declares block FP8, and no tensor is in it"):
        convert(fp8_checkpoint, tmp_path / "out", HF)
