"""Checkpoints broken at random, and what reading one must and must not do.

``mutants`` breaks small valid checkpoints of every dialect: bytes of a file, or values, keys and
nesting of its JSON. ``examine`` reads one as the commands do. A mutant is read or refused with one
line; anything else is a fault of the reader.
"""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeAlias

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.inspect import inspect_checkpoint
from blockscale.checkpoint.plan_file import fingerprint_of
from blockscale.checkpoint.rank_plan import plan_rank
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import RequestOptions, dtype_of_config
from blockscale.checkpoint.scales import read_power_of_two
from blockscale.checkpoint.schema import read_layers
from blockscale.errors import BlockscaleError
from blockscale.planning.device import Device
from blockscale.planning.explain import explain_model
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.serialize import plan_document
from blockscale.planning.sharded import Target
from blockscale.planning.sharding import Parallelism

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Files: TypeAlias = "dict[str, bytes]"

LONGEST_LINE = 2000
HEADER_LENGTH_BYTES = 8
_SIZES = {"F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "BF16": 2, "F32": 4}
_NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 127, 128, 2**31, 2**32, 2**62, 2**63, -(2**63), 2**64, 10**400,
    0.5, 1e308, float("nan"), float("inf"), "", "..", "/etc/passwd", "../x.safetensors", "\ud800",
    "\x00", "\n", "x" * 5000, "re:(a+)+$", "re:(", "re:.*.*.*.*x", "*" * 50, "[", "F32", "F8_E4M3",
    "F8_E8M0", "BF16", "U8", "F7", "fp8", "mxfp8", "compressed-tensors", "modelopt", "block",
    "channel", "float16", "ue8m0", [], {}, [[]], [0, 0], [1, -1], [128], [128, 128, 128], [0, 128],
    [2**40, 2**40], {"a": {}}, "model.safetensors", "config.json",
)  # fmt: skip


def seeds() -> list[Files]:
    """Small valid checkpoints: each dialect of scales and config, one file and two."""
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    skipped = {"modules_to_not_convert": ["lm_head", "re:.*gate$"], "scale_fmt": "ue8m0"}
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    compressed = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*gate$"],
    }
    mxfp8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"]}
    modelopt = {
        "quant_method": "modelopt",
        "quant_algo": "FP8_PB_WO",
        "exclude_modules": ["lm_head*", "model.layers.*.gate"],
    }
    plain = _tensors("weight_scale_inv", "F32", (1, 2))
    return [
        _single(plain, fp8),
        _sharded(plain, {**fp8, **skipped}),
        _single(_tensors("weight_scale", "BF16", (1, 2)), compressed),
        _single(_tensors("weight_scale", "U8", (96, 6)), mxfp8),
        _single(_tensors("scale", "F8_E8M0", (1, 2)), {**fp8, **skipped}),
        _single(_tensors("weight_scale", "F32", (1, 1, 2, 1)), modelopt),
        _single({n: t for n, t in plain.items() if not n.endswith("_inv")}, None),
    ]


def mutants(seed: int) -> Iterator[Files]:
    """An endless series of broken checkpoints, the same for the same ``seed``."""
    chance = random.Random(seed)  # noqa: S311 - tests, no secrets
    valid = seeds()
    while True:
        files = dict(chance.choice(valid))
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            name = chance.choice(sorted(files))
            files[name] = _broken(chance, name, files[name])
        yield files


def examine(folder: Path) -> str | None:
    """Read the checkpoint in ``folder`` as inspect, plan and verify do: None, or why it is refused.

    Raises whatever a reader raises that is no BlockscaleError, and AssertionError for a refusal
    that is not one line.
    """
    try:
        checkpoint = read_checkpoint(folder)
        inspect_checkpoint(checkpoint)
        fingerprint_of(checkpoint)
        layers = read_layers(checkpoint)
        activation = dtype_of_config(checkpoint)
        for name, degree in (("sm_90", 1), ("sm_100", 2)):
            options = RequestOptions(activation, Parallelism(degree, 1))
            target = Target(Device.named(name), PlanPolicy(), BACKENDS)
            planned = plan_rank(checkpoint, layers, options, target).plan
            explain_model(planned).encode()
            json.dumps(plan_document(planned), allow_nan=False)
        read_power_of_two(layers.quantized)
    except BlockscaleError as error:
        line = str(error)
        assert "\n" not in line, repr(line)
        assert len(line) < LONGEST_LINE, line[:LONGEST_LINE]
        return line
    return None


def write_files(folder: Path, files: Files) -> None:
    """Make ``folder`` hold these files and no others."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _tensors(suffix: str, dtype: str, scale: tuple[int, ...]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer = f"model.layers.0.self_attn.{name}"
        tensors[f"{layer}.weight"] = ("F8_E4M3", (96, 192))
        tensors[f"{layer}.{suffix}"] = (dtype, scale)
    tensors["model.layers.0.gate.weight"] = ("BF16", (4, 192))
    tensors["lm_head.weight"] = ("BF16", (8, 192))
    return tensors


def _file(tensors: dict[str, Any]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        length = _SIZES[dtype]
        for size in shape:
            length *= size
        offsets = [position, position + length]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += length
    return _with_length(json.dumps(header).encode()) + b"\x3f" * position


def _with_length(raw: bytes) -> bytes:
    return len(raw).to_bytes(HEADER_LENGTH_BYTES, "little") + raw


def _config(quantization: dict[str, Any] | None) -> bytes:
    config: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16", "num_attention_heads": 2}
    config["num_key_value_heads"] = 2
    if quantization is not None:
        config["quantization_config"] = quantization
    return json.dumps(config).encode()


def _single(tensors: dict[str, Any], quantization: dict[str, Any] | None) -> Files:
    return {"model.safetensors": _file(tensors), "config.json": _config(quantization)}


def _sharded(tensors: dict[str, Any], quantization: dict[str, Any]) -> Files:
    names = list(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    files = {shard: _file({n: tensors[n] for n in members}) for shard, members in shards.items()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return {**files, "config.json": _config(quantization)}


def _broken(chance: random.Random, name: str, data: bytes) -> bytes:
    if chance.random() < 0.25:  # noqa: PLR2004 - a quarter blindly, the rest where it hurts
        return _broken_bytes(chance, data)
    if not name.endswith(".safetensors"):
        return _broken_json(chance, data)
    length = int.from_bytes(data[:HEADER_LENGTH_BYTES], "little")
    end = HEADER_LENGTH_BYTES + length
    return _with_length(_broken_json(chance, data[HEADER_LENGTH_BYTES:end])) + data[end:]


def _broken_bytes(chance: random.Random, data: bytes) -> bytes:
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(raw) + 1)
        # Most of a file is data, which nothing reads here: aim at what comes before it.
        at = min(at, chance.randrange(1200))
        kind = chance.randrange(5)
        if kind == 0 and raw:
            raw[min(at, len(raw) - 1)] = chance.randrange(256)
        elif kind == 1:
            raw[at:at] = chance.randbytes(chance.choice((1, 8, 100)))
        elif kind == 2:  # noqa: PLR2004 - one of five kinds
            del raw[at : at + chance.choice((1, 8, 1000))]
        elif kind == 3:  # noqa: PLR2004 - as above
            raw[at : at + 1] = chance.choice(_BLOWS)
        else:
            del raw[at:]
    return bytes(raw)


_BLOWS = (
    b"[" * 900, b"[" * 20_000, b'{"a":' * 700, b'{"a":' * 20_000, b"9" * 5000, b"-", b"1e999",
    b'"', b"\\", b"\\ud800", b"\xff", b"\x00", b"\xef\xbb\xbf", b"NaN", b"Infinity", b",", b"}",
)  # fmt: skip


def _broken_json(chance: random.Random, raw: bytes) -> bytes:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return _broken_bytes(chance, raw)
    holder = {"": document}
    for _ in range(chance.choice((1, 1, 1, 3))):
        container, key = _place(chance, holder)
        container[key] = _replaced(chance, container[key])
        if isinstance(container, dict) and key and chance.random() < 0.2:  # noqa: PLR2004 - some
            container[chance.choice((key + "_scale", "", key[:-1], "x" * 3000))] = container.pop(
                key
            )
    text = json.dumps(holder[""])
    if chance.random() < 0.1:  # noqa: PLR2004 - some
        text = text.replace(": null", ": " + chance.choice(("[" * 985 + "]" * 985, "1" * 4000)))
    return text.encode()


def _place(chance: random.Random, holder: dict[str, Any]) -> tuple[Any, Any]:
    """A container inside ``holder`` and one of its keys, all depths alike."""
    container: Any = holder
    key: Any = ""
    while True:
        inner = container[key]
        if not isinstance(inner, (dict, list)) or not inner or chance.random() < 0.15:  # noqa: PLR2004 - stop here or go deeper
            return container, key
        container = inner
        key = chance.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))


def _replaced(chance: random.Random, value: Any) -> Any:  # noqa: ANN401 - any JSON value
    changes: list[Callable[[], Any]] = [lambda: deepcopy(chance.choice(_NASTY))]
    if isinstance(value, bool):
        changes.append(lambda: not value)
    elif isinstance(value, int):
        changes += [
            lambda: value + chance.choice((-1, 1, 8, 128)),
            lambda: -value,
            lambda: value * 2,
        ]
        changes += [lambda: str(value), lambda: value / 3, lambda: [value]]
    elif isinstance(value, str):
        changes += [lambda: value[:-1], lambda: value + "x", value.upper, lambda: [value]]
    elif isinstance(value, list):
        changes += [lambda: value[:-1], lambda: value * 2, lambda: value[::-1], lambda: value * 40]
        changes += [lambda: {str(i): item for i, item in enumerate(value)}]
    elif isinstance(value, dict):
        changes += [lambda: list(value), lambda: dict(list(value.items())[1:]), dict]
        changes += [lambda: list(value.items())]
    try:
        return chance.choice(changes)()
    except OverflowError:
        return value
