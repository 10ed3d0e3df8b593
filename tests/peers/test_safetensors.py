"""safetensors' own Rust reader and writer, on our files and theirs, byte by byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blockscale.checkpoint.convert import (
    ConvertOptions,
    Dialect,
    ScaleStorage,
    convert_checkpoint,
)
from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_bytes, read_checkpoint
from blockscale.checkpoint.tensors import TORCH_DTYPES, read_tensor
from blockscale.formats import FP8_128X128_UE8M0

if TYPE_CHECKING:
    from pathlib import Path


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dialect", list(Dialect))
def test_it_reads_our_files(float_checkpoint: Path, tmp_path: Path, dialect: Dialect) -> None:
    quantize_checkpoint(
        read_checkpoint(float_checkpoint), tmp_path / "q", QuantizeOptions(FP8_128X128_UE8M0)
    )
    storage = ScaleStorage.E8M0 if dialect is Dialect.HF_FP8 else ScaleStorage.KEEP
    options = ConvertOptions(dialect, storage)
    convert_checkpoint(read_checkpoint(tmp_path / "q"), tmp_path / "c", options)
    for folder in (tmp_path / "q", tmp_path / "c"):
        checkpoint = read_checkpoint(folder)
        (path,) = checkpoint.files
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == set(checkpoint.tensors)
            for name, entry in checkpoint.tensors.items():
                tensor = file.get_tensor(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (
                    TORCH_DTYPES[entry.dtype],
                    entry.shape,
                )
                assert raw(tensor) == read_bytes(entry)


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 4)], ids=str)
def test_we_read_its_files(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    kind = TORCH_DTYPES[dtype]
    count = torch.Size(shape).numel() * kind.itemsize
    high = 2 if kind is torch.bool else 256
    data = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
    tensor = data.view(kind).reshape(shape)
    save_file({"x": tensor, "y": torch.ones(3)}, tmp_path / "model.safetensors")
    entry = read_checkpoint(tmp_path).tensor("x")
    assert (entry.dtype, entry.shape) == (dtype, shape)
    assert raw(read_tensor(entry)) == raw(tensor)


def test_packed_fp4_is_measured_in_bits(tmp_path: Path) -> None:
    packed = torch.arange(32, dtype=torch.uint8).reshape(4, 8).view(torch.float4_e2m1fn_x2)
    save_file({"x": packed}, tmp_path / "model.safetensors")
    entry = read_checkpoint(tmp_path).tensor("x")
    assert (entry.dtype, entry.shape, entry.length) == ("F4", (4, 16), 32)
