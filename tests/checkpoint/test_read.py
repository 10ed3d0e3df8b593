"""Checkpoints of several files: the index, its lies, and links that lead away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint.read import INDEX_NAME, read_bytes, read_checkpoint
from blockscale.errors import CheckpointError


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_one_table(sharded: Path) -> None:
    checkpoint = read_checkpoint(sharded)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.tensor_bytes == 20
    assert read_bytes(checkpoint.tensor("b"), 4, 8) == b"\x00\x00\x80?"


def test_a_single_file_takes_the_config_beside_it(sharded: Path) -> None:
    (sharded / "config.json").write_text('{"dtype": "float16"}')
    assert read_checkpoint(sharded / "one.safetensors").config == {"dtype": "float16"}


LIES = [
    ({"a": "one.safetensors", "b": "three.safetensors"}, "missing"),
    ({"a": "two.safetensors", "b": "two.safetensors"}, "is said to be in"),
    ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "but is not"),
    ({"a": "../one.safetensors"}, "no other folder"),
    ({"a": "/etc/passwd"}, "no other folder"),
    ({"a": ".."}, "no other folder"),
    ({"a": 3}, "no file name"),
    ({}, "no weight_map"),
    ([], "no weight_map"),
]


@pytest.mark.parametrize(("weight_map", "words"), LIES, ids=[words for _, words in LIES])
def test_an_index_that_lies_is_refused(sharded: Path, weight_map: object, words: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_checkpoint(sharded)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_the_index_omits_is_named(sharded: Path) -> None:
    save_file({"b": torch.ones(3), "c": torch.ones(1)}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'c': is in two\.safetensors but not in"):
        read_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'a': is also in one\.safetensors"):
        read_checkpoint(sharded)


def test_a_link_out_of_the_checkpoint_is_refused(sharded: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (sharded / "two.safetensors").rename(outside)
    (sharded / "two.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        read_checkpoint(sharded)


def test_the_hub_cache_stores_links_to_blobs(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sharded.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert set(read_checkpoint(snapshot).tensors) == {"a", "b"}


@pytest.mark.parametrize("config", ["[]", "{", '{"a": 1, "a": 2}', "\udcff"])
def test_a_damaged_config_is_named(sharded: Path, config: str) -> None:
    (sharded / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_checkpoint(sharded)


def test_a_directory_without_weights_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_found(sharded: Path) -> None:
    checkpoint = read_checkpoint(sharded)
    file = sharded / "two.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="shorter"):
        read_bytes(checkpoint.tensor("b"))
