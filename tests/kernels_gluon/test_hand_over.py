"""How Triton hands work to warps, in the PTX: what ``tools/racecheck.py`` says of it.

No access of ours is on the lines that it leaves out, and the accesses there are ordered by barriers
of the whole block.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton==3.6.0: it compiles without a GPU")

import triton
from triton.backends.compiler import GPUTarget

import hand_over
import racecheck
import scale_ring
from blockscale.kernels.gluon.build import Form, compile_form
from blockscale.kernels.gluon.dialect import RELEASE, GluonSource
from blockscale.kernels.gluon.grouped_work import grouped_small_variant, grouped_variant
from blockscale.kernels.gluon.work import dense_variant, small_variant

if TYPE_CHECKING:
    from collections.abc import Iterator

SM90 = GPUTarget("cuda", 90, 32)
BF16 = torch.bfloat16
# One of each kernel, and of each number of partitions.
FORMS = (
    Form(dense_variant(256, 128, 2), BF16),
    Form(dense_variant(128, 128, 2, split=True), BF16),
    Form(dense_variant(128, 128, 2, narrow=True), BF16),
    Form(dense_variant(64, 64, 2), BF16),
    Form(small_variant(64, 8, 2, split=False), BF16),
    Form(grouped_variant(256, 128, 2), BF16, overlap=True),
    Form(grouped_variant(256, 128, 2, 32), torch.float16, overlap=True),
    Form(grouped_small_variant(64, 8, 2, 256), BF16, overlap=True),
)
# The control without and with mbarriers.
CONTROLS = [f"{racecheck.CONTROL} {mbarriers}" for mbarriers in (0, 2)]
RING = f"{racecheck.RING} {scale_ring.STAGES}"
KERNELS = [form.name for form in FORMS]
# The byte that a worker reads, and the bytes of several that the others write: constants.
READ = re.compile(r"ld\.shared\.b8\s+%rs?\d+, \[%r\d+\+\d+\];")
WRITE = re.compile(r"st\.shared\.(v2\.)?b32\s+\[global_smem\+\d+\], ([-\d]+|\{[-\d]+, [-\d]+\});")
# A value that a partition is given so: Triton 3.7 and newer has one in ``small_m``.
GIVEN = re.compile(r"st\.shared\.b32\s+(\[global_smem\+\d+\]), %r\d+;")
TAKEN = re.compile(r"ld\.shared\.b32\s+%r\d+, (\[global_smem\+\d+\]);")
# Whatever touches shared memory.
TOUCHES = re.compile(
    r"\b(ld|st|atom|red)\.shared|mbarrier\.|cp\.async\.bulk|(ld|st)matrix|wgmma\.mma"
)
MEETING = "barrier.sync"


@cache
def ptx(name: str) -> str:
    if name not in (*CONTROLS, RING):
        form = FORMS[KERNELS.index(name)]
        return str(compile_form(form, SM90).asm["ptx"])
    is_ring = name == RING
    kernel = scale_ring.scale_ring_kernel if is_ring else hand_over.hand_over_kernel
    pointer = "*fp32" if is_ring else "*i32"
    source = GluonSource(
        kernel,
        dict(zip(kernel.arg_names, (pointer, "i32", "constexpr", "constexpr"), strict=True)),
        constexprs={(2,): int(name.split()[1]), (3,): hand_over.PRODUCER_REGISTERS},
    )
    options = {"num_warps": hand_over.WARPS, "maxnreg": hand_over.REGISTERS}
    return str(triton.compile(source, target=SM90, options=options).asm["ptx"])


def located(text: str) -> Iterator[tuple[tuple[str, int], str]]:
    """Each instruction with its file and line."""
    files = {
        number: Path(name).name for number, name in re.findall(r'\.file\s+(\d+) "(.+?)"', text)
    }
    place = ("", 0)
    for line in text.splitlines():
        found = re.match(r"\s*\.loc\s+(\d+) (\d+) ", line)
        if found:
            place = (files[found[1]], int(found[2]))
        else:
            yield place, line.strip()


def hand_over_lines(text: str) -> frozenset[tuple[str, int]]:
    name = re.search(r"\.entry (\w+)\(", text)
    assert name is not None
    return racecheck.hand_over_lines()[name[1]]


@pytest.mark.parametrize("name", [*KERNELS, *CONTROLS, RING])
def test_on_the_lines_left_out_are_bytes_that_say_whose_work_is_whose(name: str) -> None:
    text = ptx(name)
    lines = hand_over_lines(text)
    there = [code for place, code in located(text) if place in lines and TOUCHES.search(code)]
    reads = [code for code in there if READ.fullmatch(code)]
    writes = [code for code in there if WRITE.fullmatch(code)]
    assert len(reads) == 1
    assert len(writes) >= 2
    values = [code for code in there if code not in (*reads, *writes)]
    given = {match[1] for code in values if (match := GIVEN.fullmatch(code))}
    taken = {match[1] for code in values if (match := TAKEN.fullmatch(code))}
    assert given == taken
    assert len(values) == 2 * len(given), values
    assert not values or RELEASE > (3, 6)
    elsewhere = [code for place, code in located(text) if place not in lines]
    assert not any(READ.fullmatch(code) or WRITE.fullmatch(code) for code in elsewhere)


@pytest.mark.parametrize("name", [*KERNELS, *CONTROLS, RING])
def test_all_threads_meet_between_each_write_and_each_read(name: str) -> None:
    """A worker meets the others, reads, meets them; they write, and then they meet."""
    codes = [
        code
        for _, code in located(ptx(name))
        if MEETING in code or READ.fullmatch(code) or WRITE.fullmatch(code)
    ]
    # Barriers of some of the threads have a count.
    meetings = [code for code in codes if re.fullmatch(r"barrier\.sync\s+1;", code)]
    assert len(meetings) >= 8
    for at, code in enumerate(codes):
        if READ.fullmatch(code):
            assert codes[at - 1] in meetings
            assert codes[at + 1] in meetings
        if WRITE.fullmatch(code):
            after = [later for later in codes[at:] if not WRITE.fullmatch(later)]
            assert after[0] in meetings
    # The last bytes are written after a meeting, that of the partitions' end.
    last = max(at for at, code in enumerate(codes) if WRITE.fullmatch(code))
    before = [earlier for earlier in codes[:last] if not WRITE.fullmatch(earlier)]
    assert before[-1] in meetings


@pytest.mark.parametrize("name", CONTROLS)
def test_the_control_has_no_shared_memory_but_triton_s(name: str) -> None:
    touching = [code for _, code in located(ptx(name)) if TOUCHES.search(code)]
    others = [code for code in touching if not READ.fullmatch(code) and not WRITE.fullmatch(code)]
    assert len(others) < len(touching)
    assert all("mbarrier." in code for code in others)
    assert bool(others) is (name == CONTROLS[1])


@pytest.mark.parametrize("name", [*KERNELS, RING])
def test_on_a_scale_s_lines_is_its_store_and_are_its_loads(name: str) -> None:
    put, taken = racecheck.scale_lines()
    touching = [(place, code) for place, code in located(ptx(name)) if TOUCHES.search(code)]
    stores = [code for place, code in touching if place == put]
    loads = [code for place, code in touching if place == taken]
    assert stores
    assert loads
    assert all(re.match(r"(@%p\d+ )?st\.shared(::cta)?\.b32", code) for code in stores), stores
    assert all(re.match(r"(@%p\d+ )?ld\.shared(::cta)?\.b32", code) for code in loads), loads


def test_the_ring_is_right() -> None:
    """Its readers meet after they read and before one arrives; nothing else is shared."""
    lines = dict.fromkeys(racecheck.scale_lines(), "scale")
    codes = [
        (lines.get(place, ""), code)
        for place, code in located(ptx(RING))
        if (TOUCHES.search(code) or "bar.sync" in code or "bar.warp.sync" in code)
        and place not in hand_over_lines(ptx(RING))
        and "mbarrier.init" not in code
    ]
    words = [
        f"{scale} {re.sub(r'^@%p[0-9]+ ', '', code).split()[0]}".strip().replace("::cta", "")
        for scale, code in codes
    ]
    wait, arrive = "mbarrier.try_wait.parity.shared.b64", "mbarrier.arrive.shared.b64"
    reader, writer = (at for at, word in enumerate(words) if word == wait)
    # Triton 3.8 has them meet twice.
    steps = dict.fromkeys(words[reader : words.index(arrive) + 1])
    assert list(steps) == [wait, "scale ld.shared.b32", "bar.sync", arrive]
    assert words[writer:] == [wait, "scale st.shared.b32", "bar.warp.sync", arrive]
