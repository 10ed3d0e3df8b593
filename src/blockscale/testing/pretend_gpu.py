"""Runs a program on a pretend H100: ``python -m blockscale.testing.pretend_gpu FILE ...``.

``-m MODULE`` in place of FILE, as Python takes it. For what only a GPU would reach: ``tests/gpu``
and the benchmarks, with tiny shapes. Host code runs as it is. Tensors are ``pretend_memory``'s.
Triton kernels run in Triton's interpreter, after a look at every argument of every launch; the
Gluon kernels' products are computed by torch from what they were given (``pretend_launch``). CUDA
graphs are recorded and replayed. Numbers are right, times are not; what compilers, layouts and
memory order would do is for other tests.

The process is a pretend GPU's to its end: nothing is put back.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from blockscale import ops
from blockscale.kernels.cpu.build import find_compiler
from blockscale.probe import machine, proving
from blockscale.testing.pretend_memory import MEMORY, SITUATION, Graph, computed, new_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GB = 1 << 30
# Of a process of the probe.
CHILD_LIMIT_S = 3600.0
_VERSION = machine._version  # noqa: SLF001 - what ``_replacements`` puts another in place of
# What an H100 SXM answers (torch 2.11, 2026-11-25).
PROPERTIES = SimpleNamespace(
    name="pretend H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * GB,
    shared_memory_per_multiprocessor=228 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65_536,
)


class Stream:
    """A stream: everything has been done by the time anyone asks."""

    _last = 0

    def __init__(self, *_: object, **__: object) -> None:
        Stream._last += 1
        self.cuda_stream = Stream._last
        self.device = SITUATION.device

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """An event of now."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Wait."""
        SITUATION.wait("Stream.synchronize")

    def query(self) -> bool:
        """Done."""
        return True

    def __enter__(self) -> Stream:  # noqa: PYI034 - as torch's
        self._context = stream(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)


class Event:
    """An event; times are the host's, at least a millionth of a second apart."""

    def __init__(self, *_: object, enable_timing: bool = False, **__: object) -> None:
        self._timed = enable_timing
        self._at = 0.0

    def record(self, stream: object = None) -> None:  # noqa: ARG002 - torch's signature
        """Now."""
        self._at = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Done."""
        return True

    def synchronize(self) -> None:
        """Wait."""
        SITUATION.wait("Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds. Raises as CUDA does without timing, or before both are recorded."""
        if not (self._timed and end._timed and self._at and end._at):
            msg = "both events must be recorded, and made with enable_timing=True"
            raise RuntimeError(msg)
        return max((end._at - self._at) * 1000, 1e-3)


class _Streams:
    current: Any = None

    @classmethod
    def now(cls) -> Stream:
        if cls.current is None:
            cls.current = Stream()
        found: Stream = cls.current
        return found


@contextlib.contextmanager
def stream(new: Stream | None) -> Iterator[None]:
    """As ``torch.cuda.stream``."""
    old, _Streams.current = _Streams.now(), new or _Streams.now()
    try:
        yield
    finally:
        _Streams.current = old


@contextlib.contextmanager
def graph(
    target: Graph,
    pool: object = None,  # noqa: ARG001 - torch's signature
    stream: Stream | None = None,  # noqa: ARG001 - as above
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """As ``torch.cuda.graph``; the operators run once while they are captured."""
    if capture_error_mode not in {"global", "thread_local", "relaxed"}:
        msg = f"no such capture_error_mode: {capture_error_mode}"
        raise ValueError(msg)
    SITUATION.wait("starting a capture")
    gc.collect()
    old, _Streams.current = _Streams.now(), Stream()
    SITUATION.graph = target
    try:
        yield
    finally:
        SITUATION.graph = None
        _Streams.current = old


class Device(contextlib.nullcontext[None]):
    """As ``torch.cuda.device``, of the process's own GPU."""

    def __init__(self, device: object) -> None:
        super().__init__()
        number = _number(device)
        if number not in {None, -1, SITUATION.device.index}:
            msg = f"this process has {SITUATION.device}, not cuda:{number}"
            raise RuntimeError(msg)


def _number(device: object) -> object:
    return torch.device(device).index if isinstance(device, (str, torch.device)) else device


def _set_device(device: object) -> None:
    """Before the first tensor, as every process of a torchrun does."""
    number = _number(device)
    if not isinstance(number, int) or not 0 <= number < _count():
        msg = f"invalid device ordinal: {device}"
        raise RuntimeError(msg)
    SITUATION.device = torch.device("cuda", number)
    device_guard().blockscale_pretend_device(number)


def _count() -> int:
    """One GPU for each process of a torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _waits(name: str) -> Callable[..., None]:
    return lambda *_, **__: SITUATION.wait(name)


def _set_sync_mode(mode: str | int) -> None:
    names: dict[str | int, str] = {0: "default", 1: "warn", 2: "error"}
    SITUATION.sync_mode = names.get(mode, str(mode))


def _reset_peak(*_: object) -> None:
    MEMORY.peak = MEMORY.allocated


def _collected(*_: object) -> int:
    gc.collect()
    return MEMORY.allocated


class Generator(torch.Generator):
    """A generator of either device."""

    def __new__(cls, device: Any = "cpu") -> Any:  # noqa: ANN401 - torch's own type
        """The CPU's, whatever ``device``."""
        torch.device(device)  # Refuses what is none.
        parent: Any = super()
        return parent.__new__(cls, device="cpu")


ANSWERS: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "init": lambda: None,
    "is_initialized": lambda: True,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": _count,
    "current_device": lambda: SITUATION.device.index,
    "set_device": _set_device,
    "device": Device,
    "get_device_name": lambda *_: PROPERTIES.name,
    "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_properties": lambda *_: PROPERTIES,
    "Stream": Stream,
    "Event": Event,
    "stream": stream,
    "current_stream": lambda *_: _Streams.now(),
    "default_stream": lambda *_: _Streams.now(),
    "set_stream": lambda new: setattr(_Streams, "current", new),
    "synchronize": _waits("torch.cuda.synchronize"),
    "CUDAGraph": Graph,
    "graph": graph,
    "is_current_stream_capturing": lambda: SITUATION.graph is not None,
    "set_sync_debug_mode": _set_sync_mode,
    "empty_cache": _waits("torch.cuda.empty_cache"),
    "memory_allocated": _collected,
    "memory_reserved": _collected,
    "max_memory_allocated": lambda *_: MEMORY.peak,
    "reset_peak_memory_stats": _reset_peak,
    "mem_get_info": lambda *_: (PROPERTIES.total_memory - _collected(), PROPERTIES.total_memory),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda *_: None,
    "manual_seed": lambda seed: None,  # noqa: ARG005 - torch's signature
    "manual_seed_all": lambda seed: None,  # noqa: ARG005 - as above
}


def install() -> None:
    """Turn this process's torch into one with an H100. Triton must not have been imported yet.

    Raises RuntimeError if it was, without its interpreter.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        msg = "Triton was imported before the pretend GPU; set TRITON_INTERPRET=1"
        raise RuntimeError(msg)
    os.environ["TRITON_INTERPRET"] = "1"
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, answer)
    for owner, name, answer in _replacements():
        setattr(owner, name, answer)
    device_guard().blockscale_pretend_device(SITUATION.device.index)
    # torch.tensor(..., device="cuda") makes a CPU tensor and then moves it, where modes see it.
    torch._C._set_only_lift_cpu_tensors(True)  # noqa: FBT003, SLF001 - it has no public name
    # A module that moves swaps its tensors: a pretend one is more than its insides.
    torch.__future__.set_swap_module_params_on_conversion(True)
    mode: Any = new_mode()
    mode.__enter__()  # To the end of the process.

    from blockscale.testing import pretend_launch  # noqa: PLC0415 - imports Triton

    pretend_launch.install()


def _replacements() -> Iterator[tuple[object, str, object]]:
    """(owner, name, what takes its place), outside of ``torch.cuda``."""
    # What the products call.
    yield torch._C, "_cuda_getDevice", lambda: SITUATION.device.index  # noqa: SLF001 - as there
    yield torch._C, "_cuda_getCurrentRawStream", lambda _: _Streams.now().cuda_stream  # noqa: SLF001 - as there
    # The mode that holds the pretend memory is no tracer: layers run as on a GPU.
    yield ops, "is_watched", lambda _: False
    yield torch.version, "cuda", "13.0"
    yield torch, "Generator", Generator
    yield torch.Tensor, "cuda", lambda self, *_, **kwargs: self.to(SITUATION.device, **kwargs)
    yield (
        torch.nn.functional,
        "scaled_dot_product_attention",
        _on_cpu("scaled_dot_product_attention"),
    )
    yield torch.distributed, "init_process_group", _starting_gloo()
    # What its driver answers (``pretend_driver``) needs no NVRTC; and what the probe starts is on
    # this GPU too.
    yield machine, "_version", lambda name: "13.0" if name == "cuda-bindings" else _VERSION(name)
    yield proving, "CHILD", ("-m", "blockscale.testing.pretend_gpu", *proving.CHILD)
    yield proving.Pace, "on", staticmethod(_patient)
    run = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with new_mode():
            run(thread)

    # A mode is its thread's, and transformers reads weights in threads.
    yield threading.Thread, "run", run_there


def _patient(device: object, seconds: float | None = None) -> proving.Pace:  # noqa: ARG001 - as ``Pace.on``
    """Triton's interpreter needs longer than a compiler: minutes for a shape are no failure."""
    return proving.Pace(CHILD_LIMIT_S, len(os.sched_getaffinity(0)), seconds)


@cache
def device_guard() -> ctypes.CDLL:
    """``device_guard.cpp``, built once for this torch. Raises RuntimeError without a compiler."""
    from torch.utils.cpp_extension import include_paths  # noqa: PLC0415 - beside its only use

    compiler = find_compiler()
    if compiler is None:
        msg = "the pretend GPU needs a C++ compiler (apt install g++)"
        raise RuntimeError(msg)
    source = Path(__file__).with_name("device_guard.cpp")
    key = hashlib.sha256(
        source.read_bytes() + f"{torch.__version__} {torch.__file__}".encode()
    ).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"blockscale-device-guard-{key}-{os.getuid()}.so"
    if not target.exists():
        includes = [flag for path in include_paths() for flag in ("-I", path)]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch) / target.name
            library = Path(torch.__file__).parent / "lib"
            flags = ["-O0", "-std=c++20", "-fPIC", "-shared", abi, *includes]
            linked = [f"-L{library}", "-lc10", f"-Wl,-rpath,{library}"]
            subprocess.run([compiler, *flags, str(source), "-o", str(built), *linked], check=True)  # noqa: S603 - a compiler found on PATH, our own source
            shutil.move(built, target)
    return ctypes.CDLL(str(target))


def _starting_gloo() -> Callable[..., None]:
    """NCCL is of CUDA builds; what it would be given is on the CPU here."""
    original = torch.distributed.init_process_group

    def start(backend: str | None = None, **kwargs: Any) -> None:  # noqa: ANN401 - torch's
        if backend == "nccl":
            if kwargs.pop("device_id", SITUATION.device) != SITUATION.device:
                msg = f"NCCL is started for another GPU than {SITUATION.device}"
                raise RuntimeError(msg)
            backend = "gloo"
        original(backend, **kwargs)

    return start


def _on_cpu(name: str) -> Callable[..., Any]:
    """A function that asks C++ which kernels a CUDA build has."""
    original: Any = getattr(torch.nn.functional, name)

    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
        return original(*args, **kwargs)

    operator: Any = call
    operator._schema = SimpleNamespace(name=f"aten::{name}")  # noqa: SLF001 - as operators have it
    return lambda *args, **kwargs: computed(operator, args, kwargs)


def main(arguments: list[str]) -> None:
    """Run a file, or a module after ``-m``, with its arguments."""
    if not arguments or arguments == ["-m"]:
        sys.exit("usage: python -m blockscale.testing.pretend_gpu FILE|-m MODULE [arguments]")
    install()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))  # noqa: PTH100, PTH120 - as Python does
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    # As the module of its name: what it installs refers to itself.
    importlib.import_module("blockscale.testing.pretend_gpu").main(sys.argv[1:])
