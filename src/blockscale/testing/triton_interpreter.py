"""Triton's interpreter, made to compute what a GPU computes.

Needs ``TRITON_INTERPRET=1`` before Triton is imported. Some things of it are replaced: they are not
what a GPU computes (casts: it breaks ties upwards; FMA: it rounds twice; the minimum of a number
and a NaN, which is the number; inline assembly), or numpy 2.5 refuses them (an array as the bound
of a loop), or they take too long: reductions by a function of ours, an element at a time in Python,
which go by halves of an axis here (the same for what may be reduced in any order), and what it does
anew at every call of a function.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
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


def repairs() -> Iterator[tuple[object, str, object]]:
    """(object, attribute, replacement): what to set before a kernel is run."""
    import triton.language as tl  # noqa: PLC0415 - only where it is installed
    from triton.runtime import interpreter  # noqa: PLC0415 - as above

    from blockscale.kernels.triton import arithmetic, quantize_kernel, words  # noqa: PLC0415 - imports Triton

    yield interpreter, "_convert_float", _convert
    yield interpreter, "_patch_lang_tensor", _counting(interpreter)
    yield interpreter, "_patch_lang", _once(interpreter)
    yield interpreter, "_get_np_dtype", _remembering(interpreter)
    yield interpreter.InterpreterBuilder, "create_fma", _fused(interpreter)
    yield interpreter.ReduceOps, "generic_reduce", _by_halves
    yield interpreter.InterpreterBuilder, "create_minnumf", _smaller_number
    for module in (arithmetic, words):
        yield module, "reciprocal_exactly", lambda values: tl.div_rn(1.0, values)
    yield arithmetic, "reciprocal_nearly", lambda values: tl.div_rn(1.0, values)
    for name, function in _instructions_of(words).items():
        yield words, name, function
    # One kernel runs after the other here.
    yield quantize_kernel, "gdc_wait", lambda: None
    yield quantize_kernel, "gdc_launch_dependents", lambda: None


class interpreting:  # noqa: N801 - in the place of a function
    """What ``build.launcher`` gives, for the interpreter: addresses become tensors again."""

    static = ()
    constants = ()

    def __init__(self, variant: Any, device: int) -> None:  # noqa: ANN401, ARG002 - a Variant, and as build.launcher
        self._variant = variant

    def __call__(self, programs: int, *arguments: object) -> None:
        """Run ``programs`` programs, one after the other."""
        variant = self._variant
        if not programs:
            return
        placed = [
            _at(value, kind) if kind.startswith("*") else value
            for value, (_, kind, _) in zip(arguments, variant.arguments, strict=True)
        ]
        variant.kernel[(programs,)](*placed, **dict(variant.constants))

    def start(self, x: int, y: int, z: int, stream: int, *arguments: object) -> None:
        """As ``build.Launcher.start``; there are no streams."""
        assert (y, z) == (1, 1)
        assert isinstance(stream, int)
        self(x, *arguments)


def _at(address: Any, kind: str) -> torch.Tensor:  # noqa: ANN401 - an int or None
    """A tensor of one element at an address; the interpreter goes on from there by itself."""
    dtype = TORCH_TYPES[kind[1:]]
    if address is None:
        return torch.zeros(1, dtype=dtype)
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


def _convert(values: np.ndarray[Any, Any], source: Any, target: Any, _: object) -> Any:  # noqa: ANN401 - Triton's types
    """Torch's cast: to nearest even, subnormals included."""
    bits, wanted = UNSIGNED[source.primitive_bitwidth], UNSIGNED[target.primitive_bitwidth]
    held = torch.from_numpy(np.ascontiguousarray(values).view(bits[0]))
    cast = held.view(TORCH_TYPES[source.name]).to(TORCH_TYPES[target.name])
    return cast.view(wanted[1]).numpy().reshape(values.shape)


def _by_halves(reduction: Any, values: tuple[Any, ...]) -> list[Any]:  # noqa: ANN401 - ReduceOps, Triton's tensors
    """What ``ReduceOps.generic_reduce`` gives: first half with second, until one slice is left."""
    axis = reduction.axis
    found = [one.handle.data.reshape(-1) if axis is None else one.handle.data for one in values]
    along = axis or 0
    while (length := found[0].shape[along]) > 1:
        half = length // 2
        parts = [np.split(data, (half, 2 * half), axis=along) for data in found]
        joined = reduction.combine_fn.fn(
            *(
                reduction.to_tensor(part[0], one.dtype)
                for part, one in zip(parts, values, strict=True)
            ),
            *(
                reduction.to_tensor(part[1], one.dtype)
                for part, one in zip(parts, values, strict=True)
            ),
        )
        joined = joined if isinstance(joined, tuple) else (joined,)
        found = [
            np.concatenate([new.handle.data, part[2]], axis=along)
            for new, part in zip(joined, parts, strict=True)
        ]
    result = []
    for data, one in zip(found, values, strict=True):
        reduced = data if reduction.keep_dims else data.squeeze(along)
        result.append(reduction.to_tensor(reduced.item() if axis is None else reduced, one.dtype))
    return result


def _counting(interpreter: Any) -> Callable[..., None]:  # noqa: ANN401 - Triton's module
    original = interpreter._patch_lang_tensor  # noqa: SLF001 - it has no other hook

    def patch(tensor: Any, scope: Any) -> None:  # noqa: ANN401 - Triton's types
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda value: value.handle.data.item())

    return patch


def _once(interpreter: Any) -> Callable[..., object]:  # noqa: ANN401 - Triton's module
    """Where a kernel calls a function, ``triton.language`` is patched already: by the kernel."""
    import triton.language as tl  # noqa: PLC0415 - only where it is installed

    original = interpreter._patch_lang  # noqa: SLF001 - it has no other hook
    ours: dict[int, tuple[object, object]] = {}

    def state(lang: Any) -> tuple[object, object]:  # noqa: ANN401 - a module
        return lang.range, vars(lang.tensor).get("__index__")

    def patch(function: Any) -> object:  # noqa: ANN401 - a kernel or a function of one
        langs = [one for one in function.__globals__.values() if one is tl or one is tl.core]
        if langs and all(ours.get(id(lang)) == state(lang) for lang in langs):
            return interpreter._LangPatchScope()  # noqa: SLF001 - nothing to restore
        scope = original(function)
        ours.update((id(lang), state(lang)) for lang in langs)
        return scope

    return patch


def _remembering(interpreter: Any) -> Callable[[Any], object]:  # noqa: ANN401 - Triton's module
    """The original makes a table of all types at every call."""
    import triton.language as tl  # noqa: PLC0415 - only where it is installed

    original = interpreter._get_np_dtype  # noqa: SLF001 - it has no other hook
    known: dict[str, object] = {}

    def numpy_type(dtype: Any) -> object:  # noqa: ANN401 - one of Triton's
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(element, tl.pointer_type):
            return original(element)
        if element.name not in known:
            known[element.name] = original(element)
        return known[element.name]

    return numpy_type


def _fused(interpreter: Any) -> Callable[..., object]:  # noqa: ANN401 - Triton's module
    from blockscale.reference.fused import _fma  # noqa: PLC0415 - beside its only use

    def create_fma(_: object, x: Any, y: Any, z: Any) -> object:  # noqa: ANN401 - Triton's handles
        parts = [torch.from_numpy(np.ascontiguousarray(part.data)) for part in (x, y, z)]
        # The reference's rounding to odd is for finite sums.
        total = parts[0] * parts[1] + parts[2]
        found = torch.where(total.isfinite(), _fma(*parts), total)
        return interpreter.TensorHandle(found.numpy(), z.dtype.scalar)

    return create_fma


def _smaller_number(builder: Any, one: Any, other: Any) -> Any:  # noqa: ANN401 - Triton's handles
    return builder.binary_op(one, other, np.fmin)


def _instructions_of(words: Any) -> dict[str, object]:  # noqa: ANN401 - the module
    """What the instructions of ``words`` compute, by float32 arithmetic and a rounding."""
    import triton.language as tl  # noqa: PLC0415 - only where it is installed

    def rounded(low: Any, high: Any, dtype: Any) -> Any:  # noqa: ANN401 - Triton's tensors
        return words.joined(low.to(dtype), high.to(dtype))

    def on_pairs(function: Callable[..., Any]) -> Callable[..., Any]:
        def apply(one: Any, other: Any, dtype: Any) -> Any:  # noqa: ANN401 - as above
            pairs = zip(words.halves(one, dtype), words.halves(other, dtype), strict=True)
            low, high = (function(*pair) for pair in pairs)
            return rounded(low, high, dtype)

        return apply

    def larger(one: Any, other: Any) -> Any:  # noqa: ANN401 - as above
        return tl.maximum(tl.abs(one), tl.abs(other), propagate_nan=tl.PropagateNan.ALL)

    def reducing(dtype: Any) -> SimpleNamespace:  # noqa: ANN401 - as above
        return SimpleNamespace(fn=lambda one, other: on_pairs(larger)(one, other, dtype))

    def code_pair(low: Any, high: Any) -> Any:  # noqa: ANN401 - as above
        bits = [part.to(tl.float8e4nv).to(tl.int8, bitcast=True) for part in (low, high)]
        return (bits[0].to(tl.int16) & 0xFF) | (bits[1].to(tl.int16) << 8)

    return {
        "rounded_pair": rounded,
        "product_of_pairs": on_pairs(lambda one, other: one * other),
        "sum_of_pairs": on_pairs(lambda one, other: one + other),
        "larger_bfloat16": reducing(tl.bfloat16),
        "larger_float16": reducing(tl.float16),
        "code_pair": code_pair,
    }
