"""The environment becomes a policy, and nothing in it is silently ignored."""

from __future__ import annotations

from dataclasses import fields

import pytest

from blockscale.errors import SettingsError
from blockscale.events import Ranges
from blockscale.planning.policy import (
    Determinism,
    Exactness,
    PlanPolicy,
    Proving,
    Strictness,
)
from blockscale.settings import KNOWN, Process, Settings, read_process, read_settings


def test_an_empty_environment_is_the_default_policy() -> None:
    assert read_settings({"PATH": "/bin", "BLOCKSCALE_BACKENDS": ""}).policy == PlanPolicy()


def test_settings_are_a_frozen_value_of_the_mapping_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BLOCKSCALE_EXACTNESS", "allow_lossy")
    found = read_settings({})
    assert found == Settings()
    with pytest.raises(AttributeError):
        found.policy = PlanPolicy()  # type: ignore[misc]  # that it is refused is the claim


def test_every_field_of_the_policy_has_a_variable() -> None:
    assert {f"BLOCKSCALE_{field.name.upper()}" for field in fields(PlanPolicy)} <= set(KNOWN)


def test_backends_keep_their_order() -> None:
    found = read_settings({"BLOCKSCALE_BACKENDS": "triton,deep_gemm"})
    assert found.policy.backends == ("triton", "deep_gemm")


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


def test_ranges_are_no_part_of_the_policy() -> None:
    assert read_settings({}).ranges is Ranges.NONE
    found = read_settings({"BLOCKSCALE_RANGES": "nvtx"})
    assert found == Settings(PlanPolicy(), Ranges.NVTX)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("BLOCKSCALE_BACKENDS", ",", "names of backends"),
        ("BLOCKSCALE_BACKENDS", "triton,,gluon", "names of backends"),
        ("BLOCKSCALE_BACKENDS", " ", "names of backends"),
        ("BLOCKSCALE_EXACTNESS", "yes", "exact, allow_lossy"),
        ("BLOCKSCALE_EXACTNESS", "EXACT", "exact, allow_lossy"),
        ("BLOCKSCALE_MAX_RELATIVE_ERROR", "nan", "a number from 0 to 1"),
        ("BLOCKSCALE_MAX_RELATIVE_ERROR", "2", "a number from 0 to 1"),
        ("BLOCKSCALE_MAX_RELATIVE_ERROR", "-0.1", "a number from 0 to 1"),
        ("BLOCKSCALE_MAX_RELATIVE_ERROR", "3%", "a number from 0 to 1"),
        ("BLOCKSCALE_DETERMINISM", "True", "any, required"),
        ("BLOCKSCALE_STRICTNESS", "1", "report, raise"),
        ("BLOCKSCALE_PROVING", "no", "any, required"),
        ("BLOCKSCALE_RANGES", "on", "none, nvtx"),
    ],
)
def test_a_value_without_meaning_is_refused_with_what_is_allowed(
    name: str, value: str, allowed: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}; allowed: ")
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["BLOCKSCALE_EXACTNES", "BLOCKSCALE_", "BLOCKSCALE_DEBUG"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({name: "1"})
    message = str(caught.value)
    assert message.startswith(f"{name} is no setting")
    for known in KNOWN:
        assert known in message


def test_the_module_lists_every_variable() -> None:
    import blockscale.settings

    assert blockscale.settings.__doc__ is not None
    for name in KNOWN:
        assert f"``{name}``" in blockscale.settings.__doc__


def test_torchrun_says_which_process_this_is() -> None:
    assert read_process({"RANK": "3", "WORLD_SIZE": "8"}) == Process(3, 8)
    assert read_process({"RANK": "", "LOCAL_RANK": "1"}) == Process(0, 1)


@pytest.mark.parametrize(
    ("rank", "ranks"), [("0", ""), ("", "2"), ("2", "2"), ("-1", "2"), ("a", "2"), ("0", "0")]
)
def test_half_of_torchruns_variables_is_an_error(rank: str, ranks: str) -> None:
    with pytest.raises(SettingsError, match=r"RANK is .* and WORLD_SIZE is"):
        read_process({"RANK": rank, "WORLD_SIZE": ranks})
