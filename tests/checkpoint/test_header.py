"""Headers written by an enemy: one clear error each, fast, without allocating what they claim."""

from __future__ import annotations

import json
import os
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from blockscale.checkpoint.header import read_header
from blockscale.checkpoint.tensors import read_tensor
from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def encode(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOUR = b"1234"
HOSTILE = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "longer than the file": encode({"a": entry()}, FOUR, length=10_000),
    "longer than any header": (2**63).to_bytes(8, "little") + b"{}",
    "truncated data": encode({"a": entry()}, FOUR[:3]),
    "unclaimed bytes at the end": encode({"a": entry()}, FOUR + b"5"),
    "a gap": encode({"a": entry(), "b": entry(offsets=(5, 9))}, FOUR * 3),
    "overlap": encode({"a": entry(), "b": entry(offsets=(2, 6))}, FOUR * 2),
    "out of range": encode({"a": entry(offsets=(2**40, 2**40 + 4))}, FOUR),
    "reversed offsets": encode({"a": entry(offsets=(4, 0))}, FOUR),
    "negative offset": encode({"a": entry(offsets=(-4, 0))}, FOUR),
    "one offset": encode({"a": entry(offsets=(0,))}, FOUR),
    "length that does not fit the shape": encode({"a": entry(shape=(5,))}, FOUR),
    "negative size": encode({"a": entry(shape=(-4,))}, FOUR),
    "boolean size": encode({"a": entry(shape=(True, 4))}, FOUR),
    "float size": encode({"a": entry(shape=(4.0,))}, FOUR),
    "shape as a number": encode({"a": entry(shape=4)}, FOUR),
    "a thousand axes": encode({"a": entry(shape=(1,) * 1000)}, FOUR),
    "a shape that overflows": encode({"a": entry(shape=(2**40, 2**40))}, FOUR),
    "unknown dtype": encode({"a": entry(dtype="F7")}, FOUR),
    "dtype as a list": encode({"a": entry(dtype=["U8"])}, FOUR),
    "missing dtype": encode({"a": {"shape": (4,), "data_offsets": (0, 4)}}, FOUR),
    "entry as a list": encode({"a": [1, 2]}, FOUR),
    "array": encode([]),
    "not JSON": encode(b"{nope}"),
    "not UTF-8": encode(b"\xff\xfe{}"),
    "NaN": encode(b'{"a": NaN}'),
    "duplicate key": encode(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        FOUR,
    ),
    "deep nesting": encode(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "metadata that is no map of strings": encode({"__metadata__": {"a": 1}}),
    "a huge name": encode({"x" * 100_000: entry(dtype="F7")}, FOUR),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_one_line_that_names_the_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HOSTILE[kind])
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    assert len(message) < 1000
    assert peak < 20_000_000


@pytest.mark.parametrize("kind", ["overlap", "a gap", "unknown dtype", "out of range"])
def test_the_tensor_is_named(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HOSTILE[kind])
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert caught.value.tensor in {"a", "b"}


def test_directories_and_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="directory"):
        read_header(tmp_path)
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR)
    try:
        with pytest.raises(CheckpointError, match="regular file"):
            read_header(tmp_path / "pipe")
    finally:
        os.close(descriptor)


def valid_file() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [0, 8]},
        "a.weight_scale_inv": {"dtype": "F32", "shape": [1, 1], "data_offsets": [8, 12]},
    }
    return encode(header, bytes(12))


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutated_files_are_read_or_refused(edits: list[tuple[int, int]], tmp_path: Path) -> None:
    raw = bytearray(valid_file())
    for position, value in edits:
        raw[position % len(raw)] = value
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw)
    try:
        header = read_header(file)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right
    else:
        assert sum(tensor.length for tensor in header.tensors) <= len(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(header=st.dictionaries(st.text(max_size=12), json_values, max_size=4))
def test_any_json_is_read_or_refused(header: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    try:
        file.write_bytes(encode(header))
    except UnicodeEncodeError:
        return
    try:
        read_header(file)
    except CheckpointError as error:
        assert str(error).startswith(str(file))  # noqa: PT017 - both outcomes are right


TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).to(torch.bfloat16),
    "c": torch.randn(2, 2, 2).to(torch.float8_e4m3fn),
    "d": torch.arange(5),
    "e": torch.tensor(3.5),
    "f": torch.empty(0, 4),
    "g": torch.full((2, 3), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu),
}


def test_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    header = read_header(file)
    assert dict(header.metadata) == {"format": "pt"}
    with safe_open(file, "pt") as theirs:
        assert {tensor.name for tensor in header.tensors} == set(theirs.keys())
    for tensor in header.tensors:
        ours = read_tensor(tensor)
        assert ours.dtype is TENSORS[tensor.name].dtype
        assert tensor.shape == tuple(TENSORS[tensor.name].shape)
        raw = (ours.reshape(-1).view(torch.uint8), TENSORS[tensor.name].reshape(-1))
        assert torch.equal(raw[0], raw[1].view(torch.uint8))
