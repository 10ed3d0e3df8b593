"""The CUDA driver of the pretend GPU, as ``kernels.cuda.driver`` calls it.

Looks at every descriptor and launch as a real driver and the kernel would. Small products are then
computed by ``gemm.cu`` itself on the pretend Hopper (``cuda_machine``), larger ones by torch.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import asdict
from typing import Any

import torch

from blockscale.formats import DType
from blockscale.kernels.cuda import build, driver, launch
from blockscale.kernels.cuda.work import (
    IN_ORDER,
    Box,
    Form,
    Grouping,
    Share,
    Stores,
    When,
    Work,
    aligned_scale_stride,
)
from blockscale.testing import cuda_machine
from blockscale.testing.pretend_launch import Operands, done, strided
from blockscale.testing.pretend_memory import PretendError

# Above this, threads as fibers take too long.
MAX_BLOCKS, MAX_PRODUCTS = 8, 1 << 25
ELEMENTS = {
    driver.UINT8: torch.uint8,
    driver.FLOAT16: torch.float16,
    driver.FLOAT32: torch.float32,
    driver.BFLOAT16: torch.bfloat16,
}
SWIZZLE_BYTES = {number: width for width, number in driver.SWIZZLES.items()}
MAX_BOX, MAX_PITCH = 256, 1 << 40
DEALT_AXES = 5


def install() -> None:
    """Have the cuda backend compile nothing and launch here."""
    replacements: list[tuple[object, str, object]] = [
        (driver, "driver", lambda: DRIVER),
        (launch, "compile_form", packed),
        (build, "compile_form", packed),
        (build, "nvrtc", lambda: None),
    ]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)


def packed(form: Form) -> bytes:
    """In the place of a cubin: the form in words."""
    return json.dumps({**asdict(form), "out": form.out.value}).encode()


def unpacked(cubin: bytes) -> Form:
    """What ``packed`` packed."""
    fields = json.loads(cubin)
    fields["stores"]["when"] = When(fields["stores"]["when"])
    fields["stores"] = Stores(**fields["stores"])
    kinds = {"share": Share, "out": DType, "grouping": Grouping}
    return Form(**{**fields, **{name: kind(fields[name]) for name, kind in kinds.items()}})


class Map(ctypes.Structure):
    """What the driver was asked to encode, in 128 bytes."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("pitch", ctypes.c_uint64),
        ("box_rows", ctypes.c_uint32),
        ("box_columns", ctypes.c_uint32),
        ("element_type", ctypes.c_uint32),
        ("swizzle", ctypes.c_uint32),
        ("promotion", ctypes.c_uint32),
        # 0 for a matrix.
        ("slots", ctypes.c_uint32),
        ("dealt", ctypes.c_uint32),
        ("padding", ctypes.c_ubyte * 68),
    )

    @property
    def dtype(self) -> torch.dtype:
        """Of an element."""
        return ELEMENTS[self.element_type]

    @property
    def box(self) -> Box:
        """Of one copy."""
        swizzle = SWIZZLE_BYTES[self.swizzle]
        return Box(self.box_rows, self.box_columns, self.dtype.itemsize, swizzle, self.dealt)

    def matrix(self, name: str) -> torch.Tensor:
        """What it describes. Raises PretendError if it is not all there."""
        row = self.pitch // self.dtype.itemsize
        leading = [self.slots] if self.slots else []
        shape = (*leading, self.rows, self.columns)
        strides = (*(self.rows * row for _ in leading), row, 1)
        return strided(name, self.address, self.dtype, shape, strides)


def _require(holds: object, otherwise: str) -> None:
    if not holds:
        raise PretendError(otherwise)


def in_order(
    sizes: list[int], pitches: list[int], box: list[int]
) -> tuple[list[int], list[int], list[int], int]:
    """What five axes of dealt rows are of a matrix, and how many rows a group has.

    Raises PretendError where ``driver.encode`` would have them otherwise.
    """
    if len(sizes) != DEALT_AXES:
        return sizes, pitches, box, IN_ORDER
    columns, *group, groups = sizes
    pitch, dealt = pitches[0], group[0] * group[1] * group[2]
    _require(group[:2] == [2, 4] and box[1:4] == group, "groups of dealt rows")
    turns = [pitch, dealt // 4 * pitch, 2 * pitch, dealt * pitch]
    _require(pitches[: len(turns)] == turns, "turns of quarters")
    return [columns, groups * dealt], [pitch], [box[0], box[4] * dealt], dealt


class Driver:
    """The functions of libcuda that ``kernels.cuda`` calls; each answers 0, success."""

    def __init__(self) -> None:
        self._forms: list[Form] = []
        self._shared: dict[int, int] = {}

    def cuGetErrorString(self, status: int, words: Any) -> int:  # noqa: ANN401, N802 - a ctypes reference; the driver's name
        """No status but success is ever given."""
        msg = f"no error has status {status} ({words})"
        raise PretendError(msg)

    def cuModuleLoadData(self, module: Any, cubin: bytes) -> int:  # noqa: ANN401, N802 - as above
        """A module is the number of its form."""
        self._forms.append(unpacked(cubin))
        module._obj.value = len(self._forms)  # noqa: SLF001 - what byref refers to
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:  # noqa: ANN401, N802 - as above
        """A function has its module's number."""
        _require(name.decode() == build.KERNEL, f"no kernel {name!r}")
        function._obj.value = module.value  # noqa: SLF001 - what byref refers to
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: ANN401, N802 - as above
        """Only how much shared memory it may have."""
        _require(attribute == driver.MAX_DYNAMIC_SHARED_BYTES, f"attribute {attribute}")
        self._shared[function.value] = value
        return 0

    def cuTensorMapEncodeTiled(self, place: Any, element_type: int, *given: Any) -> int:  # noqa: ANN401, N802 - as above
        """Write down what is to be encoded, having looked at it."""
        rank, address, sizes, pitches, box, steps, interleave, swizzle, promotion, fill = given
        _require((interleave, fill, *steps) == (0, 0, *[1] * rank), "an unusual descriptor")
        sizes, pitches, box, dealt = in_order([*sizes], [*pitches], [*box])
        # Of two axes, or of three.
        slots = sizes[2:]
        is_stack = not slots or (pitches[1], box[2]) == (sizes[1] * pitches[0], 1)
        _require(is_stack, "slots one behind the other")
        size = ELEMENTS[element_type].itemsize
        _require(place.value % driver.MAP_ALIGNMENT == 0, "a descriptor is aligned")
        _require(address.value % driver.TMA_BYTES == 0, "TMA: address")
        _require(pitches[0] % driver.TMA_BYTES == 0 and pitches[0] < MAX_PITCH, "TMA: pitch")
        _require(all(0 < side <= MAX_BOX for side in box), "TMA: box of 1 to 256 each way")
        _require(box[0] * size % driver.TMA_BYTES == 0, "TMA: a row of the box is 16 bytes or more")
        width = SWIZZLE_BYTES[swizzle]
        _require(not width or box[0] * size <= width, "TMA: a row of the box fits the swizzle")
        _require(all(sizes), "TMA: an empty matrix")
        found = Map(
            address.value, sizes[1], sizes[0], pitches[0], box[1], box[0], element_type, swizzle,
            promotion, slots[0] if slots else 0, dealt,
        )  # fmt: skip
        ctypes.memmove(place.value, ctypes.addressof(found), ctypes.sizeof(found))
        return 0

    def cuLaunchKernelEx(self, config: int, function: Any, places: Any, extra: None) -> int:  # noqa: ANN401, N802 - as above
        """Look at the launch, then compute what it computes."""
        _require(extra is None, "arguments are given one by one")
        form = self._forms[function.value - 1]
        asked = driver.LaunchConfig.from_address(config)
        attributes = {one.id: list(one.value) for one in asked.attributes[: asked.attribute_count]}
        cluster = attributes.get(driver.CLUSTER_DIMENSION, [1, 1, 1])[:3]
        _require(cluster == [form.cluster, 1, 1], f"{form.name} in clusters of {cluster}")
        _require(asked.grid[0] % form.cluster == 0, "blocks are a multiple of the cluster")
        _require(list(asked.grid[1:]) == [1, 1] and asked.grid[0] > 0, "a grid of one dimension")
        _require(list(asked.block) == [form.threads, 1, 1], f"{form.name}: {list(asked.block)}")
        _require(asked.shared_bytes == form.shared_bytes, "shared memory as the form says")
        _require(self._shared[function.value] >= asked.shared_bytes, "shared memory was asked for")
        # Copies, as the driver takes them: a graph is replayed after the caller's own are gone.
        maps = [Map.from_buffer_copy(Map.from_address(places[number])) for number in range(6)]
        problem = launch.Problem.from_buffer_copy(launch.Problem.from_address(places[6]))
        blocks = asked.grid[0]
        done(lambda: compute(form, blocks, maps, problem))
        return 0


def compute(form: Form, blocks: int, maps: list[Map], problem: launch.Problem) -> None:
    """One launch. Raises PretendError where descriptors and numbers do not go together."""
    names = ("a", "a_last", "b", "a_scales", "a_scales_last", "out")
    work = Work(
        form,
        problem.n,
        problem.unit_rows,
        problem.unit_columns,
        maps[0].matrix("a").shape[1],
        problem.band,
        blocks,
        problem.last_rows,
    )
    _require(work.k_blocks == problem.k_blocks, f"{work.name}: K blocks")
    _require([one.box for one in maps] == list(work.boxes), f"{work.name}: boxes")
    a, a_last, b, a_scales, a_scales_last, out = (
        one.matrix(name) for name, one in zip(names, maps, strict=True)
    )
    for one, last in ((a, a_last), (a_scales, a_scales_last)):
        _require(last.data_ptr() == one.data_ptr() and last.shape == one.shape, "one activation")
    m, n, k = problem.m, problem.n, a.shape[1]
    _require(b.shape[1] == k and n > 0 and b.shape[0] % n == 0, "N and K of both operands")
    groups = b.shape[0] // n
    is_masked = form.grouping is Grouping.MASKED
    slots = groups if is_masked else 1
    _require(a.shape[0] == slots * m, "rows of the activation")
    _require(tuple(out.shape) == ((slots, m, n) if is_masked else (m, n)), "M and N")
    _require(problem.out == out.data_ptr(), "one output")
    _require(tuple(a_scales.shape) == (slots * problem.k_blocks, m), "scales of the activation")
    _require(a_scales.stride(0) == aligned_scale_stride(m), "columns of scales")
    scale_shape = (groups, -(-n // 128), problem.k_blocks)
    scale_strides = (scale_shape[1] * problem.b_scale_stride, problem.b_scale_stride, 1)
    b_scales = strided("b_scales", problem.b_scales, torch.float32, scale_shape, scale_strides)
    bias = strided("bias", problem.bias, out.dtype, (n,), None) if problem.bias else None
    routing = None
    if form.grouping is Grouping.NOTHING:
        _require(groups == 1 and not problem.routing, "one weight, and no groups")
    elif is_masked:
        _require(problem.groups == groups, "as many groups as weights")
        routing = strided("routing", problem.routing, torch.int32, (groups,), None)
    else:
        _require(problem.block_rows > 0 and m % problem.block_rows == 0, "whole row blocks")
        count = (m // problem.block_rows,)
        routing = strided("routing", problem.routing, torch.int32, count, None)
    codes = torch.float8_e4m3fn
    if blocks > MAX_BLOCKS or slots * m * n * k > MAX_PRODUCTS:
        stack = out if is_masked else out[None]
        operands = (a.view(codes), b.view(codes), a_scales, b_scales, stack, bias)
        found = Operands(*operands, routing, is_masked=is_masked)
        (found.multiply if routing is None else found.multiply_groups)()
        return
    operands_a = (a.view(codes).view(slots, m, k) if is_masked else a.view(codes), a_scales)
    operands_b = (b.view(codes).view(groups, n, k), b_scales)
    if routing is None:
        operands_b = (operands_b[0][0], b_scales[0])
    cuda_machine.multiply(work, operands_a, operands_b, out, bias if routing is None else routing)


DRIVER = Driver()
