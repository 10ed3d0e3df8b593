"""The small values that plans are made of: devices, proofs, token ranges, requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockscale.errors import FormatError, SettingsError
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.planning.decision import MRange
from blockscale.planning.device import KNOWN_DEVICES, Device, Installed, Proof, Verdict
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest

BF16, FP16 = DType.BFLOAT16, DType.FLOAT16


@pytest.mark.parametrize("device", KNOWN_DEVICES, ids=lambda device: device.name)
def test_invented_devices_assume_every_provider_and_prove_nothing(device: Device) -> None:
    assert Device.named(device.name) is device
    assert device.architecture == device.name
    assert device.is_cpu == (device.name == "cpu")
    assert device.installed("any-package") is Installed.ASSUMED
    assert device.version("torch") is None
    assert device.proofs == ()


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError) as caught:
        Device.named("sm_75")
    assert "sm_75" in str(caught.value)
    for device in KNOWN_DEVICES:
        assert device.name in str(caught.value)


def test_a_machine_with_listed_packages_has_those_and_no_others() -> None:
    machine = Device.named("sm_90").with_packages(("triton", "3.6.0"))
    assert machine.installed("triton") is Installed.YES
    assert machine.version("triton") == "3.6.0"
    assert machine.installed("sgl-deep-gemm") is Installed.NO


def test_a_proof_is_for_one_backend_and_one_output_dtype() -> None:
    proof = Proof("gluon", FP16, Verdict.PROVEN, "relative error 1e-3")
    machine = replace(Device.named("sm_90"), proofs=(proof,))
    assert machine.proof("gluon", FP16) is proof
    assert machine.proof("gluon", BF16) is None
    assert machine.proof("triton", FP16) is None


@pytest.mark.parametrize(
    ("m_range", "serves", "refuses", "unbounded"),
    [
        (MRange(), (0, 1, 10**6), (), True),
        (MRange(1), (1, 10**6), (0,), True),
        (MRange(2), (2, 3), (0, 1), False),
        (MRange(1, 31), (1, 31), (0, 32), False),
        (MRange(0, 0), (0,), (1,), False),
    ],
    ids=str,
)
def test_ranges_include_both_ends(
    m_range: MRange, serves: tuple[int, ...], refuses: tuple[int, ...], *, unbounded: bool
) -> None:
    """A range that begins at 1 counts as unbounded: M = 0 launches nothing."""
    assert all(m_range.contains(m) for m in serves)
    assert not any(m_range.contains(m) for m in refuses)
    assert m_range.is_unbounded == unbounded


@pytest.mark.parametrize("size", [{"n": 0}, {"k": 0}, {"n": -1}, {"parts": (64, 65)}])
def test_impossible_layers_are_refused_by_name(size: dict[str, object]) -> None:
    values: dict[str, object] = {"n": 128, "k": 128, "parts": (), **size}
    with pytest.raises(FormatError, match=r"layer 'o_proj'"):
        LinearRequest(
            "o_proj", format=FP8_128X128_FP32, activation_dtype=BF16, out_dtype=BF16, **values
        )


@pytest.mark.parametrize("place", ["activation_dtype", "out_dtype"])
def test_a_dtype_of_another_library_is_refused_by_name(place: str) -> None:
    request = LinearRequest("o", 128, 128, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16)
    with pytest.raises(FormatError, match=r"layer 'o': 'torch\.bfloat16' is no DType"):
        replace(request, **{place: "torch.bfloat16"})


def test_one_name_is_no_tuple_of_backends() -> None:
    with pytest.raises(SettingsError, match=r"give a tuple of names, \('triton',\)"):
        PlanPolicy(backends="triton")


def test_an_unmerged_layer_is_its_only_part() -> None:
    request = LinearRequest("o_proj", 128, 256, FP8_128X128_FP32, BF16, BF16, experts=4)
    assert request.parts == (128,)
    assert request.weight_bytes == 4 * 128 * 256
