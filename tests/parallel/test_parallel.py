"""Layers spread over 2 and 4 processes that speak gloo, against one process. See ``worker.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from blockscale.errors import ModelError
from blockscale.parallel.experts import TravellingExperts
from blockscale.parallel.ranks import Ranks
from blockscale.testing.ranks import PASSED, run_ranks

WORKER = Path(__file__).with_name("worker.py")
CASES = (
    "column_parallel_is_bitwise",
    "row_parallel_is_within_the_rounding_of_its_sum",
    "remedies_compute_the_whole_mlp",
    "attention_remedies_keep_heads",
    "gathered_outputs_are_the_whole_output",
    "a_plan_for_other_ranks_is_refused",
    "travelling_experts_are_bitwise_those_of_one_process",
    "summed_experts_are_those_of_one_process",
)


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size}-ranks")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, warm_program: str
) -> list[dict[str, str]]:
    """What every rank says about every case."""
    size: int = request.param
    with mock.patch.object(sys, "executable", warm_program):
        return run_ranks(WORKER, size, tmp_path_factory.mktemp(f"ranks{size}"))


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_one_process(results: list[dict[str, str]], case: str) -> None:
    assert [found[case] for found in results] == [PASSED] * len(results)


def test_every_case_is_listed(results: list[dict[str, str]]) -> None:
    assert all(set(found) == set(CASES) for found in results)


def test_ranks_without_a_group_are_refused() -> None:
    with pytest.raises(ModelError, match="torchrun"):
        Ranks.joined()


def test_one_process_needs_no_group() -> None:
    ranks = Ranks()
    values = torch.arange(6.0).view(2, 3)
    assert torch.equal(ranks.sum(values.clone()), values)
    assert torch.equal(ranks.side_by_side(values), values)


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ModelError, match="10 experts"):
        TravellingExperts(lambda hidden, _ids, _weights: hidden, 10, Ranks(0, 4))
