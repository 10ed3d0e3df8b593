"""What a fingerprint covers, and files that are no plans."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.backends.registry import BACKENDS, packages_of
from blockscale.checkpoint.plan_file import (
    fingerprint_of,
    read_plan,
    saved_plan,
    situation_of,
    write_plan,
)
from blockscale.checkpoint.rank_plan import plan_rank
from blockscale.checkpoint.read import INDEX_NAME, read_checkpoint
from blockscale.checkpoint.requests import Merging, RequestOptions, requests_of
from blockscale.checkpoint.schema import read_layers
from blockscale.errors import CheckpointError
from blockscale.formats import DType
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.saved import SavedPlan, mismatches
from blockscale.planning.sharded import Target
from blockscale.planning.sharding import Parallelism
from blockscale.probe import detect_device
from blockscale.testing.model_shapes import minimax_m25, write_model_headers

if TYPE_CHECKING:
    from pathlib import Path


def saved(path: Path, device: Device) -> SavedPlan:
    checkpoint = read_checkpoint(path)
    layers = read_layers(checkpoint)
    options = RequestOptions(DType.BFLOAT16, merging=Merging.MODULE)
    requests = requests_of(checkpoint, layers, options).requests
    plan = plan_model(requests, device, PlanPolicy(), BACKENDS, skipped=layers.skipped)
    return saved_plan(plan, checkpoint, options)


def reasons(plan: SavedPlan, path: Path, device: Device) -> tuple[str, ...]:
    checkpoint = read_checkpoint(path)
    target = Target(device, plan.plan.policy, BACKENDS)
    here = situation_of(plan, checkpoint, read_layers(checkpoint), target)
    return mismatches(plan, here, BACKENDS, packages_of)


def edit(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_written_plan_is_read_back_and_fits(fp8_checkpoint: Path, tmp_path: Path) -> None:
    device = detect_device()
    plan = saved(fp8_checkpoint, device)
    write_plan(tmp_path / "plan.json", plan)
    assert [file.name for file in tmp_path.glob("*plan.json*")] == ["plan.json"]
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o644
    back = read_plan(tmp_path / "plan.json")
    assert back == plan
    assert dict(back.versions).keys() >= {"blockscale", "torch"}
    assert reasons(back, fp8_checkpoint, device) == ()


def test_a_plan_for_a_named_cpu_fits_this_one(fp8_checkpoint: Path) -> None:
    plan = saved(fp8_checkpoint, Device.named("cpu"))
    assert [name for name, _ in plan.versions] == ["blockscale"]
    assert reasons(plan, fp8_checkpoint, detect_device()) == ()


@pytest.mark.parametrize(("tensor", "expert"), [(8, 1), (8, 8)])
def test_a_rank_that_needs_remedies_fits_again(tmp_path: Path, tensor: int, expert: int) -> None:
    write_model_headers(tmp_path, minimax_m25(layers=4))
    checkpoint = read_checkpoint(tmp_path)
    layers = read_layers(checkpoint)
    options = RequestOptions(DType.FLOAT16, Parallelism(tensor, expert))
    b200 = Device.named("sm_100")
    target = Target(b200, PlanPolicy(), BACKENDS)
    plan = saved_plan(plan_rank(checkpoint, layers, options, target).plan, checkpoint, options)
    assert (plan.tensor_parallel, plan.expert_parallel) == (tensor, expert)
    assert reasons(plan, tmp_path, b200) == ()


def test_data_spelling_and_shards_are_not_covered(fp8_checkpoint: Path) -> None:
    before = fingerprint_of(read_checkpoint(fp8_checkpoint))
    config = json.loads((fp8_checkpoint / "config.json").read_text())
    backwards = dict(reversed(config.items()))
    (fp8_checkpoint / "config.json").write_text(json.dumps(backwards, indent=7))
    tensors = load_file(fp8_checkpoint / "model.safetensors")
    tensors["model.norm.weight"] += 1
    (fp8_checkpoint / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for index, part in enumerate((names[:3], names[3:])):
        file = f"part-{index}.safetensors"
        save_file({name: tensors[name] for name in part}, fp8_checkpoint / file)
        weight_map.update(dict.fromkeys(part, file))
    (fp8_checkpoint / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert fingerprint_of(read_checkpoint(fp8_checkpoint)) == before


def test_names_dtypes_shapes_and_config_are_covered(fp8_checkpoint: Path) -> None:
    device = detect_device()
    plan = saved(fp8_checkpoint, device)
    file = fp8_checkpoint / "model.safetensors"
    tensors = load_file(file)
    edit(fp8_checkpoint, rope_theta=1.0)
    (reason,) = reasons(plan, fp8_checkpoint, device)
    assert reason == f"config.json is not the one of {fp8_checkpoint} that was planned"
    plan = saved(fp8_checkpoint, device)
    for changed in (
        {**tensors, "model.norm.weight": tensors["model.norm.weight"].float()},
        {**tensors, "model.norm.weight": torch.zeros(8, dtype=torch.bfloat16)},
        {**tensors, "more": torch.zeros(1)},
    ):
        save_file(changed, file)
        (reason,) = reasons(plan, fp8_checkpoint, device)
        assert reason.startswith("tensors have changed")


@pytest.mark.parametrize("text", ["", "{}", "not JSON", '{"schema": 1, "kind": "blockscale plan"}'])
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=r"other\.json: not a plan file") as caught:
        read_plan(file)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_or_written(fp8_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_plan(tmp_path / "none.json")
    plan = saved(fp8_checkpoint, Device.named("cpu"))
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_plan(tmp_path / "no" / "folder.json", plan)
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_plan(tmp_path / "taken", plan)
    assert not list(tmp_path.glob(".taken*"))
