"""Every shipped form of the Gluon kernels, compiled for sm_90a: what ptxas made of it.

No GPU is needed, Triton is: ``pip install triton==3.6.0``. About a minute the first time, seconds
afterwards (Triton's cache).
"""

from __future__ import annotations

import subprocess
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton==3.6.0: it compiles without a GPU")

from triton.backends.compiler import GPUTarget

from blockscale.kernels.gluon.build import Form, compile_form
from blockscale.kernels.gluon.choice import variants
from blockscale.kernels.gluon.work import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    HALF_SHARED_BYTES,
    PRODUCER_REGISTERS,
    SHARED_BYTES,
    DenseVariant,
    dense_variant,
    small_variant,
)
from blockscale.testing import sass

if TYPE_CHECKING:
    from pathlib import Path

    from triton.compiler import CompiledKernel

SM90 = GPUTarget("cuda", 90, 32)
HALVES = [Form(variant, torch.bfloat16) for variant in variants(2)]
FLOATS = [Form(variant, torch.float32) for variant in variants(4)]
OVERLAPPING = [
    Form(variant, torch.float16, overlap=True)
    for variant in (dense_variant(256, 128, 2), small_variant(64, 16, 2, split=True))
]
FORMS = [*HALVES, *FLOATS, *OVERLAPPING]
# Instructions of one K block, all included; DeepGEMM's 256x128 loop has about 185
# . By waves and columns; 2026-11-25, ptxas 12.8: 213, 179,
# 125, 95 and 82.
MOST_INSTRUCTIONS = {(2, 128): 216, (1, 192): 184, (1, 128): 128, (1, 64): 98, (1, 32): 86}
# In the loop these mean a stall or a detour through memory.
NOT_IN_A_LOOP = {"LDG", "LDL", "STL", "STG", "R2UR", "FADD", "MUFU"}
WAITING = {"BAR", "SYNCS", "LDS"}


# Every parametrization has the module's scope: all tests of a form come one after the other, so
# that two workers that share this file disassemble no form twice.


@cache
def compiled(form: Form) -> CompiledKernel:
    return compile_form(form, SM90)


@cache
def code(form: Form) -> list[str]:
    return sass.disassemble(compiled(form).asm["cubin"])


def loops(form: Form) -> list[list[str]]:
    """The K loops: of each consumer, and of each width of tile."""
    return sass.inner_loops(code(form), "QGMMA")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name, scope="module")
def test_nothing_spills_and_shared_memory_fits(form: Form) -> None:
    assert sass.local_bytes(compiled(form).asm["cubin"]) == 0
    has_all = isinstance(form.variant, DenseVariant) and form.variant.beside == 1
    assert compiled(form).metadata.shared <= (SHARED_BYTES if has_all else HALF_SHARED_BYTES)


def test_spilled_registers_are_local_memory(tmp_path: Path) -> None:
    """A form that fits, assembled for a third of its registers."""
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    # The kernel sets its numbers of registers itself; those lines go.
    lines = compiled(FLOATS[0]).asm["ptx"].splitlines()
    ptx = "\n".join(line for line in lines if "maxnreg" not in line)
    source.write_text(ptx)
    command = [sass.assembler(ptx), "--gpu-name=sm_90a", "--maxrregcount=48", source, "-o", cubin]
    subprocess.run(command, check=True, capture_output=True)
    assert sass.local_bytes(cubin.read_bytes()) > 0
    assert sass.count(sass.disassemble(cubin.read_bytes()))["LDL"] > 0


@pytest.mark.parametrize("form", HALVES, ids=lambda form: form.name, scope="module")
def test_the_loop_multiplies_on_fp8_tensor_cores_and_promotes_by_one_ffma(form: Form) -> None:
    variant = form.variant
    is_dense = isinstance(variant, DenseVariant)
    waves = variant.waves if is_dense else variant.weights // 64
    columns = variant.columns if is_dense else variant.tokens
    widths = [columns] * (variant.consumers if is_dense else 1)
    if is_dense and variant.narrow:
        widths = [columns, columns // 2] * 2
    found = [sass.count(loop) for loop in loops(form)]
    assert sorted(loop["FFMA"] for loop in found) == sorted(64 * w // 128 * waves for w in widths)
    # Four wgmmas of 32 along K for each wave, and for each part of a tile.
    parts = 2 if is_dense and variant.rest else 1
    assert {loop["QGMMA"] for loop in found} == {4 * waves * parts}
    for loop in found:
        assert not NOT_IN_A_LOOP & set(loop)
        if is_dense:
            assert loop.total() <= MOST_INSTRUCTIONS[variant.waves, variant.columns]


@pytest.mark.parametrize("form", HALVES, ids=lambda form: form.name, scope="module")
def test_barriers_in_the_loop_span_one_consumer(form: Form) -> None:
    barriers = [line for loop in loops(form) for line in loop if "BAR.SYNC" in line]
    assert barriers
    assert all(", 0x80" in line for line in barriers)


@pytest.mark.parametrize("form", HALVES, ids=lambda form: form.name, scope="module")
def test_copies_are_tma_and_each_partition_keeps_to_its_registers(form: Form) -> None:
    parts = sass.sections(code(form))
    producers = [part for part in parts if part.instructions["UTMALDG"]]
    consumers = [part for part in parts if part.instructions["QGMMA"]]
    assert [part.allowed_registers for part in producers] == [PRODUCER_REGISTERS]
    assert all(part.used_registers <= PRODUCER_REGISTERS for part in producers)
    assert all(part.used_registers <= part.allowed_registers for part in consumers)
    if isinstance(form.variant, DenseVariant):
        if form.variant.consumers == CONSUMERS:
            assert [part.allowed_registers for part in consumers] == [CONSUMER_REGISTERS] * 2
        assert sass.count(code(form))["UTMASTG"] > 0


@pytest.mark.parametrize("form", HALVES, ids=lambda form: form.name, scope="module")
def test_tickets_are_drawn_with_release_and_acquire_after_a_barrier(form: Form) -> None:
    lines = [line.strip() for line in compiled(form).asm["ptx"].splitlines()]
    tickets = [at for at, line in enumerate(lines) if "atom.global" in line]
    drawing = form.variant.consumers if isinstance(form.variant, DenseVariant) else 1
    assert len(tickets) == (drawing if form.variant.split else 0)
    for at in tickets:
        assert "atom.global.gpu.acq_rel.add" in lines[at]
        # The stores of all threads come before the barrier, the one thread's ticket after it.
        before = [line for line in lines[:at] if line.startswith(("bar.sync", "st.global"))]
        assert before[-1].startswith("bar.sync")


@pytest.mark.parametrize("form", HALVES, ids=lambda form: form.name, scope="module")
def test_a_partition_arrives_at_a_barrier_after_all_its_warps_have_read(form: Form) -> None:
    """Only one thread arrives: a barrier stands between it and every warp's reads of the slot."""
    before = sass.before_arrivals(compiled(form).asm["ptx"])
    assert before
    for line in before:
        assert line.startswith(("bar.sync", "bar.warp.sync"))


@pytest.mark.parametrize("form", OVERLAPPING, ids=lambda form: form.name, scope="module")
def test_an_overlapping_launch_copies_weights_and_nothing_else_before_it_waits(form: Form) -> None:
    ptx = compiled(form).asm["ptx"]
    before, after = ptx.split("griddepcontrol.wait;")
    copy = "cp.async.bulk.tensor.2d.shared"
    assert (before.count(copy), after.count(copy)) == (1, 3)
    assert after.index("griddepcontrol.launch_dependents") < after.index(copy)
    assert compiled(form).metadata.launch_pdl
    assert "griddepcontrol" not in compiled(HALVES[0]).asm["ptx"]


@pytest.mark.parametrize("form", HALVES, ids=lambda form: form.name, scope="module")
def test_nothing_is_waited_for_between_a_wave_and_the_next(form: Form) -> None:
    """Barriers, slots and scales are seen to while the tensor cores work (perf-log G12)."""
    for loop in loops(form):
        # From the last wait for a wave round to the first wave's start.
        ended = max(at for at, line in enumerate(loop) if "WARPGROUP.DEPBAR" in line)
        started = next(at for at, line in enumerate(loop) if "QGMMA" in line)
        assert not WAITING & set(sass.count(loop[ended:] + loop[:started]))
