"""This machine, read once, as a value that planning takes."""

from __future__ import annotations

import platform
from importlib import metadata

from blockscale.planning.device import Device

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


def detect_device() -> Device:
    """This machine, with the proofs of ``doctor --probe`` and the times of ``tune``, where kept.

    Without them ``proofs`` is empty: that a provider is installed does not mean that it computes
    the right numbers. Times come from a table that ships with blockscale, if there is one for this
    GPU and none was measured here.
    """
    from blockscale.probe.measured import with_measurements
    from blockscale.probe.proving import load_proofs

    return with_measurements(load_proofs(read_machine()))


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
