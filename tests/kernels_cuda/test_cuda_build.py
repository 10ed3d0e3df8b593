"""Forms of ``gemm.cu`` compiled for sm_90a: what ptxas made of them. No GPU is needed.

By NVRTC (``pip install 'blockscale[cuda]'``), or by nvcc where that is on PATH; the SASS is read
with the tools that come with Triton. ``pytest -m machine`` compiles all forms (minutes).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytest.importorskip("triton", reason="pip install triton==3.6.0: its tools read SASS")

from blockscale.formats import DType
from blockscale.kernels.cuda.build import HERE, OPTIONS, SOURCE, compile_form
from blockscale.kernels.cuda.choice import forms
from blockscale.kernels.cuda.work import OUTPUTS, Form, Share, Stores, When, make_form, make_work
from blockscale.kernels.cuda.writing import (
    at_once,
    by_lanes,
    forms_to_compare,
    in_flight,
    late,
    written,
)
from blockscale.testing import sass

HAS_NVRTC = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
pytestmark = pytest.mark.skipif(
    not HAS_NVRTC and shutil.which("nvcc") is None,
    reason="needs NVRTC (pip install 'blockscale[cuda]') or nvcc on PATH",
)

# The promotion of one K block and all that goes with it; DeepGEMM's 256x128 loop has about 185
# instructions, the Gluon kernel's 199. By rows, columns, blocks of a
# cluster; 2026-11-26, NVRTC 13.0: 201, 202, 120, 126, 171, 143; with two waves in flight less.
MOST_INSTRUCTIONS = {
    (256, 128, 1): 204,
    (256, 128, 2): 208,
    (128, 128, 1): 122,
    (128, 128, 2): 129,
    (128, 192, 2): 180,
    (128, 112, 1): 146,
}
FEW_FORMS = [
    make_form(256, 128, DType.BFLOAT16, share=Share.ACTIVATION),
    make_form(128, 112, DType.FLOAT16),
    make_form(128, 192, DType.FLOAT32, share=Share.WEIGHT),
    make_form(256, 128, DType.FLOAT16, stores=Stores(128, 3, 8, When.LATE)),
    in_flight(at_once(make_form(128, 64, DType.FLOAT16))),
    in_flight(late(make_form(128, 128, DType.FLOAT32))),
    by_lanes(make_form(256, 128, DType.FLOAT32), When.LATE),
    in_flight(by_lanes(make_form(128, 128, DType.FLOAT16), When.LATE)),
]
# One turn of a block and many, K short and long.
SHAPES = [(m, 4096, k) for m in (64, 8192) for k in (1024, 4096)]
CHOSEN_FORMS = [
    in_flight(way(form)) for out in OUTPUTS for form in forms(out) for way in (at_once, late)
] + [
    written(make_work(form, *shape, 132)).form
    for out in OUTPUTS
    for form in forms(out)
    for shape in SHAPES
]
COMPARED_FORMS = [
    form
    for out in OUTPUTS
    for rows, columns in ((256, 128), (256, 112), (128, 192), (128, 144), (128, 128), (64, 128))
    for form in forms_to_compare(rows, columns, out)
]
MANY_FORMS = [
    form for form in dict.fromkeys([*CHOSEN_FORMS, *COMPARED_FORMS]) if form not in FEW_FORMS
]
SOME_AND_MANY = [
    *FEW_FORMS,
    *(pytest.param(form, marks=pytest.mark.machine) for form in MANY_FORMS),
]
# In the loop these mean a stall, a detour through memory or two instructions for one.
NOT_IN_A_LOOP = {"LDG", "LDL", "STL", "STG", "STS", "FADD", "BAR", "MEMBAR", "MUFU"}
CONSUMER_REGISTERS = {1: 208, 2: 232}


@cache
def cubin(form: Form) -> bytes:
    if HAS_NVRTC:
        return compile_form(form)
    macros = [f"-D{name}={value}" for name, value in form.macros.items()]
    with TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.cubin"
        command = ["nvcc", *OPTIONS[:2], "-Werror=all-warnings", "-cubin", f"-I{HERE}", *macros]
        subprocess.run([*command, str(SOURCE), "-o", str(target)], check=True)
        return target.read_bytes()


@cache
def code(form: Form) -> list[str]:
    return sass.disassemble(cubin(form))


@pytest.mark.parametrize(
    "form", SOME_AND_MANY, ids=lambda form: form.name + form.out.value, scope="module"
)
def test_the_loop_is_wgmmas_and_one_ffma_an_element(form: Form) -> None:
    loops = sass.inner_loops(code(form), "QGMMA")
    # Two consumers with two waves in flight: up to slot 1, and from there for whole turns.
    assert len(loops) == (2 if form.flight == 2 and form.consumers == 2 else 1)
    for loop in loops:
        found = sass.count(loop)
        # Loops of small tiles are unrolled: several K blocks a turn.
        blocks, rest = divmod(found["QGMMA"], 4 * form.waves)
        assert rest == 0
        assert found["FFMA"] == blocks * form.waves * form.columns // 2
        assert not NOT_IN_A_LOOP & set(found)
        # With two waves in flight ptxas moves one value of some forms to a uniform register.
        assert found["R2UR"] <= (blocks if form.flight == 2 else 0)
        # Scales: two rows of each wave, one or two of the weight.
        two = 128 % form.columns != 0
        assert found["LDS"] <= blocks * (2 * form.waves + 1 + two)
        # Barriers: wait, look ahead, give back.
        assert found["SYNCS"] <= 3 * blocks
        most = MOST_INSTRUCTIONS.get((form.rows, form.columns, form.cluster))
        assert most is None or found.total() <= most * blocks


@pytest.mark.parametrize(
    "form", SOME_AND_MANY, ids=lambda form: form.name + form.out.value, scope="module"
)
def test_nothing_spills_and_copies_are_tma(form: Form) -> None:
    lines = code(form)
    found = sass.count(lines)
    assert not found["LDL"] + found["STL"]
    assert found["UTMALDG"] >= 3
    has_boxes = form.stores.buffers > 0
    assert (found["UTMASTG"] > 0) == has_boxes
    assert (found["STSM"] > 0) == (has_boxes and form.out is not DType.FLOAT32)
    # A lane's quarter of the dealt columns: 16 bytes, or 8.
    width = 8 * form.dealt // 4 * form.out.bytes
    assert any(f"STG.E.{width}" in line for line in lines) == (not has_boxes)
    # A thread that ptxas does not know to be alone asks for each copy in a loop over lanes; one
    # that walks alone moves twelve values a K block to uniform registers (163 such moves in all,
    # else up to 148).
    assert not any("BRA.U.ANY" in line for line in lines)
    assert found["R2UR"] < 180
    # Only the results' own fence: a MEMBAR of the whole GPU stood before each first copy once.
    assert not any("MEMBAR" in line and ".GPU" in line for line in lines)
    has_multicast = any("MULTICAST" in line for line in lines)
    assert has_multicast == (form.cluster == 2)


@pytest.mark.parametrize(
    "form", SOME_AND_MANY, ids=lambda form: form.name + form.out.value, scope="module"
)
def test_each_part_keeps_to_its_registers(form: Form) -> None:
    lines = code(form)
    if form.consumers == 1 and form.beside == 1:
        assert not any(sass.SET_REGISTERS.search(line) for line in lines)
        return
    for part in sass.sections(lines):
        is_consumer = part.instructions["QGMMA"] > 0
        allowed = CONSUMER_REGISTERS[form.consumers] if is_consumer else 40
        assert part.allowed_registers == allowed
        assert part.used_registers <= allowed


def test_no_header_of_the_toolkit_is_needed() -> None:
    for path in (SOURCE, *HERE.glob("*.cuh")):
        included = re.findall(r"#include (\S+)", path.read_text(encoding="utf-8"))
        assert set(included) <= {f"<{path.name}>" for path in HERE.glob("*.cuh")}
