"""The tables of docs/backends.md say what the gates and offers say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.formats import (
    FP8_32X32_UE8M0,
    FP8_128X128_FP32,
    MXFP8,
    DType,
    PowerOfTwo,
)
from blockscale.planning.decision import Evidence, Offer, PlannableBackend, Readiness
from blockscale.planning.device import KNOWN_DEVICES, Device
from blockscale.planning.request import LinearRequest

TEXT = (Path(__file__).parent.parent.parent / "docs" / "backends.md").read_text(encoding="utf-8")
PLAIN = LinearRequest(
    "layer", 4096, 4096, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16, PowerOfTwo.YES
)
IDS = [backend.name for backend in BACKENDS]


def table(heading: str) -> dict[str, dict[str, str]]:
    """The rows of the table below ``heading``, by the backend's name."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    head, _, *rows = lines
    assert all(len(row) == len(head) for row in rows)
    return {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}


GATES, FORMS = table("Gates"), table("Forms and standing")


def offers(backend: PlannableBackend, **changes: object) -> dict[str, Offer]:
    """Its offers by architecture, for a plain layer or an MXFP8 one where it wants such."""
    found = {}
    for device in KNOWN_DEVICES:
        for fmt in (FP8_128X128_FP32, MXFP8):
            request = replace(PLAIN, **{"format": fmt, "parts": (), **changes})
            answer = backend.evaluate(request, device)
            if isinstance(answer, Offer):
                found.setdefault(device.name, answer)
    return found


def test_both_tables_name_every_backend_in_the_order_of_preference() -> None:
    assert list(GATES) == IDS
    assert list(FORMS) == IDS


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_architectures(backend: PlannableBackend) -> None:
    assert GATES[backend.name]["architectures"].split(", ") == list(offers(backend))


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_output_dtypes(backend: PlannableBackend) -> None:
    said = re.sub(r"\(.*\)|; \w+ once proven", "", GATES[backend.name]["output"]).strip()
    if said == "the activation's dtype":
        for dtype in DType:
            assert offers(backend, out_dtype=dtype, activation_dtype=dtype)
            assert not offers(backend, out_dtype=dtype, activation_dtype=_another(dtype))
        return
    written = [dtype.value for dtype in DType if offers(backend, out_dtype=dtype)]
    assert said.split(", ") == written


def _another(dtype: DType) -> DType:
    return next(other for other in DType if other is not dtype)


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_blocks(backend: PlannableBackend) -> None:
    said = GATES[backend.name]["blocks"]
    takes_small = bool(offers(backend, format=FP8_32X32_UE8M0))
    assert takes_small == ("32x32" in said or said == "any")


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_sizes(backend: PlannableBackend) -> None:
    """The largest step of each axis passes wherever anything does, half the smallest nowhere."""
    said = GATES[backend.name]["N, K"]
    sizes = {axis: [int(x) for x in re.findall(rf"{axis} % (\d+)", said)] for axis in ("N", "K")}
    if said == "any":
        assert offers(backend, n=77, k=333)
        return
    for axis, multiples in sizes.items():
        assert set(offers(backend, **{axis.lower(): 4096 + max(multiples)})) == set(offers(backend))
        assert offers(backend, **{axis.lower(): 4096 + min(multiples) // 2}) == {}


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_experts(backend: PlannableBackend) -> None:
    stacked = offers(backend, experts=8)
    said = GATES[backend.name]["experts"]
    assert said in {"yes", "no", "plan only"}
    assert bool(stacked) == (said != "no")
    can_run = any(offer.readiness is Readiness.RUNNABLE for offer in stacked.values())
    assert can_run <= (said == "yes"), "the row says that experts cannot be run"


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_layouts(backend: PlannableBackend) -> None:
    row = FORMS[backend.name]
    for operand, column in (("weight", "weight scales"), ("activation", "activation scales")):
        forms = [getattr(offer, operand) for offer in offers(backend).values()]
        named = set(re.findall(r"`(\w+)`", row[column]))
        assert named == {form.layout.name for form in forms if form is not None}
        assert (row[column] == "none") == (None in forms)
        if "checkpoint's" not in row["weight scales"]:
            formats = {form.format.scale.value for form in forms if form is not None}
            assert set(re.findall(r"\b(fp32|ue8m0)\b", row[column])) == formats


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_standing(backend: PlannableBackend) -> None:
    row = FORMS[backend.name]
    words = {
        "run": Readiness.RUNNABLE,
        "run once proven": Readiness.ONCE_PROVEN,
        "plan only": Readiness.PLAN_ONLY,
    }
    for architecture, offer in offers(backend).items():
        evidence, *dispute = _said_of(architecture, row["believed because"]).split(", ")
        assert offer.evidence is Evidence(evidence)
        disputed = any("unproven here" in note for note in offer.notes)
        assert disputed == (dispute == ["disputed"])
        said = words[_said_of(architecture, row["blockscale can"])]
        assert offer.readiness is said, "the last column is out of date"
        if said is not Readiness.PLAN_ONLY:
            assert hasattr(backend, "bind")


def _said_of(architecture: str, cell: str) -> str:
    """What a cell like ``sm_90: run; else plan only`` says of one architecture."""
    first, has_else, other = cell.partition("; else ")
    if not has_else:
        return cell
    name, _, said = first.partition(": ")
    return said if name == architecture else other


@pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
def test_needed_cuda(backend: PlannableBackend) -> None:
    """The newest release that the row names is enough everywhere, one before the oldest nowhere."""
    named = re.findall(r"CUDA 1\d\.\d|else 1\d\.\d", GATES[backend.name]["needs"])
    releases = sorted((int(x[-4:-2]), int(x[-1])) for x in named)
    for name in offers(backend):
        device = Device.named(name)
        if not releases:
            assert _serves(backend, replace(device, cuda=(11, 0)))
            continue
        assert _serves(backend, replace(device, cuda=releases[-1]))
        major, minor = releases[0]
        assert not _serves(backend, replace(device, cuda=(major, minor - 1)))


def _serves(backend: PlannableBackend, device: Device) -> bool:
    answers = [
        backend.evaluate(replace(PLAIN, format=fmt), device) for fmt in (FP8_128X128_FP32, MXFP8)
    ]
    return any(isinstance(answer, Offer) for answer in answers)
