"""The grouped kernels, compiled for sm_90a: what ptxas made of them. See ``test_gluon_build``."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton==3.6.0: it compiles without a GPU")

from triton.backends.compiler import GPUTarget

from blockscale.kernels.gluon.build import Form, compile_form
from blockscale.kernels.gluon.grouped_work import (
    GroupedVariant,
    grouped_small_variant,
    grouped_variant,
    registers,
)
from blockscale.kernels.gluon.work import HALF_SHARED_BYTES, SHARED_BYTES
from blockscale.testing import sass

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

SM90 = GPUTarget("cuda", 90, 32)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# One form of each kind of loop; those that differ in a dtype or a count of groups share them.
FORMS = (
    Form(grouped_variant(256, 128, 2), BF16, overlap=True),
    Form(grouped_variant(256, 128, 4), FP32, overlap=True),
    Form(grouped_variant(128, 128, 2), FP16, overlap=True),
    Form(grouped_variant(256, 128, 2, 32), FP16, overlap=True),
    Form(grouped_variant(128, 128, 2, 256), BF16, overlap=True),
    Form(grouped_variant(256, 128, 2, 512), BF16, overlap=True),
    Form(grouped_small_variant(64, 8, 2, 256), BF16, overlap=True),
    Form(grouped_small_variant(64, 64, 4, 32), FP32, overlap=True),
    Form(grouped_small_variant(128, 64, 2, 512), FP16, overlap=True),
    Form(grouped_small_variant(128, 32, 2), BF16, overlap=True),
)
IDS = [form.name for form in FORMS]
# In the loop these mean a stall or a detour through memory.
NOT_IN_A_LOOP = {"LDG", "LDL", "STL", "STG", "R2UR", "FADD", "MUFU"}
# Instructions of one K block in one consumer: two waves, one wave (test_gluon_build).
MOST_INSTRUCTIONS = {128: 216, 64: 128}


@cache
def compiled(form: Form) -> CompiledKernel:
    return compile_form(form, SM90)


@cache
def code(form: Form) -> list[str]:
    return sass.disassemble(compiled(form).asm["cubin"])


@pytest.mark.parametrize("form", FORMS, ids=IDS, scope="module")
def test_nothing_spills_and_shared_memory_fits(form: Form) -> None:
    assert sass.local_bytes(compiled(form).asm["cubin"]) == 0
    limit = SHARED_BYTES if form.is_wide else HALF_SHARED_BYTES
    assert compiled(form).metadata.shared <= limit
    assert "LDL" not in sass.count(code(form))


@pytest.mark.parametrize("form", FORMS, ids=IDS, scope="module")
def test_loops_multiply_on_fp8_tensor_cores_and_promote_by_one_ffma(form: Form) -> None:
    found = [sass.count(loop) for loop in sass.inner_loops(code(form), "QGMMA")]
    variant = form.variant
    if isinstance(variant, GroupedVariant):
        # Of each consumer a wave of 128-row tiles; of 256-row ones two waves, and one wave of the
        # second consumer where its other half has no rows.
        wave = 64 * variant.columns // 128
        expected = [wave, wave] if variant.rows == 128 else [wave] * 3 + [2 * wave] * 2
    else:
        wave = 64 * variant.tokens // 128
        expected = [wave * (variant.weights // 64)]
    assert sorted(loop["FFMA"] for loop in found) == expected
    for loop in found:
        assert loop["QGMMA"] == 4 * loop["FFMA"] // wave
        assert not NOT_IN_A_LOOP & set(loop)
        if form.is_wide:
            assert loop.total() <= MOST_INSTRUCTIONS[loop["FFMA"]]


@pytest.mark.parametrize("form", FORMS, ids=IDS, scope="module")
def test_each_partition_keeps_to_its_registers_and_one_of_them_copies(form: Form) -> None:
    parts = sass.sections(code(form))
    producers = [part for part in parts if part.instructions["UTMALDG"]]
    consumers = [part for part in parts if part.instructions["QGMMA"]]
    producer, consumer = registers(getattr(form.variant, "groups"))  # noqa: B009 - grouped ones only
    assert [part.allowed_registers for part in producers] == [producer]
    assert all(part.used_registers <= producer for part in producers)
    assert all(part.used_registers <= part.allowed_registers for part in consumers)
    if form.is_wide:
        assert all(part.allowed_registers >= consumer for part in consumers)
        assert len(consumers) == 2
        assert all(part.instructions["UTMASTG"] for part in consumers)
    else:
        assert len(consumers) == 1


@pytest.mark.parametrize("form", FORMS, ids=IDS, scope="module")
def test_barriers_in_the_loop_span_one_consumer(form: Form) -> None:
    loops = sass.inner_loops(code(form), "QGMMA")
    barriers = [line for loop in loops for line in loop if "BAR.SYNC" in line]
    assert barriers
    assert all(", 0x80" in line for line in barriers)


@pytest.mark.parametrize("form", FORMS, ids=IDS, scope="module")
def test_a_partition_arrives_at_a_barrier_after_all_its_warps_have_read(form: Form) -> None:
    """Slots and messages: see ``test_gluon_build``."""
    before = sass.before_arrivals(compiled(form).asm["ptx"])
    assert before
    for line in before:
        assert line.startswith(("bar.sync", "bar.warp.sync"))
