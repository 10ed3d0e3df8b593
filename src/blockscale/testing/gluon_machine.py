"""A pretend Hopper: what the Gluon kernels need of a GPU, on threads. See ``gluon_kernels``."""

from __future__ import annotations

import operator
import random
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from blockscale.testing.gluon_races import Clock, History, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WAIT_SECONDS = 30.0
LONGEST_DELAY_SECONDS = 2e-4
NAN_BYTE = 0xFF


class EmulationError(AssertionError):
    """The kernel did what the hardware forbids."""


@dataclass(frozen=True, slots=True)
class ElementType:
    """A Gluon dtype."""

    torch: torch.dtype

    @property
    def primitive_bitwidth(self) -> int:
        """Bits of an element."""
        return self.torch.itemsize * 8


FLOAT8 = ElementType(torch.float8_e4m3fn)
FLOAT16 = ElementType(torch.float16)
BFLOAT16 = ElementType(torch.bfloat16)
FLOAT32 = ElementType(torch.float32)
INT32 = ElementType(torch.int32)
INT64 = ElementType(torch.int64)
ELEMENT_TYPES = {t.torch: t for t in (FLOAT8, FLOAT16, BFLOAT16, FLOAT32, INT32, INT64)}


class Value:
    """A tensor in registers; like Gluon's, it never changes."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def to(self, dtype: ElementType) -> Value:
        """Convert, rounding to nearest even."""
        return Value(self.data.to(dtype.torch))


def plain(value: Any) -> Any:  # noqa: ANN401 - a Value or a number
    """The tensor or number behind a value."""
    return value.data if isinstance(value, Value) else value


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Value, Any], Value]:
    def apply(self: Value, other: Any) -> Value:  # noqa: ANN401 - a Value or a number
        return Value(function(self.data, plain(other)))

    return apply


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[Value, Any], Value]:
    def apply(self: Value, other: Any) -> Value:  # noqa: ANN401 - a Value or a number
        return Value(function(plain(other), self.data))

    return apply


OPERATORS = (
    "add",
    "sub",
    "mul",
    "floordiv",
    "mod",
    "and",
    "or",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
)
for _name in OPERATORS:
    _function = getattr(operator, {"and": "and_", "or": "or_"}.get(_name, _name))
    setattr(Value, f"__{_name}__", _binary(_function))
    setattr(Value, f"__r{_name}__", _reflected(_function))


class Pointer:
    """A buffer and an offset, or a tensor of offsets."""

    def __init__(self, buffer: torch.Tensor, offset: Any = 0) -> None:  # noqa: ANN401 - number or tensor
        self.buffer = buffer
        self.offset = offset
        self.dtype = SimpleNamespace(element_ty=ELEMENT_TYPES[buffer.dtype])

    def __add__(self, other: Any) -> Pointer:  # noqa: ANN401 - a Value or a number
        return Pointer(self.buffer, self.offset + plain(other))


class Box:
    """A tensor descriptor: a matrix, or several, and the shape of the boxes that TMA copies.

    ``is_halved``: the first half of a box's rows is in the first program of a pair, the second in
    the second; otherwise each program has all of it.
    """

    def __init__(
        self, matrix: torch.Tensor, shape: Sequence[int], *, is_halved: bool = False
    ) -> None:
        self.matrix = matrix
        self.dtype = ELEMENT_TYPES[matrix.dtype]
        self.layout = SimpleNamespace(swizzle_byte_width=128, element_bitwidth=8 * matrix.itemsize)
        self.is_halved = is_halved
        self.shape = tuple(matrix.shape)
        nbytes = prod(shape) * matrix.itemsize
        self.block_type = SimpleNamespace(shape=tuple(shape), nbytes=nbytes)

    def clip(
        self, coordinates: Sequence[int], shape: Sequence[int] = ()
    ) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """The part of the matrix under a box, and where it lies in the box.

        ``shape``: of a part of the box.
        """
        starts = [int(plain(c)) for c in coordinates]
        if min(starts) < 0:
            msg = f"negative TMA coordinates {starts}"
            raise EmulationError(msg)
        lengths = [
            max(0, min(size, total - start))
            for size, total, start in zip(
                shape or self.block_type.shape, self.matrix.shape, starts, strict=True
            )
        ]
        part = tuple(
            slice(start, start + length) for start, length in zip(starts, lengths, strict=True)
        )
        return self.matrix[part], tuple(slice(0, length) for length in lengths)


class Shared:
    """A view of shared memory; ``history``: the allocation's accesses."""

    def __init__(self, data: torch.Tensor, history: History) -> None:
        self.data = data
        self.history = history
        self.dtype = ELEMENT_TYPES[data.dtype]
        self.layout = SimpleNamespace(swizzle_byte_width=128, element_bitwidth=8 * data.itemsize)

    @property
    def shape(self) -> tuple[int, ...]:
        """As Gluon tells it."""
        return tuple(self.data.shape)

    @property
    def offset(self) -> int:
        """Bytes from the start of the allocation."""
        return int(self.data.storage_offset()) * self.data.itemsize

    def access(self, clock: Clock, *, writes: bool) -> None:
        """Raise if nothing orders an earlier access before this one."""
        if self.history.races(self.data, clock, writes=writes):
            does = "written" if writes else "read"
            msg = f"a race: shared memory is {does} and nothing says that another is done with it"
            raise EmulationError(msg)

    def index(self, number: int) -> Shared:
        """One of several equal parts."""
        return Shared(self.data[int(plain(number))], self.history)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        """Neighbouring rows or columns."""
        return Shared(self.data.narrow(dim, start, length), self.history)

    def permute(self, order: Sequence[int]) -> Shared:
        """Axes in another order."""
        return Shared(self.data.permute(*order), self.history)

    def reshape(self, shape: Sequence[int]) -> Shared:
        """The same elements under another shape."""
        return Shared(self.data.view(*shape), self.history)

    def _reinterpret(self, dtype: ElementType, shape: Sequence[int], layout: Any) -> Shared:  # noqa: ANN401, ARG002 - Gluon's signature
        """What a program of a pair has of rows that are declared for both: as many as it sees."""
        if dtype != self.dtype or len(thread().program.pair) * shape[0] != self.shape[0]:
            msg = f"{shape} of {dtype} are not one program's part of {self.shape}"
            raise EmulationError(msg)
        return self.slice(0, shape[0])

    def load(self, layout: Any) -> Value:  # noqa: ANN401, ARG002 - Gluon's signature
        """A copy in registers."""
        self.access(thread().clock, writes=False)
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        """Write; the copy engine may read it after a fence."""
        if value.data.shape != self.data.shape or value.data.dtype != self.data.dtype:
            msg = f"stored {value.data.shape} {value.data.dtype} into {self.data.shape}"
            raise EmulationError(msg)
        self.access(thread().clock, writes=True)
        self.data.copy_(value.data)
        thread().is_fenced = False


def bits(data: torch.Tensor) -> torch.Tensor:
    """The bytes, comparable where values hold NaN."""
    return data.contiguous().view(torch.uint8).clone()


@dataclass(slots=True)
class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes have come.

    ``is_pairs``: the programs of a pair share it; it lies in the first one.
    """

    program: Program
    is_pairs: bool = False
    count: int = 0
    pending: int = 0
    expected_bytes: int = 0
    phases: int = 0
    # What those know that have arrived, and what they knew when the last phase ended.
    arriving: dict[int, int] = field(default_factory=dict)
    released: dict[int, int] = field(default_factory=dict)

    def arrive(self, count: int, expected_bytes: int = 0) -> None:
        """Count arrivals."""
        self.program.reach()
        with self.program.condition:
            self.pending -= count
            self.expected_bytes += expected_bytes
            if self.pending < 0:
                msg = "more arrivals than the barrier was made for"
                raise EmulationError(msg)
            thread().clock.publish(self.arriving)
            self._complete()

    def complete_bytes(self, count: int, clock: Clock) -> None:
        """Count copied bytes; ``clock``: the copy's."""
        self.program.reach()
        with self.program.condition:
            self.expected_bytes -= count
            clock.publish(self.arriving)
            self._complete()

    def wait(self, parity: int) -> None:
        """Until the phase of this parity has ended."""
        self.program.wait_for(lambda: self.phases % 2 != parity, f"a barrier, parity {parity}")
        with self.program.condition:
            merge(thread().clock.seen, self.released)

    def _complete(self) -> None:
        if self.pending == 0 and self.expected_bytes == 0:
            self.phases += 1
            self.released = dict(self.arriving)
            self.pending = self.count
            self.program.condition.notify_all()


@dataclass(slots=True)
class Unfinished:
    """A wgmma in flight. Its operands must not change until it has been waited for."""

    a: Shared
    b: Shared
    before: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def start(cls, a: Shared, b: Shared) -> Unfinished:
        """It reads from now on."""
        for operand in (a, b):
            operand.access(thread().clock, writes=False)
        return cls(a, b, (bits(a.data), bits(b.data)))

    def finish(self) -> Value:
        """The product, in float64 and rounded to float32 once."""
        for operand, before in zip((self.a, self.b), self.before, strict=True):
            # Until now.
            operand.access(thread().clock, writes=False)
            if not torch.equal(before, bits(operand.data)):
                msg = "an operand changed while the tensor cores read it"
                raise EmulationError(msg)
        return Value((self.a.data.double() @ self.b.data.double()).float())


@dataclass(slots=True)
class Program:
    """One thread block: its copy engine, its condition, the first error of any thread.

    ``pair``: the programs of its cluster, itself among them, or nothing but itself. ``ids`` and
    ``grid`` are the cluster's. ``memory`` and ``barriers``: what it has allocated, in order.
    """

    ids: tuple[int, int]
    grid: tuple[int, int]
    seed: int
    pair: list[Program] = field(default_factory=list)
    memory: list[Shared] = field(default_factory=list)
    barriers: list[Barrier] = field(default_factory=list)
    start: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    condition: threading.Condition = field(default_factory=threading.Condition)
    jobs: list[Callable[[], None]] = field(default_factory=list)
    error: BaseException | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        self.pair.append(self)

    @property
    def rank(self) -> int:
        """Which program of its pair."""
        return next(at for at, program in enumerate(self.pair) if program is self)

    def reach(self) -> None:
        """Raise if another program reaches for this one's shared memory and it has ended."""
        if self.finished and thread().program is not self:
            msg = "shared memory of a program that has ended was reached for"
            raise EmulationError(msg)

    def counterpart(self, view: Shared, barrier: Barrier) -> tuple[Shared, Barrier]:
        """What lies in this program where ``view`` and ``barrier`` lie in the calling one."""
        caller = thread().program
        storage = view.data.untyped_storage().data_ptr()
        at = [own.data.untyped_storage().data_ptr() for own in caller.memory].index(storage)
        data = self.memory[at].data.view(-1).view(view.data.dtype)
        data = data.as_strided(view.data.shape, view.data.stride(), view.data.storage_offset())
        return Shared(data, self.memory[at].history), self.barriers[
            [b is barrier for b in caller.barriers].index(True)
        ]

    def wait_for(self, ready: Callable[[], bool], what: str) -> None:
        """Block until ``ready``, another thread's error, or for too long."""
        with self.condition:
            if not self.condition.wait_for(lambda: ready() or self.error, WAIT_SECONDS):
                msg = f"waited {WAIT_SECONDS:.0f} s for {what}"
                raise EmulationError(msg)
            if not ready():
                msg = "another partition failed"
                raise EmulationError(msg)

    def submit(self, job: Callable[[], None]) -> None:
        """Give a copy to the engine."""
        with self.condition:
            self.jobs.append(job)
            self.condition.notify_all()

    def copy_engine(self) -> None:
        """Do copies late and in any order."""
        enter(self)
        chance = random.Random(self.seed)  # noqa: S311 - delays, not secrets
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.jobs or self.finished or self.error)
                if self.error or not self.jobs:
                    return
                job = self.jobs.pop(chance.randrange(len(self.jobs)))
            time.sleep(chance.random() * LONGEST_DELAY_SECONDS)
            self.guard(job)

    def guard(self, job: Callable[[], None]) -> None:
        """Run, keeping the first error and waking everyone."""
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            self.start.abort()
            for program in self.pair:
                with program.condition:
                    program.error = program.error or error
                    program.condition.notify_all()

    def run(self, kernel: Callable[..., None], arguments: dict[str, Any]) -> None:
        """Run the kernel and all its copies to the end. Raises the first error."""
        engine = threading.Thread(target=self.copy_engine)
        engine.start()
        enter(self)
        self.guard(partial(kernel, **arguments))
        with self.condition:
            self.finished = True
            self.condition.notify_all()
        engine.join()
        if self.error:
            raise self.error


_LOCAL = threading.local()
ATOMIC = threading.Lock()


def enter(program: Program, clock: Clock | None = None) -> None:
    """Let this thread be one of the program's; ``clock``: if another one has started it."""
    _LOCAL.state = SimpleNamespace(
        program=program, is_fenced=True, stores=[], clock=clock or Clock()
    )


def thread() -> Any:  # noqa: ANN401 - a namespace
    """This thread's program, clock, stores, and whether it has fenced what it wrote."""
    return _LOCAL.state


def launch(
    kernel: Callable[..., None],
    grid: tuple[int, int],
    arguments: dict[str, Any],
    cluster: int = 1,
) -> None:
    """Run all programs of a grid at once, ``cluster`` for each of its places.

    Raises the first error of any.
    """
    programs = []
    for x, y in ((x, y) for y in range(grid[1]) for x in range(grid[0])):
        pair: list[Program] = []
        start = threading.Barrier(cluster)
        for rank in range(cluster):
            seed = 17 * x + y + 1009 * rank
            programs.append(Program((x, y), grid, seed=seed, pair=pair, start=start))
    errors: list[BaseException] = []

    def run(program: Program) -> None:
        try:
            program.run(kernel, arguments)
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(program,)) for program in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
