"""Runs the Triton kernels on the CPU, by Triton's interpreter, through their own host code.

``TRITON_INTERPRET=1 python -m pytest tests/kernels_triton`` with Triton installed. Three things of
the interpreter are replaced, because they are not what a GPU computes: casts (it breaks ties
upwards), FMA (it rounds twice) and the inline assembly of ``reciprocal_exactly``; and one because
numpy 2.5 refuses it: using an array as the bound of a loop.
"""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TORCH_TYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
}
UNSIGNED = {
    8: (np.uint8, torch.uint8),
    16: (np.uint16, torch.uint16),
    32: (np.uint32, torch.uint32),
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Quantizers and products launch into the interpreter, on CPU tensors."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("set TRITON_INTERPRET=1 before starting pytest")
    pytest.importorskip("triton", reason="pip install triton: it runs on a CPU as an interpreter")
    import triton.language as tl
    from triton.runtime import interpreter

    from blockscale.kernels.triton import arithmetic, grouped_product, product, quantize, rows

    monkeypatch.setattr(interpreter, "_convert_float", _convert)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", _counting(interpreter))
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", _fused(interpreter))
    monkeypatch.setattr(arithmetic, "reciprocal_exactly", lambda values: tl.div_rn(1.0, values))
    for module in (quantize, product, grouped_product, rows):
        monkeypatch.setattr(module, "launcher", _launcher)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    few = SimpleNamespace(multi_processor_count=2, shared_memory_per_multiprocessor=228 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: few)  # noqa: ARG005 - its signature
    monkeypatch.setattr(
        quantize._Quantizer, "_device", property(lambda _: torch.device("cpu"), _ignore)
    )
    quantize.activation_quantizer.cache_clear()
    quantize.silu_multiply_quantizer.cache_clear()
    with np.errstate(all="ignore"):
        yield
    quantize.activation_quantizer.cache_clear()
    quantize.silu_multiply_quantizer.cache_clear()


def _ignore(_: object, __: object) -> None:
    """The quantizer's own GPU is of no use here."""


def _launcher(variant: Any, device: int) -> Callable[..., None]:  # noqa: ARG001 - as in build
    """What ``build.launcher`` gives, for the interpreter: addresses become tensors again."""

    def launch(programs: int, *arguments: object) -> None:
        if not programs:
            return
        placed = [
            _at(value, kind) if kind.startswith("*") else value
            for value, (_, kind, _) in zip(arguments, variant.arguments, strict=True)
        ]
        variant.kernel[(programs,)](*placed, **dict(variant.constants))

    return launch


def _at(address: Any, kind: str) -> torch.Tensor:
    """A tensor of one element at an address; the interpreter goes on from there by itself."""
    dtype = TORCH_TYPES[kind[1:]]
    if address is None:
        return torch.zeros(1, dtype=dtype)
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


def _convert(values: np.ndarray, source: Any, target: Any, _: object) -> np.ndarray:
    """Torch's cast: to nearest even, subnormals included."""
    bits, wanted = UNSIGNED[source.primitive_bitwidth], UNSIGNED[target.primitive_bitwidth]
    held = torch.from_numpy(np.ascontiguousarray(values).view(bits[0]))
    cast = held.view(TORCH_TYPES[source.name]).to(TORCH_TYPES[target.name])
    return cast.view(wanted[1]).numpy().reshape(values.shape)


def _counting(interpreter: Any) -> Callable[..., None]:
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda value: value.handle.data.item())

    return patch


def _fused(interpreter: Any) -> Callable[..., object]:
    from blockscale.reference.fused import _fma

    def create_fma(_: object, x: Any, y: Any, z: Any) -> object:
        parts = [torch.from_numpy(np.ascontiguousarray(part.data)) for part in (x, y, z)]
        return interpreter.TensorHandle(_fma(*parts).numpy(), z.dtype.scalar)

    return create_fma
