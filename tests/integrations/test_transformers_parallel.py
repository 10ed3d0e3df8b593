"""Small random Llama, Qwen3 and Qwen3-MoE models over two processes. See ``shard_worker.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest

from blockscale.testing.ranks import PASSED, run_ranks

pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")

WORKER = Path(__file__).with_name("shard_worker.py")
CASES = (
    "logits_are_those_of_one_process",
    "experts_are_cut_or_dealt",
    "generation_chooses_the_same_tokens",
    "a_rank_holds_its_share",
    "layers_around_an_activation_are_cut_together",
    "heads_that_do_not_divide_are_named",
)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, warm_transformers: str
) -> list[dict[str, str]]:
    """What both ranks say about every case."""
    with mock.patch.object(sys, "executable", warm_transformers):
        return run_ranks(WORKER, 2, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_model(results: list[dict[str, str]], case: str) -> None:
    assert [found[case] for found in results] == [PASSED, PASSED]


def test_every_case_is_listed(results: list[dict[str, str]]) -> None:
    assert all(set(found) == set(CASES) for found in results)
