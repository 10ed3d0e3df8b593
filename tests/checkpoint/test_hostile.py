"""Checkpoint directories made to harm: each is refused with one line, quickly, in little memory."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from command_line import blockscale

from blockscale.checkpoint.header import MAX_HEADER_BYTES, read_header
from blockscale.checkpoint.read import INDEX_NAME, read_checkpoint
from blockscale.errors import CheckpointError
from blockscale.testing.mutations import examine, mutants, seeds, write_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def encode(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def tensor(begin: int, end: int, **changed: object) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **changed}


def shards(folder: Path, files: dict[str, bytes], weight_map: dict[str, str]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def traversal(folder: Path) -> None:
    (folder.parent / "secret.safetensors").write_bytes(encode({"a": tensor(0, 1)}, b"s"))
    shards(folder, {}, {"a": "../secret.safetensors"})


def absolute(folder: Path) -> None:
    shards(folder, {}, {"a": "/etc/passwd"})


def link_out(folder: Path) -> None:
    (folder.parent / "secret.safetensors").write_bytes(encode({"a": tensor(0, 1)}, b"s"))
    (folder / "model.safetensors").symlink_to("../secret.safetensors")


def link_out_of_a_shard(folder: Path) -> None:
    (folder.parent / "secret.safetensors").write_bytes(encode({"a": tensor(0, 1)}, b"s"))
    (folder / "a.safetensors").symlink_to("../secret.safetensors")
    shards(folder, {}, {"a": "a.safetensors"})


def config_link(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(encode({"a": tensor(0, 1)}, b"s"))
    (folder / "config.json").symlink_to("../secret.json")


def index_link(folder: Path) -> None:
    (folder.parent / "secret.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    (folder / "a.safetensors").write_bytes(encode({"a": tensor(0, 1)}, b"s"))
    (folder / INDEX_NAME).symlink_to("../secret.json")


def circular_link(folder: Path) -> None:
    (folder / "a.safetensors").symlink_to("a.safetensors")
    shards(folder, {}, {"a": "a.safetensors"})


def a_config_in_a_circle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(encode({"a": tensor(0, 1)}, b"s"))
    (folder / "config.json").symlink_to("config.json")


def an_index_in_a_circle(folder: Path) -> None:
    (folder / INDEX_NAME).symlink_to(INDEX_NAME)


def a_folder_in_place_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()


def a_config_that_is_a_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(encode({"a": tensor(0, 1)}, b"s"))
    (folder / "config.json").write_text("version https://git-lfs.example/v1\noid sha256:0\n")


def only_zeros(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(9000))


def what_torch_saves(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04\x00\x00\x08\x08" + bytes(99))


def gguf(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"GGUF\x03" + bytes(99))


def in_two_shards(folder: Path) -> None:
    file = encode({"a": tensor(0, 1)}, b"1")
    shards(folder, {"1.safetensors": file, "2.safetensors": file}, {"a": "1.safetensors"})
    (folder / INDEX_NAME).write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')


def claims_more_than_there_is(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def a_sparse_gigabyte_of_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)


def a_header_of_holes(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(MAX_HEADER_BYTES.to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 8)


def deep(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(encode(b'{"a":' * 500_000))


def nested_just_short_of_too_deep(folder: Path) -> None:
    text = b'{"a":{"dtype":' + b"[" * 900 + b"]" * 900 + b',"shape":[],"data_offsets":[0,1]}}'
    (folder / "model.safetensors").write_bytes(encode(text, b"1"))


def truncated(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(encode({"a": tensor(0, 100)}, b"1" * 99))


def overlapping(folder: Path) -> None:
    header = {"a": tensor(0, 4), "b": tensor(2, 6)}
    (folder / "model.safetensors").write_bytes(encode(header, b"1" * 6))


def the_same_bytes_a_thousand_times(folder: Path) -> None:
    header = {f"t{i}": tensor(0, 1000) for i in range(1000)}
    (folder / "model.safetensors").write_bytes(encode(header, b"1" * 1000))


def gapped(folder: Path) -> None:
    header = {"a": tensor(0, 4), "b": tensor(8, 12)}
    (folder / "model.safetensors").write_bytes(encode(header, b"1" * 12))


def terminal_escapes(folder: Path) -> None:
    header = {"\x1b]0;owned\x07": tensor(0, 1)}
    (folder / "model.safetensors").write_bytes(encode(header, b"1"))


def half_a_character(folder: Path) -> None:
    header = {"\ud800": tensor(0, 1)}
    (folder / "model.safetensors").write_bytes(encode(header, b"1"))


def an_endless_name(folder: Path) -> None:
    header = {"x" * 1_000_000: tensor(0, 1)}
    (folder / "model.safetensors").write_bytes(encode(header, b"1"))


def a_huge_number(folder: Path) -> None:
    raw = b'{"a":{"dtype":"U8","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,1]}}'
    (folder / "model.safetensors").write_bytes(encode(raw, b"1"))


def a_huge_config(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(encode({"a": tensor(0, 1)}, b"s"))
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**12)


def a_pipe(folder: Path) -> None:
    import os

    os.mkfifo(folder / "model.safetensors")


def a_bomb_of_objects(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(encode(b'{"a":[' + b"{}," * 10_000_000 + b"{}]}"))


def a_config_bomb(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(encode({"a": tensor(0, 1)}, b"s"))
    (folder / "config.json").write_bytes(b'{"a":[' + b"[]," * 10_000_000 + b"[]]}")


def a_config_pipe(folder: Path) -> None:
    import os

    (folder / "model.safetensors").write_bytes(encode({"a": tensor(0, 1)}, b"s"))
    os.mkfifo(folder / "config.json")


# How it is made, and what the one line says.
HOSTILE: dict[Callable[[Path], None], str] = {
    traversal: "in no other folder",
    absolute: "in no other folder",
    link_out: "leaves the checkpoint",
    link_out_of_a_shard: "leaves the checkpoint",
    config_link: "leaves the checkpoint",
    index_link: "leaves the checkpoint",
    circular_link: "missing",
    a_config_in_a_circle: "config.json: is a link to a file that is missing; download it again",
    an_index_in_a_circle: "index.json: is a link to a file that is missing; download it again",
    a_folder_in_place_of_weights: "give the directory that holds the weights",
    a_config_that_is_a_git_lfs_pointer: "Git LFS pointer or a page",
    only_zeros: "an unfinished download; download it again",
    what_torch_saves: "as torch.save writes it; load it with torch",
    gguf: "a GGUF file; download the safetensors version",
    in_two_shards: "is also in",
    claims_more_than_there_is: "above the limit",
    a_sparse_gigabyte_of_header: "above the limit",
    a_header_of_holes: "not valid JSON",
    deep: "nested too deeply",
    nested_just_short_of_too_deep: "has dtype [[[",
    truncated: "truncated",
    overlapping: "overlaps",
    the_same_bytes_a_thousand_times: "overlaps",
    gapped: "unclaimed bytes",
    terminal_escapes: "unprintable",
    half_a_character: "unprintable",
    an_endless_name: "above the limit",
    a_huge_number: "not valid JSON",
    a_huge_config: "no config.json is that large",
    a_bomb_of_objects: "JSON values, above the limit",
    a_config_bomb: "JSON values, above the limit",
    a_pipe: "holds neither",
    a_config_pipe: "regular file",
}


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_hostile_directories_are_refused_with_one_line(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    make(folder)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    line = str(caught.value)
    assert HOSTILE[make] in line
    assert line.startswith(str(folder))
    assert line.isprintable()
    assert len(line) < 2000


def test_a_million_tensors_take_bounded_memory(tmp_path: Path) -> None:
    """A header of 50 MB, far below the limit, would take a gigabyte and more."""
    file = tmp_path / "model.safetensors"
    header = ",".join(
        f'"{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000)
    )
    file.write_bytes(encode(b"{" + header.encode() + b"}"))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="JSON values, above the limit"):
            read_header(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(header)


def test_the_command_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    terminal_escapes(folder)
    for command in ("plan", "verify"):
        done = blockscale(command, folder)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "\x1b" not in done.stderr


def test_wildcards_that_take_a_minute_are_not_tried(tmp_path: Path) -> None:
    """Found by tools/fuzz_headers.py: fnmatch is quadratic in brackets that never close."""
    files = dict(seeds()[5])
    files["config.json"] = files["config.json"].replace(b"lm_head*", b"[" * 20_000)
    write_files(tmp_path / "mutant", files)
    refusal = examine(tmp_path / "mutant")
    assert refusal is not None
    assert "above the limits" in refusal


# What tools/fuzz_headers.py found: lines of thousands of characters, which are no lines, and file
# names that the operating system refuses with an error of its own.
FOUND = {
    "a long name that the index omits": (INDEX_NAME, "model.layers.0.gate.weight", "x" * 5000),
    "a long dtype": ("config.json", "bfloat16", "x" * 5000),
    "a long file name": (INDEX_NAME, "b.safetensors", "b.safetensor" + "s" * 300),
    "a long file name in many bytes": (INDEX_NAME, "b.safetensors", "\u20ac" * 100),
    "a long name in the index alone": (INDEX_NAME, "lm_head.weight", "y" * 5000),
}


@pytest.mark.parametrize("kind", FOUND)
def test_what_the_fuzzer_found_is_refused_with_a_short_line(kind: str, tmp_path: Path) -> None:
    name, old, new = FOUND[kind]
    files = dict(seeds()[1])
    assert old.encode() in files[name]
    files[name] = files[name].replace(old.encode(), new.encode())
    write_files(tmp_path / "mutant", files)
    refusal = examine(tmp_path / "mutant")
    assert refusal is not None
    assert len(refusal) < 2000


def test_the_seeds_of_the_fuzzer_are_read(tmp_path: Path) -> None:
    refused = []
    for files in seeds():
        write_files(tmp_path / "seed", files)
        refused.append(examine(tmp_path / "seed"))
    assert refused.count(None) >= 5


def test_broken_checkpoints_are_read_or_refused(tmp_path: Path) -> None:
    """A thousand of what tools/fuzz_headers.py does 200,000 times."""
    answers = []
    for files in itertools.islice(mutants(2), 1000):
        write_files(tmp_path / "mutant", files)
        answers.append(examine(tmp_path / "mutant"))
    assert 50 < answers.count(None) < 500
    assert len(set(answers)) > 100
