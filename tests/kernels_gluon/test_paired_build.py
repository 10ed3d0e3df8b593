"""The kernel for pairs of programs, compiled for sm_90a (``make test-triton-versions``)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton: it compiles without a GPU")

from triton.backends.compiler import GPUTarget

from blockscale.errors import BackendError
from blockscale.kernels.gluon.build import Form, compile_form
from blockscale.kernels.gluon.dialect import HAS_PAIRS
from blockscale.kernels.gluon.pair_work import pair_variant
from blockscale.kernels.gluon.work import SHARED_BYTES
from blockscale.testing import sass

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

SM90 = GPUTarget("cuda", 90, 32)
FORMS = [
    Form(pair_variant(*tile, dtype.itemsize), dtype, overlap=dtype != torch.float32)
    for tile in ((256, 128), (128, 128), (128, 192))
    for dtype in (torch.bfloat16, torch.float32)
]


@cache
def compiled(form: Form) -> CompiledKernel:
    return compile_form(form, SM90)


if not HAS_PAIRS:

    def test_older_triton_refuses_pairs_in_one_line() -> None:
        with pytest.raises(BackendError, match="or newer, for multicast"):
            compiled(FORMS[0])

else:

    @pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name, scope="module")
    def test_pairs_neither_spill_nor_exceed_shared_memory(form: Form) -> None:
        found = sass.resources(compiled(form).asm["ptx"])
        assert (found.spilled_bytes, found.stack_bytes) == (0, 0)
        assert compiled(form).metadata.shared <= SHARED_BYTES
        assert compiled(form).metadata.num_ctas == 2

    @pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name, scope="module")
    def test_what_is_shared_is_multicast_and_the_other_program_is_told(form: Form) -> None:
        lines = sass.disassemble(compiled(form).asm["cubin"])
        assert sum("UTMALDG.2D.MULTICAST" in line for line in lines) >= 2
        assert sum("UTMALDG" in line and "MULTICAST" not in line for line in lines) >= 1
        ptx = compiled(form).asm["ptx"]
        assert "mbarrier.arrive.shared::cluster" in ptx
        assert "fence.mbarrier_init.release.cluster" in ptx
        loops = sass.inner_loops(lines, "QGMMA")
        assert len(loops) == 2
        assert all(not {"LDG", "LDL", "STL", "STG"} & set(sass.count(loop)) for loop in loops)
