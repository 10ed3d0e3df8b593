"""What launches do on the pretend GPU: every argument is looked at, then the result is computed.

Triton kernels run in Triton's interpreter. Of a Gluon kernel, what it is given says what it must
give: its product is computed by torch, in float64 and rounded once. (``gluon_kernels`` runs the
Gluon kernels' own source; here it is their callers' turn.)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blockscale.testing.pretend_memory import MEMORY, SITUATION, PretendError, untouched
from blockscale.testing.triton_interpreter import TORCH_TYPES, interpreting, repairs

if TYPE_CHECKING:
    from collections.abc import Callable

INTEGERS = {"i32": 1 << 31, "i64": 1 << 63}
BLOCK = 128


def install() -> None:
    """Have Triton's and Gluon's launches come here."""
    from blockscale.kernels.gluon import launch  # noqa: PLC0415 - imports Triton
    from blockscale.kernels.triton import build  # noqa: PLC0415 - as above
    from blockscale.testing import pretend_driver  # noqa: PLC0415 - imports this module

    np.seterr(all="ignore")
    ours: list[tuple[object, str, object]] = [
        *repairs(),
        (build, "Launcher", PretendLauncher),
        (launch, "compile_form", lambda form, _: Compiled(form)),
    ]
    for owner, name, replacement in ours:
        setattr(owner, name, replacement)
    pretend_driver.install()


def done(work: Callable[[], None]) -> None:
    """Do it now; again whenever the graph that is being captured is replayed."""
    with untouched():
        work()
    if SITUATION.graph is not None:
        SITUATION.graph.add(work)


def checked_address(name: str, address: Any, alignment: int, nbytes: int) -> None:  # noqa: ANN401 - what was passed
    """Raises PretendError unless a live tensor has ``nbytes`` there, aligned as was promised."""
    if not isinstance(address, int):
        msg = f"{name} wants an address, got {address!r}"
        raise PretendError(msg)
    if address % alignment:
        msg = f"{name} was compiled for addresses that {alignment} divides, got {address:#x}"
        raise PretendError(msg)
    if address and MEMORY.after(address) < nbytes:
        msg = f"{name} has {MEMORY.after(address)} bytes, the kernel uses {nbytes}"
        raise PretendError(msg)


class PretendLauncher:
    """In the place of ``kernels.triton.build.Launcher``."""

    static = ()
    constants = ()

    def __init__(self, variant: Any, device: int) -> None:  # noqa: ANN401 - a Variant
        declared = [name for name, _, _ in variant.arguments]
        declared += [name for name, _ in variant.constants]
        if declared != list(variant.kernel.arg_names):
            msg = f"{variant.kernel.__name__} takes {variant.kernel.arg_names}, not {declared}"
            raise PretendError(msg)
        if device != SITUATION.device.index:
            msg = f"a kernel for device {device} in a process that has {SITUATION.device}"
            raise PretendError(msg)
        self._variant = variant
        self._run = interpreting(variant, device)

    def __call__(self, programs: int, *arguments: object) -> None:
        """Look at every argument, then run the kernel in the interpreter."""
        name = self._variant.kernel.__name__
        kinds = self._variant.arguments
        if len(arguments) != len(kinds):
            msg = f"{name} takes {len(kinds)} arguments at run time, got {len(arguments)}"
            raise PretendError(msg)
        if not isinstance(programs, int) or not 0 <= programs < INTEGERS["i32"]:
            msg = f"{name}: a grid of {programs!r} programs"
            raise PretendError(msg)
        if programs:
            for value, (argument, kind, divisor) in zip(arguments, kinds, strict=True):
                self._check(f"{name}.{argument}", value, kind, divisor)
        done(lambda: self._run(programs, *arguments))

    def start(self, x: int, y: int, z: int, stream: int, *arguments: object) -> None:
        """As ``build.Launcher.start``."""
        assert (y, z) == (1, 1)
        assert isinstance(stream, int)
        self(x, *arguments)

    @staticmethod
    def _check(name: str, value: Any, kind: str, divisor: int) -> None:  # noqa: ANN401 - what was passed
        if kind.startswith("*"):
            if value is not None:
                itemsize = TORCH_TYPES[kind[1:]].itemsize
                checked_address(name, value, max(divisor, itemsize), itemsize if value else 0)
            return
        if kind in INTEGERS:
            if not isinstance(value, int) or not -INTEGERS[kind] <= value < INTEGERS[kind]:
                msg = f"{name} is an {kind}, got {value!r}"
                raise PretendError(msg)
            if value % divisor:
                msg = f"{name} was compiled for multiples of {divisor}, got {value}"
                raise PretendError(msg)
            return
        if not isinstance(value, (int, float)):
            msg = f"{name} is an {kind}, got {value!r}"
            raise PretendError(msg)


class Compiled:
    """In the place of a compiled Gluon kernel, as ``kernels.gluon.launch`` uses one."""

    run = None

    def __init__(self, form: Any) -> None:  # noqa: ANN401 - a Form
        self._form = form

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        """What launches on a grid."""
        if min(grid) < 1:
            msg = f"{self._form.name}: an empty grid {grid}"
            raise PretendError(msg)
        return self._launch

    def _launch(self, *arguments: Any, stream: Any) -> None:  # noqa: ANN401 - of all kinds
        if not isinstance(stream, int):
            msg = f"{self._form.name}: no stream {stream!r}"
            raise PretendError(msg)
        names = self._form.kernel.arg_names
        if len(arguments) != len(names):
            msg = f"{self._form.name} takes {names}, got {len(arguments)} arguments"
            raise PretendError(msg)
        given = dict(zip(names, arguments, strict=True))
        for name, value in self._form.constants.items():
            if given[name] != value:
                msg = f"{self._form.name}: {name} is {given[name]!r}, compiled for {value!r}"
                raise PretendError(msg)
        operands = Operands.of(self._form, given)
        compute = operands.multiply_groups if "routing" in given else operands.multiply
        done(compute)


@dataclass(frozen=True, slots=True)
class Operands:
    """What one launch of a Gluon kernel reads and writes.

    ``activation``: (slots x rows, k) codes; ``weight``: (groups x n, k) codes; ``a_scales``: (slots
    x blocks, rows); ``b_scales``: (groups, n blocks, k blocks). ``out``: (slots, rows, n).
    """

    activation: torch.Tensor
    weight: torch.Tensor
    a_scales: torch.Tensor
    b_scales: torch.Tensor
    out: torch.Tensor
    bias: torch.Tensor | None
    routing: torch.Tensor | None
    is_masked: bool

    @classmethod
    def of(cls, form: Any, given: dict[str, Any]) -> Operands:  # noqa: ANN401 - a Form
        """The operands of a launch. Raises PretendError where an address or a size is wrong."""
        activation, weight = (boxed(name, given[name]) for name in ("a", "b"))
        a_scales = boxed("a_scale_boxes", given["a_scale_boxes"])
        groups, n, rows = given.get("groups", 1), given["n"], a_scales.shape[1]
        k_blocks = -(-weight.shape[1] // BLOCK)
        slots = a_scales.shape[0] // k_blocks
        stride = given.get("b_scale_stride", k_blocks)
        facts = {
            "K of both operands": (activation.shape[1], weight.shape[1]),
            "K blocks": (given["all_blocks"], k_blocks),
            "rows of the weight": (weight.shape[0], groups * n),
            "rows of scales": (a_scales.shape[0], slots * k_blocks),
            "rows of the activation": (activation.shape[0], slots * rows),
            "M": (given.get("m", rows), rows),
            "elements of a slot": (given.get("slot_stride", rows * n), rows * n),
        }
        wrong = [f"{name}: {one} and {two}" for name, (one, two) in facts.items() if one != two]
        if wrong:
            msg = f"{form.name}: {'; '.join(wrong)}"
            raise PretendError(msg)
        if isinstance(given["out"], int):
            out = strided("out", given["out"], form.out_dtype, (slots, rows, n), None)
        else:
            out = boxed("out", given["out"]).view(slots, rows, n)
        shape = (groups, -(-n // BLOCK), k_blocks)
        strides = (shape[1] * stride, stride, 1)
        b_scales = strided("b_scales", given["b_scales"], torch.float32, shape, strides)
        bias = None
        if given.get("has_bias"):
            bias = strided("bias", given["bias"], form.out_dtype, (n,), None)
        for name in ("workspace", "tickets"):
            if name in given:
                checked_address(f"{form.name}.{name}", given[name], 4, 4)
        routing = _routing(form, given, rows)
        is_masked = bool(given.get("MASKED"))
        return cls(activation, weight, a_scales, b_scales, out, bias, routing, is_masked)

    def multiply(self) -> None:
        """The dense product."""
        rows = self.product(slice(None), 0, self.a_scales, 0)
        if self.bias is not None:
            rows = rows + self.bias.double()
        self.out[0] = rows.float().to(self.out.dtype)

    def multiply_groups(self) -> None:
        """The product over groups; rows that do not count are left as they are."""
        assert self.routing is not None
        rows = self.out.shape[1]
        k_blocks = self.b_scales.shape[2]
        if self.is_masked:
            pieces = [
                (slot, slot, slice(0, min(max(count, 0), rows)))
                for slot, count in enumerate(self.routing.tolist())
            ]
        else:
            height = rows // len(self.routing)
            pieces = [
                (0, group, slice(block * height, (block + 1) * height))
                for block, group in enumerate(self.routing.tolist())
                if group >= 0
            ]
        for slot, group, part in pieces:
            if part.stop > part.start:
                scales = self.a_scales[slot * k_blocks : (slot + 1) * k_blocks, part]
                at = slice(slot * rows + part.start, slot * rows + part.stop)
                found = self.product(at, group, scales, group)
                self.out[slot, part] = found.float().to(self.out.dtype)

    def product(
        self, rows: slice, group: int, a_scales: torch.Tensor, scale_group: int
    ) -> torch.Tensor:
        """float64 (rows, n)."""
        n, k = self.out.shape[2], self.weight.shape[1]
        codes = self.activation[rows].double()
        left = codes * a_scales.double().T.repeat_interleave(BLOCK, 1)[:, :k]
        scales = self.b_scales[scale_group].double()
        scales = scales.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
        weight = self.weight[group * n : (group + 1) * n].double() * scales
        return left @ weight.T


def _routing(form: Any, given: dict[str, Any], rows: int) -> torch.Tensor | None:  # noqa: ANN401 - a Form
    """The experts of row blocks or the counts of slots; None for a dense product."""
    if "routing" not in given:
        return None
    height = BLOCK if "BM" in given else getattr(form.variant, "tokens", BLOCK)
    length = given["groups"] if given["MASKED"] else rows // height
    return strided("routing", given["routing"], torch.int32, (length,), None)


def boxed(name: str, descriptor: Any) -> torch.Tensor:  # noqa: ANN401 - a TensorDescriptor
    """The matrix that a TMA descriptor describes."""
    base = descriptor.base
    shape, strides = tuple(descriptor.shape), tuple(descriptor.strides)
    return strided(name, base.data_ptr(), base.dtype, shape, strides)


def strided(
    name: str,
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
) -> torch.Tensor:
    """A tensor at an address, contiguous by default. Raises PretendError if it is not all there."""
    if strides is None:
        strides = tuple(torch.empty(shape, device="meta").stride())
    last = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    nbytes = last * dtype.itemsize if all(shape) else 0
    checked_address(name, address, dtype.itemsize, nbytes)
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_char * nbytes).from_address(address)
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(dtype)
    return flat.as_strided(shape, strides)
