"""GPU tensors without a GPU: their values lie in CPU memory, their device is the process's GPU.

``PretendTensor`` says it is on ``cuda:0`` and computes on the CPU; ``PretendDevice``, a dispatch
mode, makes factories give such tensors. What a GPU would refuse raises here too: operands on two
devices, a kernel given an address that no live GPU tensor has, waiting for the device where that is
forbidden or while a CUDA graph is captured. A captured graph keeps its operators and replays them.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CPU = torch.device("cpu")

# Operators that give the host something that only the device knows.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
HALF_TO_FLOAT = (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default)  # noqa: SLF001 - their names
# Operators between two devices.
MOVING = {"_to_copy", "copy_"}


class PretendError(AssertionError):
    """The program did what a GPU forbids."""


class Allocation:
    """One storage on the pretend GPU, for as long as a tensor has it."""

    def __init__(self, memory: Memory, base: int, size: int) -> None:
        self.base, self.size = base, size
        self._memory = memory
        memory.allocated += size
        memory.peak = max(memory.peak, memory.allocated)

    def __del__(self) -> None:
        self._memory.allocated -= self.size


class Memory:
    """What is allocated on the pretend GPU."""

    def __init__(self) -> None:
        self.allocated = 0
        self.peak = 0
        self._live: WeakValueDictionary[int, Allocation] = WeakValueDictionary()

    def hold(self, values: torch.Tensor) -> Allocation | None:
        """The allocation of a tensor's storage; None if there is nothing in it."""
        storage = values.untyped_storage()
        if not storage.nbytes():
            return None
        found = self._live.get(storage.data_ptr())
        if found is None:
            found = Allocation(self, storage.data_ptr(), storage.nbytes())
            self._live[storage.data_ptr()] = found
        return found

    def after(self, address: int) -> int:
        """Bytes from an address to its allocation's end. Raises PretendError if it has none."""
        for one in list(self._live.values()):
            if one.base <= address < one.base + one.size:
                return one.base + one.size - address
        msg = f"no tensor on the GPU is at {address:#x}: freed, or on the CPU"
        raise PretendError(msg)


MEMORY = Memory()


class Situation:
    """The process's GPU, the graph that is being captured, what waiting for the device means."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.graph: Graph | None = None
        self.sync_mode = "default"

    def wait(self, what: str) -> None:
        """Note that the host waits for the device. Raises PretendError where it must not."""
        if self.graph is not None:
            msg = f"{what} waits for the device while a CUDA graph is captured"
            raise PretendError(msg)
        if self.sync_mode == "error":
            msg = f"{what} waits for the device"
            raise PretendError(msg)


SITUATION = Situation()


class Graph:
    """What ``torch.cuda.CUDAGraph`` is: everything that was enqueued, to be done again."""

    def __init__(self, *_: object, **__: object) -> None:
        self._steps: list[Callable[[], None]] = []
        self._pool: list[object] = []

    def keep(self, memory: object) -> None:
        """What is allocated while it is captured stays its own, as a graph's memory pool does."""
        self._pool.append(memory)

    def add(self, step: Callable[[], None]) -> None:
        """One more operator or launch; what it uses stays alive with it."""
        self._steps.append(step)

    def replay(self) -> None:
        """Do it all again, with the values that are there now."""
        if not self._steps:
            msg = "a CUDA graph is replayed that captured nothing"
            raise PretendError(msg)
        with untouched():
            for step in self._steps:
                step()

    def reset(self) -> None:
        """Forget everything."""
        self._steps.clear()
        self._pool.clear()


class PretendTensor(torch.Tensor):
    """A tensor whose device is the process's GPU and whose values, ``held``, are on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type[PretendTensor], held: torch.Tensor) -> PretendTensor:  # noqa: PYI034 - torch's way to a wrapper
        """A tensor with the shape, strides and dtype of ``held``."""
        # Never an inference tensor: a view of a normal tensor is none either, wherever it is made.
        with torch.inference_mode(mode=False):
            made: PretendTensor = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - the documented way to a wrapper
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=SITUATION.device,
            )
        return made

    def __init__(self, held: torch.Tensor) -> None:
        super().__init__()
        self.held = held
        self._allocation = MEMORY.hold(held)
        if SITUATION.graph is not None:
            SITUATION.graph.keep((held, self._allocation))

    def data_ptr(self) -> int:
        """Where the values are."""
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage of the values."""
        return self.held.untyped_storage()

    def tolist(self) -> Any:  # noqa: ANN401 - a number or lists
        """The values on the host."""
        return self.cpu().tolist()

    def record_stream(self, stream: object) -> None:
        """Memory is never handed out early here."""

    def __repr__(self) -> str:  # type: ignore[override]  # torch's has another parameter
        return f"PretendTensor({self.held!r})"

    # Modules swap such parameters rather than their insides.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's default is no classmethod
        cls,
        func: Any,  # noqa: ANN401 - an overloaded operator
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator gives
        return computed(func, args, kwargs or {})


def _is_gpu(device: Any) -> bool:  # noqa: ANN401 - a device, a name or None
    return device is not None and torch.device(device).type == "cuda"


def _unwrapped(value: Any) -> Any:  # noqa: ANN401 - anything that an operator takes
    return value.held if isinstance(value, PretendTensor) else value


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - any operator
    """An operator on pretend tensors, or one that makes them; recorded if a graph is captured."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [leaf for leaf in leaves if isinstance(leaf, PretendTensor)]
    device = kwargs.get("device")
    named = next((one for one in args if isinstance(one, torch.device)), device)
    to_gpu = bool(ours) if named is None else _is_gpu(named)
    if not ours and not to_gpu:
        return func(*args, **kwargs)
    # In inference mode, operators come before torch has taken them apart.
    if isinstance(func, torch._ops.OpOverload):  # noqa: SLF001 - it has no public name
        with new_mode():
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    name = func._schema.name.partition("::")[2]  # noqa: SLF001 - its only name without the overload
    _check(name, leaves, args, kwargs)
    result = _on_held(func, args, kwargs)
    if any(leaf.held.shape != leaf.shape or leaf.held.stride() != leaf.stride() for leaf in ours):
        msg = f"{name} changes a tensor's shape in place: the pretend GPU cannot"
        raise PretendError(msg)
    wrappers = {id(leaf.held): leaf for leaf in ours}

    def wrap(value: Any) -> Any:  # noqa: ANN401 - a leaf of the result
        if not isinstance(value, torch.Tensor) or (id(value) not in wrappers and not to_gpu):
            return value
        return wrappers[id(value)] if id(value) in wrappers else PretendTensor(value)

    return tree_map(wrap, result)


def _on_held(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - any operator
    """The operator on the CPU; again whenever the graph that is being captured is replayed."""
    args, kwargs = tree_map(_unwrapped, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = CPU
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    if func in HALF_TO_FLOAT and args[2]:
        args = (args[0].float(), args[1], False)  # A CPU takes no half here, a GPU does.
    result = func(*args, **kwargs)
    if SITUATION.graph is not None:
        SITUATION.graph.add(_again(func, args, kwargs, result))
    return result


def _check(
    name: str, leaves: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise what a GPU would: two devices, or the host waiting where it must not."""
    on_cpu = [leaf for leaf in leaves if not isinstance(leaf, PretendTensor)]
    moves = name in MOVING and (bool(on_cpu) or not _is_gpu(kwargs.get("device", "cuda")))
    if moves and not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))):
        SITUATION.wait(name)
    if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        SITUATION.wait(name)
    if name in {"index", "index_put_", "index_put"}:
        indices = [one for one in args[1] if one is not None]
        if any(one.dtype in {torch.bool, torch.uint8} for one in indices):
            SITUATION.wait(f"{name} by a mask")
        if any(not isinstance(one, PretendTensor) for one in indices):
            SITUATION.wait(f"{name} by indices on the CPU")
        return
    if name in MOVING or name.startswith("c10d"):
        return
    if len(on_cpu) < len(leaves) and any(leaf.ndim for leaf in on_cpu):
        msg = f"{name}: operands are on two devices, cuda and cpu"
        raise PretendError(msg)


def _again(
    func: Any,  # noqa: ANN401 - an operator
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    first: Any,  # noqa: ANN401 - its result
) -> Callable[[], None]:
    """The operator again, its results written where those of the capture are."""
    inputs = {
        leaf.untyped_storage().data_ptr()
        for leaf in tree_leaves((args, kwargs))
        if isinstance(leaf, torch.Tensor)
    }
    targets = tree_leaves(first)

    def step() -> None:
        for target, new in zip(targets, tree_leaves(func(*args, **kwargs)), strict=True):
            if isinstance(new, torch.ScriptObject):
                _waited(new)
            # Views and results in place are written already.
            if isinstance(target, torch.Tensor) and (
                target.untyped_storage().data_ptr() not in inputs
            ):
                target.copy_(new)

    return step


def _waited(work: Any) -> None:  # noqa: ANN401 - torch.distributed's Work
    work.wait()


class PretendDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__ has no types
    """While it is entered, ``device="cuda"`` gives a ``PretendTensor``."""

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an overloaded operator
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator gives
        """Compute on the CPU."""
        return computed(func, args, kwargs or {})


def new_mode() -> PretendDevice:
    """A mode to enter, in any thread."""
    return PretendDevice()  # type: ignore[no-untyped-call]  # torch's __init__ has no types


@contextmanager
def untouched() -> Iterator[None]:
    """Operators on plain tensors, unseen by any mode: what a kernel does."""
    with torch._C._DisableTorchDispatch(), torch.inference_mode():  # noqa: SLF001 - it has no public name
        yield
