"""Runs the Triton kernels on the CPU, by Triton's interpreter, through their own host code.

``TRITON_INTERPRET=1 python -m pytest tests/kernels_triton`` with Triton installed.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from blockscale.testing.triton_interpreter import interpreting, repairs

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Quantizers and products launch into the interpreter, on CPU tensors."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("set TRITON_INTERPRET=1 before starting pytest")
    pytest.importorskip("triton", reason="pip install triton: it runs on a CPU as an interpreter")
    from blockscale.kernels import step
    from blockscale.kernels.triton import grouped_product, product, quantize, rows

    for owner, name, replacement in repairs():
        monkeypatch.setattr(owner, name, replacement)
    for module in (quantize, product, grouped_product, rows):
        monkeypatch.setattr(module, "launcher", interpreting)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(step, "device_getters", lambda: (lambda: 0, lambda _: 0))
    few = SimpleNamespace(
        major=8, minor=9, multi_processor_count=2, shared_memory_per_multiprocessor=228 << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: few)  # noqa: ARG005 - its signature
    monkeypatch.setattr(
        quantize.Quantizer, "device", property(lambda _: torch.device("cpu"), _ignore)
    )
    quantize.activation_quantizer.cache_clear()
    quantize.silu_multiply_quantizer.cache_clear()
    with np.errstate(all="ignore"):
        yield
    quantize.activation_quantizer.cache_clear()
    quantize.silu_multiply_quantizer.cache_clear()


def _ignore(_: object, __: object) -> None:
    """The quantizer's own GPU is of no use here."""
