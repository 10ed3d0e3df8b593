"""A model loaded by a plan file answers as one that was planned on the spot."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.checkpoint.plan_file import read_plan, saved_plan, write_plan
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import Merging, RequestOptions, requests_of
from blockscale.checkpoint.schema import read_layers
from blockscale.errors import PlanMismatchError
from blockscale.formats import DType
from blockscale.integrations.transformers import load_model, plan_modules
from blockscale.planning.device import Device
from blockscale.planning.policy import PlanPolicy

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def plan_file(tiny_fp8: Path, tmp_path: Path) -> Path:
    """Made for a named CPU, as on a laptop; the reference backend, which is not the default."""
    checkpoint = read_checkpoint(tiny_fp8)
    layers = read_layers(checkpoint)
    policy = PlanPolicy(backends=("reference",))
    plan = plan_modules(checkpoint, layers, DType.FLOAT32, Device.named("cpu"), policy)
    options = RequestOptions(DType.FLOAT32, merging=Merging.MODULE)
    assert len(requests_of(checkpoint, layers, options).requests) == len(plan.layers)
    write_plan(tmp_path / "plan.json", saved_plan(plan, checkpoint, options))
    return tmp_path / "plan.json"


def test_the_file_decides_backends_and_dtype(tiny_fp8: Path, plan_file: Path) -> None:
    loaded = load_model(tiny_fp8, plan=plan_file)
    assert {name for layer in loaded.plan.layers for name in layer.backends} == {"reference"}
    assert loaded.model.dtype is torch.float32
    again = load_model(tiny_fp8, dtype=DType.FLOAT32, policy=PlanPolicy(backends=("reference",)))
    tokens = torch.arange(16).reshape(1, 16)
    with torch.inference_mode():
        assert torch.equal(loaded.model(tokens).logits, again.model(tokens).logits)


def test_a_read_plan_serves_too(tiny_fp8: Path, plan_file: Path) -> None:
    saved = read_plan(plan_file)
    assert load_model(tiny_fp8, plan=saved).plan.layers == saved.plan.layers


def test_another_dtype_or_checkpoint_is_refused(
    tiny_fp8: Path, plan_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanMismatchError, match="planned for float32 activations"):
        load_model(tiny_fp8, dtype=DType.BFLOAT16, plan=plan_file)
    other = tmp_path / "other"
    shutil.copytree(tiny_fp8, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    with pytest.raises(PlanMismatchError, match=r"plan\.json does not fit: config\.json is not"):
        load_model(other, plan=plan_file)
