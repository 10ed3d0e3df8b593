"""Checkpoints as they break in practice: one line says what is wrong, where, and the cure.

One small model of two layers, dense or with four experts, is damaged in one way at a time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint.inspect import inspect_checkpoint
from blockscale.checkpoint.read import INDEX_NAME, SINGLE_NAME, read_checkpoint
from blockscale.checkpoint.verify import verify_checkpoint
from blockscale.errors import CheckpointError
from blockscale.planning.plan import Severity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from blockscale.planning.plan import Finding

DOWN = "model.layers.0.mlp.down_proj.weight"
SCALE = DOWN + "_scale_inv"
GATE = "model.layers.0.mlp.gate_proj"
EXPERT = "model.layers.1.mlp.experts.2."


@dataclass
class Model:
    """What is written: tensors by file, config, and what is done to the folder afterwards."""

    files: dict[str, dict[str, torch.Tensor]]
    config: dict[str, Any]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of the first file."""
        return next(iter(self.files.values()))

    @property
    def declared(self) -> dict[str, Any]:
        """The quantization_config."""
        return self.config["quantization_config"]  # type: ignore[no-any-return]

    def write(self, folder: Path) -> None:
        """The folder, with an index if there is more than one file."""
        for name, tensors in self.files.items():
            save_file(tensors, folder / name, metadata={"format": "pt"})
        if len(self.files) > 1:
            weight_map = {
                tensor: name for name, tensors in self.files.items() for tensor in tensors
            }
            (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(self.config))

    def drop(self, part: str) -> None:
        """Without the tensors that have this in their names."""
        for tensors in self.files.values():
            for name in [name for name in tensors if part in name]:
                del tensors[name]


def quantized(name: str, n: int, k: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": torch.ones(n, k).to(torch.float8_e4m3fn),
        f"{name}.weight_scale_inv": torch.full((-(-n // 128), -(-k // 128)), 1e-3),
    }


def dense() -> Model:
    tensors = {"model.norm.weight": torch.ones(256)}
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        tensors |= quantized(mlp + "gate_proj", 384, 256) | quantized(mlp + "up_proj", 384, 256)
        tensors |= quantized(mlp + "down_proj", 256, 384)
    return Model({SINGLE_NAME: tensors}, config())


def experts() -> Model:
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            for leaf, n, k in (("gate", 128, 256), ("up", 128, 256), ("down", 256, 128)):
                tensors |= quantized(f"{prefix}{leaf}_proj", n, k)
    return Model({SINGLE_NAME: tensors}, {**config(), "num_experts": 4})


def config() -> dict[str, Any]:
    declared = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return {"num_hidden_layers": 2, "quantization_config": declared}


def sharded() -> Model:
    model = dense()
    whole = model.tensors
    names = [f"model-0000{shard + 1}-of-00002.safetensors" for shard in range(2)]
    first = {name: tensor for name, tensor in whole.items() if "layers.1." not in name}
    second = {name: tensor for name, tensor in whole.items() if "layers.1." in name}
    model.files = dict(zip(names, (first, second), strict=True))
    return model


def edit(change: Callable[[Model], object], base: Callable[[], Model] = dense) -> Any:
    """Writes ``base`` with a change to its tensors or its config."""

    def make(folder: Path) -> None:
        model = base()
        change(model)
        model.write(folder)

    return make


def tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return edit(lambda model: model.tensors.update({name: value(model.tensors[name])}))


def declare(**changed: object) -> Any:
    return edit(lambda model: model.declared.update(changed))


def folder(change: Callable[[Path], object], base: Callable[[], Model] = sharded) -> Any:
    """Writes ``base``, then changes files."""

    def make(path: Path) -> None:
        base().write(path)
        change(path)

    return make


def index(change: Callable[[dict[str, str]], object]) -> Any:
    def edit_index(path: Path) -> None:
        document = json.loads((path / INDEX_NAME).read_text())
        change(document["weight_map"])
        (path / INDEX_NAME).write_text(json.dumps(document))

    return folder(edit_index)


def lost_file(path: Path) -> None:
    """The second file is gone, and the index written anew from what is left."""
    (path / SECOND).unlink()
    first = dict.fromkeys(sharded().tensors, "model-00001-of-00002.safetensors")
    (path / INDEX_NAME).write_text(json.dumps({"weight_map": first}))


SECOND = "model-00002-of-00002.safetensors"

# Nothing can be read: one line, with these words.
REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing shard": (
        folder(lambda path: (path / SECOND).unlink()),
        (INDEX_NAME, repr(SECOND), "missing; download it again"),
    ),
    "shard cut in half": (
        folder(lambda path: (path / SECOND).write_bytes((path / SECOND).read_bytes()[:9000])),
        (SECOND, "truncated, download it again"),
    ),
    "empty shard": (folder(lambda path: (path / SECOND).write_bytes(b"")), (SECOND, "too few")),
    "Git LFS pointer": (
        folder(lambda path: (path / SECOND).write_text("version https://git-lfs.example/v1\n")),
        (SECOND, "Git LFS pointer", "git lfs pull"),
    ),
    "page of a server": (
        folder(lambda path: (path / SECOND).write_text("<!DOCTYPE html><html>404</html>")),
        (SECOND, "a page that a server answered"),
    ),
    "index without shards' names": (
        folder(lambda path: (path / INDEX_NAME).write_text("{}")),
        ("no weight_map", "download it again"),
    ),
    "index cut": (
        folder(lambda path: (path / INDEX_NAME).write_text('{"weight_map": {')),
        ("the file is not valid JSON", "download it again"),
    ),
    "index names another shard": (
        index(lambda names: names.update({DOWN: SECOND})),
        (DOWN, "different versions, download them together"),
    ),
    "index lacks a tensor": (index(lambda names: names.pop(SCALE)), (SCALE, "not in the index")),
    "index has a tensor more": (
        index(lambda names: names.update({"ghost": SECOND})),
        ("'ghost'", SECOND, "download them together"),
    ),
    "no index": (
        folder(lambda path: (path / INDEX_NAME).unlink()),
        ("2 .safetensors files", "download the index"),
    ),
    "one file beside the shards": (
        folder(lambda path: save_file(dense().tensors, path / SINGLE_NAME)),
        ("transformers reads the first", "remove one"),
    ),
    "pickle": (
        folder(lambda path: (path / SINGLE_NAME).rename(path / "pytorch_model.bin"), dense),
        ("pytorch_model.bin", "safetensors only"),
    ),
    "GGUF": (
        folder(lambda path: (path / SINGLE_NAME).rename(path / "model.gguf"), dense),
        ("model.gguf", "safetensors only"),
    ),
    "another name": (
        folder(lambda path: (path / SINGLE_NAME).rename(path / "all.safetensors"), dense),
        ("give the file itself", "all.safetensors"),
    ),
    "a folder deeper": (
        lambda path: (path / "inner").mkdir() or dense().write(path / "inner"),  # type: ignore[func-returns-value]
        ("did you mean", "inner?"),
    ),
    "nothing": (lambda _: None, ("give the directory that holds the weights",)),
    "interrupted download": (
        lambda path: (path / SINGLE_NAME).symlink_to("../blobs/abc"),
        ("a link to a file that is missing; download it again",),
    ),
    "config cut": (
        folder(lambda path: (path / "config.json").write_text('{"a":'), dense),
        ("config.json", "not valid JSON", "repair it"),
    ),
    "block size is text": (declare(weight_block_size="128"), ("config.json", "'128'", "integers")),
    "unknown method": (declare(quant_method="gptq"), ("config.json", "'gptq'", "compressed-tens")),
    "skip list is a number": (declare(modules_to_not_convert=5), ("modules_to_not_convert",)),
}

# It is read; inspect names each of these layers' faults. (How, what the fault says.)
FAULTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no scale": (
        edit(lambda model: model.drop(SCALE)),
        (repr(DOWN), "has no scale", SCALE, "download or convert it again"),
    ),
    "two scales": (
        edit(lambda model: model.tensors.update({DOWN + "_scale": torch.ones(2, 3)})),
        (repr(DOWN), "has two scales", "remove"),
    ),
    "scale transposed": (tensor(SCALE, lambda scale: scale.T.contiguous()), ("it is transposed",)),
    "scale of other blocks": (
        tensor(SCALE, lambda _: torch.ones(4, 6)),
        ("(4, 6)", "would fit 64x64 blocks", "weight_block_size"),
    ),
    "scale of another model": (
        tensor(SCALE, lambda _: torch.ones(4, 5)),
        ("different checkpoints",),
    ),
    "scale in float64": (tensor(SCALE, torch.Tensor.double), ("F64", "store it as float32")),
    "weight with one axis": (
        tensor(DOWN, lambda data: data.view(torch.uint8).reshape(-1).view(data.dtype)),
        ("a weight has 2 or 3 axes",),
    ),
    "weight without values": (
        edit(
            lambda model: model.tensors.update(
                {DOWN: torch.empty(0, 384).to(torch.float8_e4m3fn), SCALE: torch.empty(0, 3)}
            )
        ),
        (repr(DOWN), "(0, 384)", "no values", "download it again"),
    ),
    "bias of another length": (
        edit(lambda model: model.tensors.update({DOWN[:-6] + "bias": torch.ones(7)})),
        (DOWN[:-7], "has shape (7,), but the weight 256 rows", "download both"),
    ),
    "gate and up of different shape": (
        edit(lambda model: model.tensors.update(quantized(GATE, 256, 256))),
        ("model.layers.0.mlp", "(256, 256), but up_proj (384, 256)", "download"),
    ),
    "config of other blocks": (
        declare(weight_block_size=[64, 64]),
        ("would fit 128x128 blocks", "weight_block_size"),
    ),
    "no block size": (
        edit(lambda model: model.declared.pop("weight_block_size")),
        ("config.json says 'per-tensor FP8'", "never guessed", "add quantization_config"),
    ),
    "no config": (
        folder(lambda path: (path / "config.json").unlink(), dense),
        ("no config.json beside it declares", "add quantization_config"),
    ),
    "an expert missing": (
        edit(lambda model: model.drop(EXPERT), experts),
        ("model.layers.1.mlp.experts", "expert 2 is missing (down_proj, gate_proj, up_proj)"),
    ),
    "a part of an expert missing": (
        edit(lambda model: model.drop(EXPERT + "up_proj"), experts),
        ("model.layers.1.mlp.experts", "expert 2 is missing (up_proj)"),
    ),
    "gate without up": (
        edit(lambda model: model.drop("layers.1.mlp.up_proj")),
        ("model.layers.1.mlp", "has no up_proj"),
    ),
    "a layer missing between others": (
        edit(
            lambda model: model.tensors.update(quantized("model.layers.3.mlp.gate_proj", 384, 256))
        ),
        ("model.layers has 3 layers, but 2 is missing",),
    ),
}

# It is read; inspect warns. (How, the warning's code, what it says.)
WARNINGS: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "one layer in E5M2": (
        tensor(DOWN, lambda data: data.float().to(torch.float8_e5m2)),
        "other_than_declared",
        ("E5M2", "neither plans, runs nor converts"),
    ),
    "one layer per tensor": (
        tensor(SCALE, lambda _: torch.tensor(0.5)),
        "other_than_declared",
        ("per-tensor FP8",),
    ),
    "one layer in bfloat16, its scale left": (
        tensor(DOWN, torch.Tensor.bfloat16),
        "scale_without_data",
        ("scale of no quantized weight",),
    ),
    "codes saved as bytes": (
        tensor(DOWN, lambda data: data.view(torch.uint8)),
        "other_than_declared",
        ("packed in U8", "view it as float8_e4m3fn and save it again"),
    ),
    "gate and up without down": (
        edit(lambda model: model.drop("layers.1.mlp.down_proj")),
        "missing_down",
        ("model.layers.1.mlp", "no down_proj", "download"),
    ),
    "a file that the index lost": (
        folder(lost_file),
        "missing_file",
        ("1 of 2 files model-*: 2 is missing", "download"),
    ),
    "declared E5M2": (declare(fmt="e5m2"), "declared_element", ("'e5m2'", "E4M3")),
    "unknown scale format": (declare(scale_fmt="ue7m1"), "declared_scale_format", ("'ue7m1'",)),
    "static without scales": (
        declare(activation_scheme="static"),
        "static_without_scales",
        ("none is stored", "dynamic"),
    ),
    "skip list names a quantized layer": (
        declare(modules_to_not_convert=[DOWN.removesuffix(".weight")]),
        "skip_list_contradicted",
        ("on the skip list",),
    ),
    "the last layer missing": (
        edit(lambda model: model.drop("layers.1.")),
        "missing_layer",
        ("1 layers, but config.json says 2", "download"),
    ),
    "the last expert missing": (
        edit(lambda model: model.drop("layers.1.mlp.experts.3."), experts),
        "expert_count",
        ("holds 3 experts, but config.json says 4",),
    ),
    "an expert too many": (
        edit(
            lambda model: model.tensors.update(
                {
                    name.replace("experts.3", "experts.4"): value.clone()
                    for name, value in model.tensors.items()
                    if "experts.3." in name
                }
            ),
            experts,
        ),
        "expert_count",
        ("holds 5 experts, but config.json says 4 (and in 1 more)",),
    ),
}


def at(place: tuple[int, int], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A scale with another value at one place."""

    def change(scale: torch.Tensor) -> torch.Tensor:
        scale = scale.clone()
        scale[place] = value
        return scale

    return change


CURE = (SINGLE_NAME, "download that file again")

# Only the data tells: verify finds it. (How, the finding's code, what it says.)
IN_DATA: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "NaN": (tensor(SCALE, at((1, 2), float("nan"))), "nonfinite_scale", ("1 of 6", SCALE, *CURE)),
    "infinite": (
        tensor(SCALE, at((1, 2), float("inf"))),
        "nonfinite_scale",
        ("1 of 6", SCALE, *CURE),
    ),
    "zero": (tensor(SCALE, at((1, 2), 0.0)), "zero_scale", ("1 of 6", SCALE, *CURE)),
    "negative": (tensor(SCALE, at((1, 2), -1e-3)), "negative_scale", ("1 of 6", SCALE, *CURE)),
    "subnormal": (tensor(SCALE, lambda scale: scale * 1e-38), "subnormal_scale", ("6 of 6",)),
    "beyond float32": (tensor(SCALE, at((1, 2), 1e37)), "overflowing_scale", ("1e+37",)),
    "NaN in E8M0": (
        tensor(SCALE, lambda _: torch.full((2, 3), 255, dtype=torch.uint8)),
        "nonfinite_scale",
        ("6 of 6", SCALE),
    ),
    "inverse of one": (
        tensor(SCALE, lambda scale: 1 / scale),
        "implausible_scale",
        ("1 of 6 layers", DOWN.removesuffix(".weight"), "invert them"),
    ),
    "inverse of all": (
        edit(
            lambda model: model.tensors.update(
                {k: 1 / v for k, v in model.tensors.items() if k.endswith("_scale_inv")}
            )
        ),
        "implausible_scale",
        ("6 of 6 layers", "1 / scale"),
    ),
    "declared ue8m0, no powers of two": (
        declare(scale_fmt="ue8m0"),
        "declared_ue8m0",
        ("not powers of two",),
    ),
}


def assert_one_line(line: str, words: tuple[str, ...]) -> None:
    assert line.isprintable()
    assert len(line) < 500
    for word in words:
        assert word in line


def said(findings: tuple[Finding, ...], code: str) -> list[str]:
    return [f"{one.layer or ''}: {one.message}" for one in findings if one.code == code]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_file_and_cure(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(read_checkpoint(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))
    assert_one_line(str(caught.value).replace(str(tmp_path), ""), words)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_the_tensor_and_the_cure(name: str, tmp_path: Path) -> None:
    make, words = FAULTS[name]
    make(tmp_path)
    findings = inspect_checkpoint(read_checkpoint(tmp_path)).findings
    faults = [f"{f.layer or ''}: {f.message}" for f in findings if f.severity is Severity.FAULT]
    assert faults
    assert_one_line(faults[0].replace(str(tmp_path), ""), words)


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_where_readers_would_differ(name: str, tmp_path: Path) -> None:
    make, code, words = WARNINGS[name]
    make(tmp_path)
    (line,) = said(inspect_checkpoint(read_checkpoint(tmp_path)).findings, code)
    assert_one_line(line, words)


@pytest.mark.parametrize("name", IN_DATA)
def test_verify_finds_what_only_the_data_tells(name: str, tmp_path: Path) -> None:
    make, code, words = IN_DATA[name]
    make(tmp_path)
    (line,) = said(verify_checkpoint(read_checkpoint(tmp_path)).findings, code)
    assert_one_line(line, words)


@pytest.mark.parametrize("base", [dense, experts, sharded], ids=lambda base: base.__name__)
def test_the_whole_model_has_no_finding(base: Callable[[], Model], tmp_path: Path) -> None:
    base().write(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert inspect_checkpoint(checkpoint).findings == ()
    assert verify_checkpoint(checkpoint).findings == ()


def test_files_numbered_from_zero_are_all_there(tmp_path: Path) -> None:
    """As MiniMax's are, and DeepSeek's total has six digits."""
    model = sharded()
    names = [f"model-0000{shard}-of-000002.safetensors" for shard in range(2)]
    model.files = dict(zip(names, model.files.values(), strict=True))
    model.write(tmp_path)
    assert inspect_checkpoint(read_checkpoint(tmp_path)).findings == ()


def test_a_file_alone_is_not_said_to_lack_what_lies_beside_it(tmp_path: Path) -> None:
    sharded().write(tmp_path)
    assert inspect_checkpoint(read_checkpoint(tmp_path / SECOND)).findings == ()
