"""The gates against 467 GEMMs of real models, whose columns were computed without this code.

tests/data/shapes.csv: one row for each projection and tensor-parallel degree.
"""

from __future__ import annotations

import csv
import re
from functools import lru_cache
from pathlib import Path

import pytest

from blockscale.backends.registry import BACKENDS, backend_named
from blockscale.formats import (
    FP8_128X128_FP32,
    K_MAJOR_PADDED_TRANSPOSED,
    DType,
    PowerOfTwo,
)
from blockscale.planning.decision import Obstacle, Offer
from blockscale.planning.device import KNOWN_DEVICES, Device
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest, ShardStyle
from blockscale.planning.sharding import Parallelism, WholeLayer, cut

Row = dict[str, str]
STYLES = {"rep": ShardStyle.WHOLE, "col": ShardStyle.COLUMN, "row": ShardStyle.ROW}


@lru_cache(maxsize=1)
def rows() -> tuple[Row, ...]:
    path = Path(__file__).parent.parent / "data" / "shapes.csv"
    with path.open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def parts_of(row: Row) -> tuple[int, ...]:
    return tuple(int(part) for part in row["parts"].split("+"))


@lru_cache(maxsize=1)
def on_one_rank() -> tuple[tuple[Row, LinearRequest], ...]:
    """Each row with the request that ``cut`` makes of the TP 1 row of its projection."""
    whole = {(row["model"], row["projection"]): row for row in rows() if row["tp"] == "1"}
    return tuple(
        (row, _cut(whole[row["model"], row["projection"]], int(row["tp"]))) for row in rows()
    )


def _cut(row: Row, degree: int) -> LinearRequest:
    heads = re.fullmatch(r"qkv(\d+)/(\d+)", row["split"])
    units = () if heads is None else (int(heads[1]), int(heads[2]), int(heads[2]))
    style = ShardStyle.COLUMN if heads else STYLES[row["split"]]
    request = LinearRequest(
        row["projection"],
        int(row["N"]),
        int(row["K"]),
        FP8_128X128_FP32,
        DType.BFLOAT16,
        DType.BFLOAT16,
        PowerOfTwo.YES,
        parts_of(row),
    )
    result = cut(WholeLayer(request, style, part_units=units), Parallelism(degree))
    assert isinstance(result, LinearRequest), (row, result)
    return result


def obstacles(backend: str, request: LinearRequest, device: str) -> set[Obstacle]:
    answer = backend_named(backend).evaluate(request, Device.named(device))
    return set() if isinstance(answer, Offer) else {rejection.obstacle for rejection in answer}


def test_the_table_is_whole() -> None:
    assert len(rows()) == 467
    assert len({row["model"] for row in rows()}) == 15


def test_cutting_the_tp1_layer_gives_every_other_row() -> None:
    for row, request in on_one_rank():
        assert (request.n, request.k) == (int(row["N"]), int(row["K"])), row
        assert request.parts == parts_of(row), row


def test_split_scale_blocks_are_found_exactly_where_the_table_has_them() -> None:
    for row, request in on_one_rank():
        is_on_grid = row["shards_on_block_grid"] == "1"
        # A layer that nobody cuts may end inside a block: that is ragged, not split.
        if request.shard.style is ShardStyle.ROW or len(request.parts) > 1:
            assert (request.shard.split_blocks == ()) == is_on_grid, row


@pytest.mark.parametrize(
    ("backend", "device", "column"),
    [
        ("deep_gemm", "sm_90", "deepgemm_N64_K128"),
        ("deep_gemm", "sm_100", "deepgemm_N64_K128"),
        ("flashinfer_sm90", "sm_90", "deepgemm_N64_K128"),
        ("sgl_cutlass", "sm_120", "sm120_cutlass_N128_K128"),
        ("flashinfer_cutlass", "sm_121", "sm120_cutlass_N128_K128"),
    ],
)
def test_alignment_is_refused_exactly_where_the_table_says(
    backend: str, device: str, column: str
) -> None:
    counts = {"0": 0, "1": 0}
    for row, request in on_one_rank():
        refused = Obstacle.ALIGNMENT in obstacles(backend, request, device)
        assert refused == (row[column] == "0"), row
        counts[row[column]] += 1
    assert min(counts.values()) > 10, "a column without both answers proves nothing"


def test_every_backend_refuses_a_split_block() -> None:
    split = [request for _, request in on_one_rank() if request.shard.split_blocks]
    assert split
    for request in split:
        for backend in BACKENDS:
            for device in KNOWN_DEVICES:
                found = backend.evaluate(request, device)
                assert not isinstance(found, Offer)
                assert Obstacle.SHARD_SPLITS_BLOCK in {r.obstacle for r in found}


def test_torch_weight_scales_are_padded_exactly_where_the_table_says() -> None:
    for row, request in on_one_rank():
        if request.k % 128:
            continue
        stored = K_MAJOR_PADDED_TRANSPOSED.stored(request.n, request.k, FP8_128X128_FP32)
        is_padded = stored.shape[0] != request.k // 128
        assert is_padded == (row["torch_K128_div4"] == "0"), row


@pytest.mark.parametrize("device", KNOWN_DEVICES, ids=lambda device: device.name)
def test_every_row_is_planned_or_splits_a_block(device: Device) -> None:
    for row, request in on_one_rank():
        plan = plan_linear(request, device, PlanPolicy(), BACKENDS)
        assert plan.is_servable == (not request.shard.split_blocks), row
