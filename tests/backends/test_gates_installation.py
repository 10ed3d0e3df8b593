"""Gates that depend on the installation: packages, releases, the CUDA toolkit, a compiler."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockscale.backends.registry import backend_named
from blockscale.formats import FP8_128X128_FP32, DType, PowerOfTwo
from blockscale.planning.decision import Obstacle, Offer, Rejection
from blockscale.planning.device import Device
from blockscale.planning.request import LinearRequest

REQUEST = LinearRequest(
    "layer", 4096, 4096, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16, PowerOfTwo.YES
)


def answer(backend: str, device: Device) -> Offer | list[Rejection]:
    found = backend_named(backend).evaluate(REQUEST, device)
    return found if isinstance(found, Offer) else list(found)


@pytest.mark.parametrize(
    ("backend", "device", "package"),
    [
        ("deep_gemm", "sm_90", "sgl-deep-gemm"),
        ("flashinfer_trtllm", "sm_100", "flashinfer-python"),
        ("flashinfer_cutlass", "sm_120", "flashinfer-python"),
        ("flashinfer_sm90", "sm_90", "flashinfer-python"),
        ("gluon", "sm_90", "triton"),
        ("cuda", "sm_90", "cuda-bindings"),
        ("triton", "sm_89", "triton"),
        ("sgl_cutlass", "sm_120", "sgl-kernel"),
        ("cpu", "cpu", "c++"),
    ],
)
def test_a_missing_package_is_the_one_reason_and_named(
    backend: str, device: str, package: str
) -> None:
    assumed = Device.named(device)
    assert isinstance(answer(backend, assumed), Offer)
    assert isinstance(answer(backend, assumed.with_packages((package, "99.0"))), Offer)
    rejections = answer(backend, assumed.with_packages(("torch", "2.13.0")))
    assert isinstance(rejections, list)
    (rejection,) = rejections
    assert rejection.obstacle is Obstacle.NOT_INSTALLED
    assert package.removesuffix("++") in rejection.reason
    assert "install" in rejection.reason


# The first CUDA release of each (docs/backends.md), and one before it.
@pytest.mark.parametrize(
    ("backend", "device", "first", "before"),
    [
        ("deep_gemm", "sm_90", (12, 3), (12, 2)),
        ("deep_gemm", "sm_100", (12, 9), (12, 8)),
        ("deep_gemm", "sm_103", (12, 9), (12, 8)),
        ("flashinfer_sm90", "sm_90", (12, 8), (12, 7)),
        ("flashinfer_trtllm", "sm_100", (12, 8), (12, 7)),
        ("flashinfer_cutlass", "sm_120", (12, 8), (12, 7)),
        ("sgl_cutlass", "sm_120", (12, 8), (12, 7)),
        ("torch_scaled_mm", "sm_90", (12, 9), (12, 8)),
    ],
)
def test_an_old_cuda_is_refused_and_the_first_good_one_is_not(
    backend: str, device: str, first: tuple[int, int], before: tuple[int, int]
) -> None:
    machine = Device.named(device)
    for enough in (first, (13, 0), None):
        assert isinstance(answer(backend, replace(machine, cuda=enough)), Offer)
    rejections = answer(backend, replace(machine, cuda=before))
    assert isinstance(rejections, list)
    (rejection,) = rejections
    assert rejection.obstacle is Obstacle.TOOLKIT
    assert f"needs CUDA {first[0]}.{first[1]} or newer" in rejection.reason
    assert f"found {before[0]}.{before[1]}" in rejection.reason


@pytest.mark.parametrize("version", ["3.6.0", "3.6", "3.10.1+git1234", "4.0.0rc1", "4"])
def test_gluon_takes_triton_3_6_and_newer(version: str) -> None:
    device = Device.named("sm_90").with_packages(("triton", version))
    assert isinstance(answer("gluon", device), Offer)


@pytest.mark.parametrize("version", ["3.5.1", "3.5.1+git99", "2.9", "3", "unknown"])
def test_gluon_refuses_an_older_triton(version: str) -> None:
    rejections = answer("gluon", Device.named("sm_90").with_packages(("triton", version)))
    assert isinstance(rejections, list)
    (rejection,) = rejections
    assert rejection.obstacle is Obstacle.TOOLKIT
    assert version in rejection.reason


def test_plain_triton_takes_an_older_triton() -> None:
    device = Device.named("sm_90").with_packages(("triton", "3.2.0"))
    assert isinstance(answer("triton", device), Offer)
