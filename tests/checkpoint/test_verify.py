"""What verify finds in scales and data, and that its numbers are right."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.checkpoint import scales
from blockscale.checkpoint import tensors as tensors_module
from blockscale.checkpoint.compare import DataError
from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_bytes, read_checkpoint
from blockscale.checkpoint.scales import read_power_of_two, scale_facts
from blockscale.checkpoint.schema import read_layers
from blockscale.checkpoint.tensors import read_block_scaled
from blockscale.checkpoint.verify import Verification, verify_layers
from blockscale.errors import CheckpointError
from blockscale.formats import (
    E4M3FN,
    FP8_128X128_UE8M0,
    BlockFormat,
    BlockShape,
    PowerOfTwo,
    ScaleFormat,
)
from blockscale.reference import dequantize, quantize

if TYPE_CHECKING:
    from pathlib import Path

    from blockscale.checkpoint.header import TensorEntry

LAYER = "model.layers.0.mlp.down_proj"


def verify(folder: Path, against: Path | None = None) -> Verification:
    original = read_checkpoint(against) if against else None
    return verify_layers(read_layers(read_checkpoint(folder)), original)


def change(folder: Path, name: str, index: tuple[int, int], value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][index] = value
    save_file(tensors, folder / "model.safetensors")


def test_a_good_checkpoint_has_no_fault(fp8_checkpoint: Path) -> None:
    result = verify(fp8_checkpoint)
    assert not result.has_fault
    assert {check.scales.power_of_two for check in result.layers} == {PowerOfTwo.NO}


@pytest.mark.parametrize(
    ("value", "code", "word"),
    [
        (float("nan"), "nonfinite_scale", "NaN"),
        (float("inf"), "nonfinite_scale", "Inf"),
        (0.0, "zero_scale", "zero"),
        (-1.0, "negative_scale", "negative"),
    ],
)
def test_scale_faults_name_layer_and_tensor(
    fp8_checkpoint: Path, value: float, code: str, word: str
) -> None:
    change(fp8_checkpoint, LAYER + ".weight_scale_inv", (0, 0), value)
    faults = [f for f in verify(fp8_checkpoint).findings if f.code == code]
    assert [fault.layer for fault in faults] == [LAYER]
    assert word in faults[0].message
    assert LAYER + ".weight_scale_inv" in faults[0].message


def test_nan_codes_are_found_when_data_is_read(
    fp8_checkpoint: Path, float_checkpoint: Path
) -> None:
    tensors = load_file(fp8_checkpoint / "model.safetensors")
    tensors[LAYER + ".weight"].view(torch.uint8)[3, 5] = 0xFF
    save_file(tensors, fp8_checkpoint / "model.safetensors")
    result = verify(fp8_checkpoint, float_checkpoint)
    assert ("nan_codes", LAYER) in {(f.code, f.layer) for f in result.findings}
    assert result.layers[0].name == LAYER


def test_declared_ue8m0_is_checked_against_the_data(float_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "ue8m0"
    options = QuantizeOptions(FP8_128X128_UE8M0)
    quantize_checkpoint(read_checkpoint(float_checkpoint), target, options)
    honest = verify(target)
    assert honest.findings == ()
    assert {check.scales.power_of_two for check in honest.layers} == {PowerOfTwo.YES}
    change(target, LAYER + ".weight_scale_inv", (0, 0), 1.3229)
    assert [finding.code for finding in verify(target).findings] == ["declared_ue8m0"]


@pytest.mark.parametrize(("stored", "fault"), [(0, "subnormal_scale"), (255, "nonfinite_scale")])
def test_what_is_stored_as_e8m0_is_not_said_to_be_no_power_of_two(
    fp8_checkpoint: Path, tmp_path: Path, stored: int, fault: str
) -> None:
    source = read_checkpoint(fp8_checkpoint)
    tensors = load_file(fp8_checkpoint / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = torch.full(tensors[name].shape, stored, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    declared = {**source.config["quantization_config"], "scale_fmt": "ue8m0"}
    config = {**source.config, "quantization_config": declared}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {finding.code for finding in verify(tmp_path).findings} == {fault}


def test_reading_scales_settles_the_unknown(fp8_checkpoint: Path) -> None:
    found = read_power_of_two(read_layers(read_checkpoint(fp8_checkpoint)).quantized)
    assert set(found.values()) == {PowerOfTwo.NO}
    assert LAYER in found


def test_errors_agree_with_an_independent_computation(
    fp8_checkpoint: Path, float_checkpoint: Path
) -> None:
    stored = load_file(fp8_checkpoint / "model.safetensors")
    original = load_file(float_checkpoint / "model.safetensors")
    for check in verify(fp8_checkpoint, float_checkpoint).layers:
        codes = stored[check.name + ".weight"].float().double()
        scales = stored[check.name + ".weight_scale_inv"].double()
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        restored = codes * spread[: check.n, : check.k]
        wanted = original[check.name + ".weight"].double()
        relative = float((restored - wanted).norm() / wanted.norm())
        assert check.error is not None
        assert check.error.relative_error == pytest.approx(relative, rel=1e-5)
        assert check.error.snr_db == pytest.approx(-20 * np.log10(relative), abs=1e-3)
        assert check.error.max_error == pytest.approx(float((restored - wanted).abs().max()))


def test_the_worst_layer_comes_first(fp8_checkpoint: Path, float_checkpoint: Path) -> None:
    change(fp8_checkpoint, LAYER + ".weight_scale_inv", (0, 0), 5.0)
    assert verify(fp8_checkpoint, float_checkpoint).layers[0].name == LAYER


def test_scales_rounded_without_their_codes_are_a_fault(
    fp8_checkpoint: Path, float_checkpoint: Path
) -> None:
    """Three engines have shipped it: every scale is plausible, and no other check sees it."""
    assert verify(fp8_checkpoint, float_checkpoint).findings == ()
    tensors = load_file(fp8_checkpoint / "model.safetensors")
    name = LAYER + ".weight_scale_inv"
    tensors[name] = tensors[name].log2().ceil().exp2()
    save_file(tensors, fp8_checkpoint / "model.safetensors")
    (finding,) = verify(fp8_checkpoint, float_checkpoint).findings
    assert (finding.code, finding.layer) == ("unlike_original", LAYER)
    assert "1 of 2 layers differ" in finding.message
    assert str(float_checkpoint) in finding.message


def test_the_weights_of_another_model_are_a_fault(
    fp8_checkpoint: Path, float_checkpoint: Path
) -> None:
    tensors = load_file(float_checkpoint / "model.safetensors")
    other = {n: t.flip(0) if t.dim() == 2 else t for n, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in other.items()}, float_checkpoint / "model.safetensors")
    (finding,) = verify(fp8_checkpoint, float_checkpoint).findings
    assert "2 of 2 layers differ" in finding.message


def test_another_model_is_refused(fp8_checkpoint: Path, float_checkpoint: Path) -> None:
    tensors = load_file(float_checkpoint / "model.safetensors")
    tensors[LAYER + ".weight"] = torch.ones(192, 321)
    save_file(tensors, float_checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\(192, 321\)"):
        verify(fp8_checkpoint, float_checkpoint)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(tensor, bytes) of every read."""
    seen: list[tuple[str, int]] = []

    def spy(entry: TensorEntry, begin: int = 0, end: int | None = None) -> bytes:
        data = read_bytes(entry, begin, end)
        seen.append((entry.name, len(data)))
        return data

    monkeypatch.setattr(scales, "read_bytes", spy)
    monkeypatch.setattr(tensors_module, "read_bytes", spy)
    return seen


def test_only_scales_are_read_without_a_float_checkpoint(
    fp8_checkpoint: Path, reads: list[tuple[str, int]]
) -> None:
    verify(fp8_checkpoint)
    assert len(reads) == 2
    assert all(name.endswith("_scale_inv") for name, _ in reads)


def test_little_is_read_at_a_time_and_the_answer_is_the_same(
    tmp_path: Path, reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stacked experts of five block rows, the last ragged, in MXFP8-like and square blocks."""
    generator = torch.Generator().manual_seed(5)
    exact = torch.randn(2, 144, 96, generator=generator)
    for block in ([1, 32], [32, 32]):
        fmt = BlockFormat(E4M3FN, ScaleFormat.FP32, BlockShape(*block))
        stored = quantize(exact, fmt)
        folder = tmp_path / str(block)
        folder.mkdir()
        save_file(
            {"experts.w2_weight": stored.data, "experts.w2_weight_scale_inv": stored.scales},
            folder / "model.safetensors",
        )
        declared = {"quant_method": "fp8", "weight_block_size": block}
        (folder / "config.json").write_text(json.dumps({"quantization_config": declared}))
        (folder / "float").mkdir()
        save_file({"experts.w2_weight": exact}, folder / "float" / "model.safetensors")
        whole = verify(folder, folder / "float")
        reads.clear()
        with monkeypatch.context() as small:
            small.setattr(scales, "FACTS_BYTES", 64)
            small.setattr(tensors_module, "BAND_ELEMENTS", 1)
            pieces = verify(folder, folder / "float")
        assert max(length for _, length in reads) == 4 * 96 * block[0]
        (one,), (other,) = whole.layers, pieces.layers
        assert one.scales == other.scales
        assert one.error is not None
        assert other.error is not None
        assert other.error.relative_error == pytest.approx(one.error.relative_error, rel=1e-12)
        assert other.error.max_error == one.error.max_error


def test_against_another_block_fp8_version(
    fp8_checkpoint: Path, float_checkpoint: Path, tmp_path: Path
) -> None:
    """Codes are never taken for values: the other side is dequantized too."""
    ue8m0 = tmp_path / "ue8m0"
    quantize_checkpoint(
        read_checkpoint(float_checkpoint), ue8m0, QuantizeOptions(FP8_128X128_UE8M0)
    )
    assert {check.error for check in verify(ue8m0, ue8m0).layers} == {
        DataError(0.0, 0.0, float("inf"))
    }
    right = load_values(fp8_checkpoint)
    for check in verify(ue8m0, fp8_checkpoint).layers:
        wanted = right[check.name].double()
        relative = float((load_values(ue8m0)[check.name].double() - wanted).norm() / wanted.norm())
        assert check.error is not None
        assert check.error.relative_error == pytest.approx(relative, rel=1e-5)


def load_values(folder: Path) -> dict[str, torch.Tensor]:
    layers = read_layers(read_checkpoint(folder)).quantized
    return {layer.name: dequantize(read_block_scaled(layer)) for layer in layers}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.complex64, "C64")],
)
def test_against_codes_without_scales_is_refused(
    fp8_checkpoint: Path, float_checkpoint: Path, dtype: torch.dtype, name: str
) -> None:
    tensors = load_file(float_checkpoint / "model.safetensors")
    tensors[LAYER + ".weight"] = torch.ones(192, 320).to(dtype)
    save_file(tensors, float_checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"is {name} and no block FP8.*; compare"):
        verify(fp8_checkpoint, float_checkpoint)


@pytest.mark.parametrize(
    ("value", "code", "is_fault"),
    [(2.0**-140, "subnormal_scale", False), (2.0**120, "overflowing_scale", True)],
)
def test_scales_at_the_ends_of_float32(
    fp8_checkpoint: Path, value: float, code: str, is_fault: bool
) -> None:
    change(fp8_checkpoint, LAYER + ".weight_scale_inv", (0, 0), value)
    result = verify(fp8_checkpoint)
    assert [(f.code, f.layer) for f in result.findings] == [(code, LAYER)]
    assert result.has_fault is is_fault


@pytest.mark.parametrize("exponent", [-126, -1, 0, 127])
def test_powers_of_two_are_recognized(exponent: int) -> None:
    exact = np.array([np.ldexp(1.0, exponent)], np.float32)
    assert scale_facts(exact).power_of_two is PowerOfTwo.YES
    assert scale_facts(np.nextafter(exact, np.float32(0))).power_of_two is PowerOfTwo.NO
