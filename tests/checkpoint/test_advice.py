"""Parallel degrees against answers worked out by hand (facts/peers.md 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.advice import Advice, Target, advise
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.schema import read_layers
from blockscale.formats import DType
from blockscale.planning.device import Device
from blockscale.planning.policy import PlanPolicy
from blockscale.testing.model_shapes import (
    ModelShape,
    minimax_m25,
    qwen3_8b,
    write_model_headers,
)

if TYPE_CHECKING:
    from pathlib import Path


def advice(folder: Path, model: ModelShape) -> dict[tuple[int, int], Advice]:
    write_model_headers(folder, model)
    checkpoint = read_checkpoint(folder)
    target = Target(DType.BFLOAT16, Device.named("sm_90"), PlanPolicy(), BACKENDS)
    found = advise(checkpoint, read_layers(checkpoint), target, (1, 2, 4, 8))
    return {(one.parallelism.tensor, one.parallelism.expert): one for one in found}


def test_minimax_works_at_tp4_and_at_tp8_with_experts_kept_whole(tmp_path: Path) -> None:
    """Expert width 1536: 384 at TP 4 is three blocks, 192 at TP 8 is one and a half."""
    found = advice(tmp_path, minimax_m25())
    assert {key for key, one in found.items() if not one.works} == {(8, 1)}
    assert found[8, 1].split == 2 * 62
    assert found[8, 1].reason is not None
    assert "192 rows per rank are 1.5 blocks of 128" in found[8, 1].reason


def test_a_ranks_bytes_are_its_share(tmp_path: Path) -> None:
    found = advice(tmp_path, minimax_m25())
    whole = found[1, 1].weight_bytes
    assert found[2, 1].weight_bytes == whole // 2
    assert found[4, 1].weight_bytes == found[4, 4].weight_bytes == whole // 4


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_a_dense_model_has_no_expert_degrees(tmp_path: Path, tensor: int) -> None:
    found = advice(tmp_path, qwen3_8b())
    assert set(found) == {(1, 1), (2, 1), (4, 1), (8, 1)}
    assert found[tensor, 1].works
