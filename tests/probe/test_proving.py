"""The probe proves what is right and excludes what lies, crashes, hangs or raises."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from blockscale.backends.cpu import Cpu
from blockscale.backends.reference import Reference
from blockscale.backends.registry import BACKENDS
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.planning.decision import Arrangement, Evidence, Obstacle
from blockscale.planning.device import Device, Proof, Verdict
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import items
from blockscale.probe.proving import Pace, keep_proof, load_proofs, proofs_path, prove, save_proofs

pytestmark = pytest.mark.usefixtures("forked")

HERE = str(Path(__file__).parent)
FP32 = (DType.FLOAT32,)
ALL_EXPERT_SHAPES = items.EXPERT_SHAPES


@pytest.fixture
def bad_backends(monkeypatch: pytest.MonkeyPatch) -> object:
    """The module of bad backends, importable here and in child processes.

    They are checked with two dense shapes, one of them with several blocks of K, and with
    ``one_expert_shape`` if asked for: ``test_good_backends_are_proven`` goes through all.
    """
    monkeypatch.setattr(items, "SHAPES", items.SHAPES[:2])
    monkeypatch.setattr(items, "EXPERT_SHAPES", ())
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", HERE, prepend=os.pathsep)
    import bad_backends

    yield bad_backends
    sys.modules.pop("bad_backends", None)


@pytest.fixture
def one_expert_shape(bad_backends: object, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - comes after it
    """Beside the dense shapes."""
    monkeypatch.setattr(items, "EXPERT_SHAPES", ALL_EXPERT_SHAPES[:1])


def test_good_backends_are_proven() -> None:
    proofs = prove([Cpu(), Reference()], (DType.BFLOAT16, DType.FLOAT32))
    assert {proof.backend for proof in proofs} == {"cpu", "reference"}
    assert {proof.verdict for proof in proofs} == {Verdict.PROVEN}
    shapes = {None: "5 shapes", Arrangement.CONTIGUOUS: "2 shapes", Arrangement.MASKED: "2 shapes"}
    assert all(shapes[proof.arrangement] in proof.detail for proof in proofs)
    forms = [(proof.backend, proof.arrangement) for proof in proofs]
    assert forms.count(("cpu", Arrangement.CONTIGUOUS)) == 2
    assert forms.count(("cpu", Arrangement.MASKED)) == 0
    assert forms.count(("reference", Arrangement.MASKED)) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Lies", "elements differ"),
        ("Forgets", "nan"),
        ("MisreadsScales", "differ"),
        ("OtherSteps", "both launches in one step, M=1: 64 of 64 elements differ"),
        ("Crashes", "SIGSEGV in float32 N=64 K=128"),
        ("Raises", "OSError: libnothing.so"),
    ],
)
def test_bad_backends_are_excluded_with_their_reason(
    bad_backends: object, name: str, words: str
) -> None:
    proof, *_ = prove([getattr(bad_backends, name)()], FP32)
    assert proof.arrangement is None
    assert proof.verdict is Verdict.FAILED
    assert words in proof.detail


@pytest.mark.usefixtures("one_expert_shape")
@pytest.mark.parametrize(
    ("name", "arrangement", "words"),
    [
        (
            "SwapsExperts",
            Arrangement.CONTIGUOUS,
            "fingerprint weight, rows (0, 1, 64, 65, 0, 128, 129, 0) in row blocks of 1, expert 1",
        ),
        ("LetsIdleRowsIn", Arrangement.CONTIGUOUS, "nan instead of"),
        (
            "StoresBeyondItsSlot",
            Arrangement.MASKED,
            "in slots, multiples of 1, expert 2: 576 of 36864 elements differ",
        ),
        (
            "CrashesOnExperts",
            Arrangement.CONTIGUOUS,
            "killed by SIGSEGV in float32 N=576 K=512, contiguous experts",
        ),
    ],
)
def test_bad_products_over_experts_are_excluded_with_their_reason(
    bad_backends: object, name: str, arrangement: Arrangement, words: str
) -> None:
    """Alone: dense layers, and experts whose rows lie otherwise, stay proven."""
    backends = [getattr(bad_backends, name)(), Reference()]
    proofs = prove(backends[:1], FP32)
    assert [proof.arrangement for proof in proofs] == [None, *Arrangement]
    (failed,) = [proof for proof in proofs if proof.verdict is Verdict.FAILED]
    assert failed.arrangement is arrangement
    assert words in failed.detail
    device = replace(Device.named("cpu"), proofs=proofs)
    request = LinearRequest("x", 576, 512, FP8_128X128_FP32, *FP32, *FP32)
    dense = plan_linear(request, device, PlanPolicy(), backends)
    assert dense.choices[0].offer.backend == failed.backend
    assert dense.choices[0].offer.evidence is Evidence.PROVEN
    stack = plan_linear(replace(request, experts=8), device, PlanPolicy(), backends)
    rejected = [one.reason for one in stack.rejected if one.obstacle is Obstacle.FAILED_PROBE]
    if arrangement is Arrangement.CONTIGUOUS:
        assert stack.backends == ("reference",)
        (reason,) = rejected
        assert reason.startswith("failed the probe on this device with contiguous experts: ")
    else:
        # Its offer wants rows expert after expert, and those are proven.
        assert not rejected
        assert stack.choices[0].offer.evidence is Evidence.PROVEN


def test_a_backend_that_hangs_is_stopped(bad_backends: object) -> None:
    proof, *_ = prove([bad_backends.Hangs()], FP32, Pace(time_limit_s=6, children=3))
    assert proof.verdict is Verdict.FAILED
    assert "no answer within 6 s" in proof.detail


@pytest.mark.usefixtures("one_expert_shape")
def test_shapes_may_be_checked_by_several_children_at_once(bad_backends: object) -> None:
    """The same proofs, in the same order, told as they are found."""
    told: list[Proof] = []
    proofs = prove([bad_backends.Lies(), Reference()], FP32, Pace(children=2), told.append)
    lies, reference = (proof for proof in proofs if proof.arrangement is None)
    # Lies refuses experts.
    assert [proof.backend for proof in proofs] == ["lies", *["reference"] * 3]
    assert "fingerprint weight, M=1: 1 of 64 elements differ" in lies.detail
    assert "2 shapes" in reference.detail
    assert set(told) == set(proofs)


def test_what_the_time_cuts_off_gets_no_proof(bad_backends: object) -> None:
    assert prove([bad_backends.Hangs()], FP32, Pace(seconds=2)) == ()


@pytest.mark.parametrize(
    ("device", "children"),
    [(Device.named("cpu"), 1), (Device("small", (8, 9), memory_bytes=8 << 30), 2)],
)
def test_as_many_children_as_the_machine_has_room_for(
    device: Device, children: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert Pace.on(device).children == children
    assert Pace.on(Device.named("sm_90")).children == 16


def test_a_crash_loses_its_own_dtype_only(bad_backends: object) -> None:
    """Every dtype gets a verdict of its own, in a process of its own after a crash."""
    proofs = prove([bad_backends.Crashes()], (DType.BFLOAT16, DType.FLOAT16))
    dense = [proof.out_dtype for proof in proofs if proof.arrangement is None]
    assert dense == [DType.BFLOAT16, DType.FLOAT16]


def test_backends_without_run_get_no_proof() -> None:
    plan_only = [backend for backend in BACKENDS if not hasattr(backend, "bind")]
    assert prove(plan_only) == ()


def test_failed_backends_are_not_planned_and_say_why(bad_backends: object) -> None:
    backends = [bad_backends.Lies(), Reference()]
    device = replace(Device.named("cpu"), proofs=prove(backends, FP32))
    request = LinearRequest("x", 64, 128, FP8_128X128_FP32, *FP32, *FP32)
    plan = plan_linear(request, device, PlanPolicy(), backends)
    assert plan.backends == ("reference",)
    assert plan.choices[0].offer.evidence is Evidence.PROVEN
    (rejection,) = [r for r in plan.rejected if r.backend == "lies"]
    assert rejection.obstacle is Obstacle.FAILED_PROBE
    assert "elements differ" in rejection.reason


def test_proofs_are_kept_until_a_version_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    device = Device.named("sm_90").with_packages(("triton", "3.6.0"))
    proofs = (Proof("triton", DType.FLOAT16, Verdict.FAILED, "wrong by 12 %"),)
    save_proofs(device, proofs)
    assert load_proofs(device).proofs == proofs
    newer = device.with_packages(("triton", "3.7.0"))
    assert load_proofs(newer).proofs == ()


def test_a_new_proof_replaces_the_old_one_of_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    device = Device.named("sm_90")
    old = Proof("triton", DType.FLOAT16, Verdict.FAILED, "wrong by 12 %")
    other = Proof("triton", DType.BFLOAT16, Verdict.PROVEN, "5 shapes")
    experts = replace(other, arrangement=Arrangement.MASKED)
    for proof in (old, other, experts, replace(old, verdict=Verdict.PROVEN, detail="5 shapes")):
        keep_proof(device, proof)
    kept = load_proofs(device).proofs
    assert {proof.verdict for proof in kept} == {Verdict.PROVEN}
    assert [proof.arrangement for proof in kept] == [None, Arrangement.MASKED, None]


def test_a_damaged_file_of_proofs_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    device = Device.named("sm_90")
    proofs_path(device).parent.mkdir(parents=True)
    proofs_path(device).write_text("{")
    assert load_proofs(device) == device
