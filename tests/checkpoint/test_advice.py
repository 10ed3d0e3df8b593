"""Parallel degrees and remedies against answers worked out by hand.

Bytes for one rank: a share of the experts' width, times hidden size, times experts and layers.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.advice import Advice, RemedyAdvice, advise
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import RequestOptions, merged_layers
from blockscale.checkpoint.schema import read_layers
from blockscale.formats import DType
from blockscale.planning.device import Device
from blockscale.planning.explain import human_bytes
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import RemedyKind
from blockscale.planning.sharded import Target, plan_shards, shards_of
from blockscale.planning.sharding import Parallelism
from blockscale.testing.model_shapes import (
    minimax_m25,
    qwen3_8b,
    qwen3_30b_a3b,
    qwen3_235b_a22b,
    qwen3_coder_480b,
    write_model_headers,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.requests import MergedLayers
    from blockscale.checkpoint.schema import Layers

    Found: TypeAlias = dict[tuple[int, int], Advice]

ROOT = Path(__file__).parent.parent.parent
HOPPER = Target(Device.named("sm_90"), PlanPolicy(), BACKENDS)
MODELS = {
    "MiniMax-M2.5": minimax_m25,
    "Qwen3-235B": qwen3_235b_a22b,
    "Qwen3-Coder-480B": qwen3_coder_480b,
    "Qwen3-30B-A3B": qwen3_30b_a3b,
    "Qwen3-8B": qwen3_8b,
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Checkpoint, Layers]]:
    """A model's headers, read once for all tests."""

    @cache
    def read(name: str) -> tuple[Checkpoint, Layers]:
        folder = tmp_path_factory.mktemp("headers")
        write_model_headers(folder, MODELS[name]())
        checkpoint = read_checkpoint(folder)
        return checkpoint, read_layers(checkpoint)

    return read


@pytest.fixture(scope="module")
def merged(stored: Callable[[str], tuple[Checkpoint, Layers]]) -> Callable[[str], MergedLayers]:
    """A model's layers, uncut."""
    return cache(lambda name: merged_layers(*stored(name), RequestOptions(DType.BFLOAT16)))


@pytest.fixture(scope="module")
def advice(stored: Callable[[str], tuple[Checkpoint, Layers]]) -> Callable[..., Found]:
    """What is advised for a model, found once for all tests."""

    @cache
    def found(name: str, degrees: tuple[int, ...] = (1, 2, 4, 8)) -> Found:
        checkpoint, layers = stored(name)
        every = advise(checkpoint, layers, DType.BFLOAT16, HOPPER, degrees)
        return {(one.parallelism.tensor, one.parallelism.expert): one for one in every}

    return found


def remedy(one: Advice, kind: RemedyKind) -> RemedyAdvice:
    return next(remedy for remedy in one.remedies if remedy.kind is kind)


def test_minimax_works_as_cut_up_to_tp4_and_at_tp8_with_experts_kept_whole(
    advice: Callable[..., Found],
) -> None:
    """Expert width 1536: 384 at TP 4 is three blocks, 192 at TP 8 is one and a half."""
    found = advice("MiniMax-M2.5")
    assert all(one.works for one in found.values())
    assert {key for key, one in found.items() if one.remedies} == {(8, 1)}
    assert found[8, 1].split == 2 * 62
    assert found[8, 1].chosen == (RemedyKind.REFINE,)
    assert found[8, 1].reason is not None
    assert "192 rows per rank are 1.5 blocks of 128" in found[8, 1].reason


def test_a_ranks_bytes_are_its_share(advice: Callable[..., Found]) -> None:
    found = advice("MiniMax-M2.5")
    whole = found[1, 1].weight_bytes
    assert found[2, 1].weight_bytes == whole // 2
    assert found[4, 1].weight_bytes == found[4, 4].weight_bytes == whole // 4
    assert found[8, 1].weight_bytes == found[8, 2].weight_bytes == whole // 8


# Beside an even share: bytes of one expert's w13 and w2, then experts x layers.
#   refine  w13 in 64x128 blocks, w2 in 32x32 (the plain Triton kernel takes both)
#   rounded shares of whole blocks: 256 of 192 elements, or 384 of 320
HAND_WORKED = [
    (
        "MiniMax-M2.5",
        8,
        (2 * 3 * 24 * 4 - 288 + 96 * 6 * 4 - 144) * 256 * 62,
        (2 * 64 * 3072 + 3072 * 64) * 256 * 62,
        4 / 3,
    ),
    (
        "Qwen3-235B",
        8,
        (2 * 3 * 32 * 4 - 384 + 128 * 6 * 4 - 192) * 128 * 94,
        (2 * 64 * 4096 + 4096 * 64) * 128 * 94,
        4 / 3,
    ),
    (
        "Qwen3-Coder-480B",
        8,
        (2 * 5 * 48 * 4 - 960 + 192 * 10 * 4 - 480) * 160 * 62,
        (2 * 64 * 6144 + 6144 * 64) * 160 * 62,
        1.2,
    ),
    (
        "Qwen3-30B-A3B",
        4,
        (2 * 3 * 16 * 4 - 192 + 64 * 6 * 4 - 96) * 128 * 48,
        (2 * 64 * 2048 + 2048 * 64) * 128 * 48,
        4 / 3,
    ),
]


@pytest.mark.parametrize(("model", "tensor", "scales", "codes", "work"), HAND_WORKED)
def test_remedies_cost_what_was_worked_out_by_hand(
    advice: Callable[..., Found], model: str, tensor: int, scales: int, codes: int, work: float
) -> None:
    found = advice(model, (tensor,))
    split = found[tensor, 1]
    assert split.works
    refine = remedy(split, RemedyKind.REFINE).price
    assert refine is not None
    assert (refine.extra_weight_bytes, refine.extra_scale_bytes, refine.work) == (0, scales, 1.0)
    for kind in (RemedyKind.UNEVEN, RemedyKind.PAD):
        rounded = remedy(split, kind).price
        assert rounded is not None
        assert rounded.extra_weight_bytes == codes
        assert rounded.work == pytest.approx(work, rel=1e-12)
    whole = remedy(split, RemedyKind.EXPERT)
    assert whole.price is not None
    assert whole.expert == 2
    assert (whole.price.extra_weight_bytes, whole.price.extra_scale_bytes) == (0, 0)
    assert all(one.works and not one.remedies for key, one in found.items() if key[1] > 1)


@pytest.mark.parametrize(("model", "tensor"), [row[:2] for row in HAND_WORKED])
@pytest.mark.parametrize("device", ["sm_90", "sm_100", "sm_120", "cpu"])
def test_every_rank_gets_a_working_plan(
    merged: Callable[[str], MergedLayers], model: str, tensor: int, device: str
) -> None:
    target = Target(Device.named(device), PlanPolicy(), BACKENDS)
    for rank in (0, tensor - 1):
        whole = [layer.whole for layer in merged(model).layers]
        plan = plan_shards(shards_of(whole, Parallelism(tensor), target, rank), target)
        assert plan.unservable == ()
        assert "reference" not in {name for layer in plan.layers for name in layer.backends}
        (note,) = [finding for finding in plan.findings if finding.code == "shard_remedy"]
        assert "held without loss by refine" in note.message


@pytest.mark.parametrize(("model", "tensor", "scales", "codes", "work"), HAND_WORKED)
def test_the_document_shows_these_numbers(
    model: str, tensor: int, scales: int, codes: int, work: float
) -> None:
    text = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {model}")]
    rounded = f"{work:.2f}x, {human_bytes(codes)}"
    assert f"TP {tensor} |" in line
    assert line.endswith(f"| {human_bytes(scales)} | {rounded} | {rounded} | 2 |")


def test_narrow_experts_leave_ranks_without_blocks(advice: Callable[..., Found]) -> None:
    """Qwen3-30B at TP 8: six blocks for eight ranks; 96 columns of a rank touch two blocks."""
    found = advice("Qwen3-30B-A3B", (8,))[8, 1]
    assert "leaves 2 of 8 ranks with nothing" in (remedy(found, RemedyKind.UNEVEN).reason or "")
    padded = remedy(found, RemedyKind.PAD).price
    assert padded is not None
    assert padded.work == pytest.approx(256 / 96, rel=1e-12)
    assert remedy(found, RemedyKind.EXPERT).expert == 4
    assert found.works


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_a_dense_model_has_no_expert_degrees(advice: Callable[..., Found], tensor: int) -> None:
    found = advice("Qwen3-8B")
    assert set(found) == {(1, 1), (2, 1), (4, 1), (8, 1)}
    assert found[tensor, 1].works
    assert found[tensor, 1].remedies == ()
