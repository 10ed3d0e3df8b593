"""What is installed and does not load is found out before a plan counts on it."""

from __future__ import annotations

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.errors import BackendError
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.kernels.cuda import build
from blockscale.planning.decision import Obstacle
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe.machine import without_unloadable

HOPPER = Device.named("sm_90").with_packages(
    ("torch", "2.11.0"), ("triton", "3.6.0"), ("cuda-bindings", "13.0.0")
)
REQUEST = LinearRequest("x", 2112, 7168, FP8_128X128_FP32, DType.FLOAT16, DType.FLOAT16)


def missing() -> None:
    msg = "libnvrtc.so.13: cannot open shared object file"
    raise BackendError(msg)


def test_without_nvrtc_gluon_serves_alone_and_the_plan_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "nvrtc", missing)
    plan = plan_linear(REQUEST, without_unloadable(HOPPER), PlanPolicy(), BACKENDS)
    assert plan.backends == ("gluon",)
    (reason,) = [r for r in plan.rejected if r.backend == "cuda"]
    assert reason.obstacle is Obstacle.FAILED_PROBE
    assert "libnvrtc.so.13" in reason.reason


def test_with_nvrtc_both_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvrtc", lambda: None)
    assert without_unloadable(HOPPER) == HOPPER
    plan = plan_linear(REQUEST, without_unloadable(HOPPER), PlanPolicy(), BACKENDS)
    assert set(plan.backends) == {"gluon", "cuda"}


@pytest.mark.parametrize("device", [Device.named("sm_90"), Device.named("sm_100")])
def test_nobody_looks_where_the_backend_does_not_serve_or_the_device_is_invented(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "nvrtc", missing)
    assert without_unloadable(device) == device
