"""Quantizing a checkpoint: bit for bit the reference, readable by others, all or nothing."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blockscale.checkpoint import output, write
from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.schema import TABLES
from blockscale.errors import CheckpointError
from blockscale.formats import (
    FP8_32X32_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    BlockFormat,
)
from blockscale.reference import quantize, requantize, scale_values

if TYPE_CHECKING:
    from pathlib import Path

CHOSEN = ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight")


def run(source: Path, target: Path, **options: object) -> dict[str, torch.Tensor]:
    quantize_checkpoint(read_checkpoint(source), target, QuantizeOptions(**options))
    return {name: tensor for file in target.glob("*.safetensors") for name, tensor in _all(file)}


def _all(file: Path) -> list[tuple[str, torch.Tensor]]:
    with safe_open(file, "pt") as opened:
        return [(name, opened.get_tensor(name)) for name in opened.keys()]  # noqa: SIM118 - no mapping


@pytest.mark.parametrize("fmt", [FP8_128X128_FP32, FP8_128X128_UE8M0, FP8_32X32_UE8M0], ids=str)
def test_codes_and_scales_are_the_references(
    float_checkpoint: Path, tmp_path: Path, fmt: BlockFormat
) -> None:
    written = run(float_checkpoint, tmp_path / "out", format=fmt)
    original = load_file(float_checkpoint / "model.safetensors")
    for name in CHOSEN:
        expected = quantize(original[name], fmt)
        assert torch.equal(written[name].view(torch.uint8), expected.data.view(torch.uint8))
        assert torch.equal(written[name + "_scale_inv"], scale_values(expected))


def test_everything_else_is_kept_bit_for_bit(float_checkpoint: Path, tmp_path: Path) -> None:
    written = run(float_checkpoint, tmp_path / "out")
    original = load_file(float_checkpoint / "model.safetensors")
    for name in original.keys() - set(CHOSEN):
        assert torch.equal(written[name], original[name])
    assert written.keys() == original.keys() | {name + "_scale_inv" for name in CHOSEN}


def test_what_is_read_as_a_table_is_kept(tmp_path: Path) -> None:
    """Otherwise its codes would be written and then planned by nobody."""
    source = tmp_path / "source"
    source.mkdir()
    names = [f"model.{table}.weight" for table in TABLES]
    save_file(
        {n: torch.randn(128, 128) for n in ("a.weight", *names)}, source / "model.safetensors"
    )
    written = run(source, tmp_path / "out")
    assert written["a.weight"].dtype is torch.float8_e4m3fn
    assert {written[name].dtype for name in names} == {torch.float32}


def test_strips_do_not_change_the_result(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(float_checkpoint, tmp_path / "whole")
    monkeypatch.setattr("blockscale.checkpoint.strips.STRIP_BYTES", 1)
    strips = run(float_checkpoint, tmp_path / "strips")
    for name, tensor in whole.items():
        assert torch.equal(strips[name].view(torch.uint8), tensor.view(torch.uint8))


def test_ue8m0_rounds_once_from_the_floats(float_checkpoint: Path, tmp_path: Path) -> None:
    written = run(float_checkpoint, tmp_path / "out", format=FP8_128X128_UE8M0)
    original = load_file(float_checkpoint / "model.safetensors")
    twice = requantize(quantize(original[CHOSEN[0]], FP8_128X128_FP32), FP8_128X128_UE8M0).tensor
    assert not torch.equal(written[CHOSEN[0]].view(torch.uint8), twice.data.view(torch.uint8))


def test_small_shards_get_an_index_and_keep_scales_with_weights(
    float_checkpoint: Path, tmp_path: Path
) -> None:
    run(float_checkpoint, tmp_path / "out", max_shard_bytes=70_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for name in CHOSEN:
        assert index["weight_map"][name] == index["weight_map"][name + "_scale_inv"]
    assert len(read_checkpoint(tmp_path / "out").tensors) == len(index["weight_map"])


def test_config_declares_what_was_done(float_checkpoint: Path, tmp_path: Path) -> None:
    run(float_checkpoint, tmp_path / "out", format=FP8_128X128_UE8M0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    declared = config["quantization_config"]
    assert declared["quant_method"] == "fp8"
    assert declared["weight_block_size"] == [128, 128]
    assert declared["scale_fmt"] == "ue8m0"
    assert "model.embed_tokens" in declared["modules_to_not_convert"]
    assert config["model_type"] == "tiny"


def left_behind(folder: Path, source: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {source.name}


def test_a_full_disk_leaves_nothing(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        def __init__(self, file: object) -> None:
            self.file, self.room = file, 50_000

        def write(self, data: bytes) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> object:
            return self.file.__enter__()

        def __exit__(self, *error: object) -> object:
            return self.file.__exit__(*error)

    enter = output.ShardWriter.__enter__

    def enter_full(writer: output.ShardWriter) -> output.ShardWriter:
        entered = enter(writer)
        writer._file = FullDisk(writer._file)
        return entered

    monkeypatch.setattr(output.ShardWriter, "__enter__", enter_full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        run(float_checkpoint, tmp_path / "out")
    assert caught.value.tensor is not None
    assert left_behind(tmp_path, float_checkpoint) == set()


def test_too_little_space_is_found_before_writing(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="1000 free"):
        run(float_checkpoint, tmp_path / "out")
    assert left_behind(tmp_path, float_checkpoint) == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_nothing(
    float_checkpoint: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def interrupt(_: int) -> None:
        raise error

    with pytest.raises(error):
        quantize_checkpoint(read_checkpoint(float_checkpoint), tmp_path / "out", None, interrupt)
    assert left_behind(tmp_path, float_checkpoint) == set()


# The command, which takes its time over each tensor once the first is in its file. What a shell
# starts in the background ignores SIGINT, and so would its children.
SLOW = """
import signal
import time
from blockscale.checkpoint import output
from blockscale.cli import main

append = output.ShardWriter._append

def slowly(*arguments):
    append(*arguments)
    time.sleep(0.1)

output.ShardWriter._append = slowly
signal.signal(signal.SIGINT, signal.default_int_handler)
main.run()
"""


def test_ctrl_c_exits_with_130_and_one_line(tmp_path: Path) -> None:
    """A real SIGINT to the real command, in the middle of a real file."""
    source = tmp_path / "source"
    source.mkdir()
    save_file(
        {f"l{i}.weight": torch.ones(128, 128) for i in range(400)}, source / "model.safetensors"
    )
    (source / "config.json").write_text("{}")
    command = [sys.executable, "-c", SLOW, "quantize", source, tmp_path / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.partial-*/parts/*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("\n") == 1
    assert left_behind(tmp_path, source) == set()


def test_a_target_with_files_is_refused_and_untouched(
    float_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("keep")
    with pytest.raises(CheckpointError, match="already exists"):
        run(float_checkpoint, target)
    with pytest.raises(CheckpointError, match="already exists"):
        run(float_checkpoint, float_checkpoint)
    assert (target / "precious").read_text() == "keep"


def test_a_quantized_source_is_refused(fp8_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already"):
        run(fp8_checkpoint, tmp_path / "again")


def test_fp8_data_without_a_declaration_is_refused(fp8_checkpoint: Path, tmp_path: Path) -> None:
    """It would be copied as it is, and the new config would declare blocks of any size."""
    (fp8_checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is F8_E4M3 already, though no config\.json"):
        run(fp8_checkpoint, tmp_path / "again")
    assert not list(tmp_path.glob("*again*"))


def test_a_source_without_linear_weights_is_refused(float_checkpoint: Path, tmp_path: Path) -> None:
    save_file({"norm.weight": torch.ones(4)}, float_checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no float weight that is quantized"):
        run(float_checkpoint, tmp_path / "again")
    assert not list(tmp_path.glob("*again*"))


def test_a_module_to_keep_that_is_not_there_is_refused(
    float_checkpoint: Path, tmp_path: Path
) -> None:
    """A slip of the pen must not quantize what was to stay."""
    options = QuantizeOptions(kept=("down_porj",))
    with pytest.raises(CheckpointError, match=r"no module 'down_porj' to keep"):
        quantize_checkpoint(read_checkpoint(float_checkpoint), tmp_path / "again", options)


def test_nan_weights_are_named(float_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(float_checkpoint / "model.safetensors")
    tensors[CHOSEN[1]][130, 7] = float("nan")
    save_file(tensors, float_checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN") as caught:
        run(float_checkpoint, tmp_path / "out")
    assert caught.value.tensor == CHOSEN[1]
    assert left_behind(tmp_path, float_checkpoint) == set()
