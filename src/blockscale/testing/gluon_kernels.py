"""Runs the Gluon kernels of ``kernels/gluon`` on the CPU, without Triton and without a GPU.

The kernels' own source is executed, with stand-ins for the Gluon language: partitions are threads,
mbarriers count arrivals and bytes, TMA copies run later and in any order, clip at the edges and
fill with zeros. What hardware would let pass in silence raises here: a slot that is filled while
it is read, a staging buffer that is overwritten before it was stored, shared memory that is stored
without a fence, any two accesses that nothing orders (``gluon_races``), a wait that never ends.

It says nothing about layouts, registers or speed: that is for the compiler's tests and a GPU.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from blockscale.kernels import gluon as kernels
from blockscale.kernels.gluon.work import TMA_SHARED_BYTES
from blockscale.testing import gluon_machine as machine
from blockscale.testing.gluon_machine import (
    Barrier,
    Box,
    ElementType,
    EmulationError,
    Pointer,
    Shared,
    Unfinished,
    Value,
    bits,
    thread,
)
from blockscale.testing.gluon_races import Clock, History, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODULES = (
    "dialect",
    "schedule",
    "split",
    "waves",
    "epilogue",
    "dense",
    "paired",
    "small_m",
    "grouped_schedule",
    "grouped",
    "grouped_small",
)


def load_kernels(edit: tuple[str, str] = ("", "")) -> SimpleNamespace:
    """The kernels by their names, and the functions of ``schedule``.

    Made of the kernels' source and the stand-ins. ``edit``: text to replace in the source and its
    replacement, to see that a broken kernel is found out.
    """
    folder = Path(str(kernels.__file__)).parent
    with patch.dict(sys.modules, _stand_in_modules()):
        loaded = {}
        for name in MODULES:
            module = ModuleType(f"{kernels.__name__}.{name}")
            sys.modules[module.__name__] = module
            path = folder / f"{name}.py"
            source = path.read_text(encoding="utf-8")
            code = compile(source.replace(*edit) if edit[0] else source, str(path), "exec")
            exec(code, module.__dict__)  # noqa: S102 - this package's own source
            loaded[name] = module.__dict__
    return SimpleNamespace(
        dense_kernel=loaded["dense"]["dense_kernel"],
        paired_kernel=loaded["paired"]["paired_kernel"],
        small_m_kernel=loaded["small_m"]["small_m_kernel"],
        grouped_kernel=loaded["grouped"]["grouped_kernel"],
        grouped_small_kernel=loaded["grouped_small"]["grouped_small_kernel"],
        schedule=SimpleNamespace(**loaded["schedule"]),
    )


def _stand_in_modules() -> dict[str, ModuleType]:
    gluon = _module(
        "triton.experimental.gluon",
        jit=_as_it_is,
        constexpr_function=_as_it_is,
        language=_language(),
    )
    gluon.GluonASTSource = object  # type: ignore[attr-defined]
    hopper = _module(
        "triton.experimental.gluon.language.nvidia.hopper",
        fence_async_shared=_fence,
        mbarrier=SimpleNamespace(
            MBarrierLayout=_barrier_layout,
            init=_init_barrier,
            expect=_expect,
            arrive=_arrive,
            wait=_wait,
        ),
        tma=SimpleNamespace(
            async_load=_load_box, async_store=_store_box, store_wait=_wait_for_stores
        ),
        warpgroup_mma=_start_product,
        warpgroup_mma_wait=_finish_products,
    )
    cuda = _module(
        "triton.language.extra.cuda",
        gdc_wait=lambda: None,
        gdc_launch_dependents=lambda: None,
    )
    experimental = _module("triton.experimental", gluon=gluon)
    # As new as what the kernels may use, and with the older of two names.
    modules = [
        _module("triton", __version__="3.8.0"),
        experimental,
        gluon,
        gluon.language,
        hopper,
        cuda,
    ]
    return {module.__name__: module for module in modules}


def _module(name: str, **contents: Any) -> ModuleType:  # noqa: ANN401 - stand-ins of any kind
    module = ModuleType(name)
    module.__path__ = []
    module.__dict__.update(contents)
    return module


def _as_it_is(value: Any) -> Any:  # noqa: ANN401 - a function or a constant
    return value


def _language() -> ModuleType:
    return _module(
        "triton.experimental.gluon.language",
        constexpr=_as_it_is,
        int32=machine.INT32,
        int64=machine.INT64,
        float32=machine.FLOAT32,
        NVMMADistributedLayout=_some_layout,
        NVMMASharedLayout=_some_layout,
        BlockedLayout=_some_layout,
        SliceLayout=_some_layout,
        SwizzledSharedLayout=_some_layout,
        static_assert=_check,
        static_range=range,
        to_tensor=_as_it_is,
        warp_specialize=_specialize,
        program_id=lambda axis: thread().program.ids[axis],
        num_programs=lambda axis: thread().program.grid[axis],
        num_ctas=lambda: len(thread().program.pair),
        inline_asm_elementwise=_special_register,
        barrier=lambda: None,
        allocate_shared_memory=_allocate,
        arange=lambda start, end, layout: Value(torch.arange(start, end)),  # noqa: ARG005
        zeros=lambda shape, dtype, layout: _full(shape, 0, dtype, layout),
        full=_full,
        expand_dims=lambda value, axis: Value(value.data.unsqueeze(axis)),
        convert_layout=lambda value, layout, assert_trivial=False: value,  # noqa: ARG005 - layouts mean nothing here
        reshape=lambda value, shape: Value(value.data.reshape(shape)),
        permute=lambda value, order: Value(value.data.permute(*order)),
        split=lambda value: tuple(Value(half) for half in value.data.unbind(-1)),
        where=_where,
        minimum=lambda one, other: _where(one < other, one, other),
        maximum=lambda one, other: _where(one > other, one, other),
        cdiv=lambda one, other: (one + other - 1) // other,
        sum=lambda value, axis: Value(value.data.sum(axis)),
        max=lambda value, axis: Value(value.data.amax(axis)),
        associative_scan=_scan,
        load=_load,
        store=_store,
        atomic_add=_atomic_add,
    )


def _some_layout(*parts: Any, **named: Any) -> str:  # noqa: ANN401 - layouts mean nothing here
    return f"{parts}{named}"


def _barrier_layout(cga_layout: Sequence[Sequence[int]] = ()) -> tuple[str, bool]:
    """That it is one of barriers, and whether a pair's programs share them."""
    return "mbarrier", [0] in cga_layout


def _special_register(text: str, *_rest: Any, **_named: Any) -> int:  # noqa: ANN401 - Gluon's signature
    _check("%cluster_ctarank" in text, "the only instruction known here")
    return int(thread().program.rank)


def _check(holds: object, message: str) -> None:
    if not holds:
        raise EmulationError(message)


def _specialize(
    partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]],
    warps: Sequence[int],
    registers: Sequence[int],
) -> None:
    _check(len(partitions) == len(warps) + 1 == len(registers) + 1, "one entry a worker")
    program = thread().program
    # Barriers must be made before another program arrives at them: Triton waits for the cluster.
    try:
        program.start.wait(machine.WAIT_SECONDS)
    except threading.BrokenBarrierError as error:
        msg = "the other program of the pair did not start"
        raise EmulationError(msg) from error

    def work(clock: Clock, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        machine.enter(program, clock)
        program.guard(partial(function, *arguments))

    clock = thread().clock
    workers = [
        threading.Thread(target=work, args=(clock.child(), *partition))
        for partition in partitions[1:]
    ]
    for worker in workers:
        worker.start()
    function, arguments = partitions[0]
    program.guard(partial(function, *arguments))
    for worker in workers:
        worker.join()


def _allocate(dtype: ElementType, shape: Sequence[int], layout: Any) -> Any:  # noqa: ANN401 - either kind
    program = thread().program
    if isinstance(layout, tuple):
        _, is_pairs = layout
        with machine.ATOMIC:
            barriers = _new_barriers(program, shape[0], is_pairs=is_pairs)
        return SimpleNamespace(index=lambda number: barriers[int(machine.plain(number))])
    data = torch.empty(tuple(shape), dtype=dtype.torch)
    data.view(torch.uint8).fill_(machine.NAN_BYTE)
    view = Shared(data, History())
    program.memory.append(view)
    return view


def _new_barriers(program: machine.Program, count: int, *, is_pairs: bool) -> list[Barrier]:
    """A program's next barriers; a pair's are made by whichever program comes first."""
    start = len(program.barriers)
    known = max((other.barriers for other in program.pair), key=len)[start : start + count]
    first = program.pair[0] if is_pairs else program
    if not is_pairs or not known:
        known = [Barrier(first, is_pairs) for _ in range(count)]
    program.barriers += known
    return known


def _expect(barrier: Barrier, count: int, pred: object = True) -> None:  # noqa: FBT002 - Gluon's signature
    if pred:
        barrier.arrive(1, count)


def _arrive(barrier: Barrier, count: int, pred: object = True) -> None:  # noqa: FBT002 - as above
    if pred:
        barrier.arrive(count)


def _wait(barrier: Barrier, phase: Any, pred: object = True) -> None:  # noqa: ANN401, FBT002 - as above
    # Only the first program of a pair waits for what both arrive at.
    if pred and not (barrier.is_pairs and thread().program.rank):
        barrier.wait(int(machine.plain(phase)))


def _init_barrier(barrier: Barrier, count: int) -> None:
    if barrier.is_pairs:
        # Each of the two arrives ``count`` times.
        count *= len(barrier.program.pair)
    barrier.count = barrier.pending = count


def _scan(value: Value, axis: int, combine: Callable[[Value, Value], Value]) -> Value:
    """Results of combining all elements up to each, of a tensor with one axis."""
    _check(axis == 0 and value.data.ndim == 1, "a scan along the only axis")
    found = [Value(value.data[0])]
    for element in value.data[1:]:
        found.append(combine(found[-1], Value(element)))
    return Value(torch.stack([one.data for one in found]))


def _full(shape: Sequence[int], value: Any, dtype: ElementType, layout: Any) -> Value:  # noqa: ANN401, ARG001 - Gluon's signature
    return Value(torch.full(tuple(shape), float(machine.plain(value)), dtype=dtype.torch))


def _where(condition: Any, one: Any, other: Any) -> Any:  # noqa: ANN401 - Values or numbers
    if isinstance(condition, Value):
        return Value(torch.where(condition.data, machine.plain(one), machine.plain(other)))
    return one if condition else other


def _elements(pointer: Pointer, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401 - Value or None
    """Offsets, and which of them are wanted. Raises if a wanted one is outside the buffer."""
    offsets = torch.as_tensor(pointer.offset)
    wanted = torch.as_tensor(True if mask is None else machine.plain(mask))
    wanted = wanted & torch.ones_like(offsets, dtype=torch.bool)
    offsets = offsets.expand(wanted.shape)
    outside = wanted & ((offsets < 0) | (offsets >= pointer.buffer.numel()))
    _check(not outside.any(), "an access outside the buffer")
    return offsets, wanted


def _load(
    pointer: Pointer,
    mask: Value | None = None,
    other: float = 0.0,
    cache_modifier: str = "",  # noqa: ARG001 - Gluon's signature
) -> Value:
    offsets, wanted = _elements(pointer, mask)
    with machine.ATOMIC:
        found = pointer.buffer[torch.where(wanted, offsets, 0)]
    return Value(torch.where(wanted, found, torch.as_tensor(other, dtype=found.dtype)))


def _store(pointer: Pointer, value: Any, mask: Value | None = None) -> None:  # noqa: ANN401 - Value or number
    offsets, wanted = _elements(pointer, mask)
    data = torch.as_tensor(machine.plain(value), dtype=pointer.buffer.dtype)
    with machine.ATOMIC:
        pointer.buffer[offsets[wanted]] = data.broadcast_to(offsets.shape)[wanted]


def _atomic_add(pointer: Pointer, value: int, sem: str, scope: str) -> int:
    _check(sem == "acq_rel" and scope == "gpu", "tickets order what other programs wrote")
    with machine.ATOMIC:
        before = int(pointer.buffer[int(pointer.offset)])
        pointer.buffer[int(pointer.offset)] = before + value
    return before


def _fence() -> None:
    thread().is_fenced = True


def _load_box(
    box: Box,
    coordinates: Sequence[int],
    barrier: Barrier,
    target: Shared,
    pred: Any = True,  # noqa: ANN401, FBT002 - Value or bool
    multicast: bool = False,  # noqa: FBT001, FBT002 - Gluon's signature
) -> None:
    program = thread().program
    if not pred or (multicast and program.rank):
        return
    _check(target.shape == box.block_type.shape, "box and slot differ in shape")
    _check(target.offset % TMA_SHARED_BYTES == 0, "a slot that TMA cannot write to")
    source, where = box.clip(coordinates)

    def start(target: Shared, barrier: Barrier) -> None:
        barrier.program.reach()
        clock = thread().clock.child()
        target.access(clock, writes=True)
        target.data.view(torch.uint8).fill_(machine.NAN_BYTE)

        def copy() -> None:
            filled = torch.zeros_like(target.data)
            filled[where] = source
            target.data.copy_(filled)
            barrier.complete_bytes(box.block_type.nbytes, clock)

        program.submit(copy)

    for other in program.pair if multicast else (program,):
        start(*other.counterpart(target, barrier))


def _store_box(box: Box, coordinates: Sequence[int], source: Shared) -> None:
    state = thread()
    _check(state.is_fenced, "shared memory was written and not fenced before a store")
    _check(source.shape == box.block_type.shape, "box and buffer differ in shape")
    _check(source.offset % TMA_SHARED_BYTES == 0, "a buffer that TMA cannot read")
    pair, rank = len(state.program.pair), state.program.rank
    if pair > 1 and box.is_halved:
        rows = source.shape[0] // pair
        source = source.slice(0, rows)
        coordinates = [machine.plain(coordinates[0]) + rank * rows, *coordinates[1:]]
    elif rank > 0:
        return  # What both have, the first one stores.
    target, where = box.clip(coordinates, source.shape)
    before = bits(source.data)
    done, clock = threading.Event(), state.clock.child()
    source.access(clock, writes=False)
    state.stores.append((done, clock))

    def copy() -> None:
        _check(torch.equal(before, bits(source.data)), "a buffer changed before it was stored")
        target.copy_(source.data[where])
        with state.program.condition:
            done.set()
            state.program.condition.notify_all()

    state.program.submit(copy)


def _wait_for_stores(pending: int) -> None:
    state = thread()
    older = state.stores[: len(state.stores) - pending]
    state.program.wait_for(lambda: all(done.is_set() for done, _ in older), "stores")
    for _, clock in older:
        merge(state.clock.seen, clock.seen)


def _start_product(a: Shared, b: Shared, acc: Any, *, use_acc: bool, is_async: bool) -> Unfinished:  # noqa: ANN401 - Value or Unfinished
    _check(not use_acc and is_async, "every wave starts from zero and is waited for")
    shape = tuple(acc.data.shape)
    _check(shape == (a.data.shape[0], b.data.shape[1]), "the accumulator has another shape")
    return Unfinished.start(a, b)


def _finish_products(outstanding: int, deps: tuple[Any, ...]) -> Any:  # noqa: ANN401 - as many as deps
    _check(outstanding == 0, "the kernels keep no wave in flight")
    found = [dep.finish() if isinstance(dep, Unfinished) else dep for dep in deps]
    return found[0] if len(found) == 1 else tuple(found)
