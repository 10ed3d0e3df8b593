"""The environment becomes a policy, and nothing in it is silently ignored."""

from __future__ import annotations

import pytest

from blockscale.errors import SettingsError
from blockscale.planning.policy import (
    Determinism,
    Exactness,
    PlanPolicy,
    Proving,
    Strictness,
)
from blockscale.settings import read_settings


def test_an_empty_environment_is_the_default_policy() -> None:
    assert read_settings({"PATH": "/bin", "BLOCKSCALE_BACKENDS": ""}).policy == PlanPolicy()


def test_every_variable_is_read() -> None:
    policy = read_settings(
        {
            "BLOCKSCALE_BACKENDS": "triton, reference",
            "BLOCKSCALE_EXACTNESS": "allow_lossy",
            "BLOCKSCALE_MAX_RELATIVE_ERROR": "0.01",
            "BLOCKSCALE_DETERMINISM": "required",
            "BLOCKSCALE_STRICTNESS": "raise",
            "BLOCKSCALE_PROVING": "required",
        }
    ).policy
    assert policy == PlanPolicy(
        ("triton", "reference"),
        Exactness.ALLOW_LOSSY,
        0.01,
        Determinism.REQUIRED,
        Strictness.RAISE,
        Proving.REQUIRED,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BLOCKSCALE_EXACTNESS", "yes"),
        ("BLOCKSCALE_MAX_RELATIVE_ERROR", "nan"),
        ("BLOCKSCALE_MAX_RELATIVE_ERROR", "2"),
        ("BLOCKSCALE_DETERMINISM", "True"),
        ("BLOCKSCALE_EXACTNES", "exact"),
    ],
)
def test_values_and_names_without_meaning_are_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        read_settings({name: value})
