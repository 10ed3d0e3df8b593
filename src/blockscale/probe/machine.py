"""This machine, read once, as a value that planning takes."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib import metadata

from blockscale.formats import DType
from blockscale.planning.decision import Arrangement
from blockscale.planning.device import Device, Installed, Proof, Verdict

# Distributions whose presence or version a backend's gate asks about.
PROVIDERS = (
    "torch",
    "triton",
    "sgl-deep-gemm",
    "apache-tvm-ffi",
    "flashinfer-python",
    "sgl-kernel",
    "cuda-bindings",
    "transformers",
)
# Compute capability of what gemm.cu is compiled for.
NVRTC_SERVES = (9, 0)


def detect_device() -> Device:
    """This machine, with the proofs of ``doctor --probe`` and the times of ``tune``, where kept.

    Without them ``proofs`` is empty: that a provider is installed does not mean that it computes
    the right numbers. Times come from a table that ships with blockscale, if there is one for this
    GPU and none was measured here. A provider that is installed and does not load has failed.
    """
    from blockscale.probe.measured import with_measurements
    from blockscale.probe.proving import load_proofs

    return with_measurements(without_unloadable(load_proofs(read_machine())))


def without_unloadable(device: Device) -> Device:
    """``device``, with failed proofs of ``cuda`` where NVRTC's binding is there and NVRTC is not.

    The cuda backend shares layers with Gluon, which must serve them alone then. Elsewhere a
    provider that does not load is found out when it prepares a weight.
    """
    if device.capability != NVRTC_SERVES or device.installed("cuda-bindings") is not Installed.YES:
        return device
    from blockscale.errors import BackendError
    from blockscale.kernels.cuda.build import nvrtc

    try:
        nvrtc()
    except BackendError as error:
        failed = tuple(
            Proof("cuda", dtype, Verdict.FAILED, str(error), arrangement)
            for dtype in DType
            for arrangement in (None, *Arrangement)
        )
        kept = tuple(proof for proof in device.proofs if proof.backend != "cuda")
        return replace(device, proofs=(*kept, *failed))
    return device


def read_machine() -> Device:
    """GPU 0 if torch sees one, else the CPU, with installed providers and their versions."""
    import torch

    packages = installed_packages()
    if not torch.cuda.is_available():
        name = platform.processor() or platform.machine()
        return Device(f"cpu ({name})", None, packages=packages)
    properties = torch.cuda.get_device_properties(0)
    return Device(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.total_memory,
        _cuda_version(torch.version.cuda),
        (*packages, *_driver()),
    )


def _driver() -> tuple[tuple[str, str], ...]:
    """The NVIDIA driver's version as a package, empty if it cannot be asked."""
    try:
        import ctypes

        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, 96) == 0:
            return (("nvidia driver", text.value.decode()),)
    except OSError:
        pass
    return ()


def installed_packages() -> tuple[tuple[str, str], ...]:
    """(distribution, version) of every provider that is installed, and the C++ compiler's path."""
    from blockscale.backends.registry import external_packages
    from blockscale.kernels.cpu.build import find_compiler

    names = dict.fromkeys((*PROVIDERS, *external_packages()))
    found = [(name, version) for name in names if (version := _version(name)) is not None]
    compiler = find_compiler()
    if compiler is not None:
        found.append(("c++", compiler))
    return tuple(found)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cuda_version(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
