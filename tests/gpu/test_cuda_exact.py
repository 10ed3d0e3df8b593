"""``gemm.cu`` on a GPU: bit for bit where no tolerance is needed.

Small whole numbers with powers of two as scales: every sum is exact in float32 and in the tensor
cores' narrower sums, so that each form must give the float64 product, rounded once. The same forms
and cases pass on the pretend Hopper (``tests/kernels_cuda``).
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from blockscale.kernels.cuda.build import compile_all
from blockscale.kernels.cuda.choice import forms
from blockscale.kernels.cuda.work import Form, Share, When, fits, make_form, make_work
from blockscale.kernels.cuda.writing import at_once, by_lanes, forms_to_compare, in_flight, late
from blockscale.tensor import dtype_of
from blockscale.testing.exact_problem import ExactProblem, wide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="gemm.cu runs on SM90 (H100, H200)",
    ),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPARED = (
    (256, 128), (256, 112), (128, 192), (128, 144), (128, 128), (128, 64), (64, 128), (64, 96),
    (64, 64), (64, 32),
)  # fmt: skip


def problem_of(m: int, n: int, k: int) -> ExactProblem:
    from blockscale.kernels.cuda.product import CudaProduct

    return ExactProblem(m, n, k, CudaProduct)


def offered(dtype: torch.dtype) -> list[Form]:
    """What the choice compares, and in what way it may have a tile written."""
    usual = forms(dtype_of(dtype))
    ways = [*map(at_once, usual), *map(late, usual)]
    ways += [by_lanes(form, when) for form in usual for when in When]
    return list(dict.fromkeys([*usual, *ways, *map(in_flight, ways)]))


def all_forms(dtype: torch.dtype) -> list[Form]:
    """Those, and other ways to write a tile."""
    others = [
        form
        for rows, columns in COMPARED
        for form in forms_to_compare(rows, columns, dtype_of(dtype))
        if dtype is torch.float16
    ]
    return list(dict.fromkeys([*offered(dtype), *others]))


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    """One form takes a second or two: all cores share them."""
    every = [form for dtype in DTYPES for form in all_forms(dtype)]
    worker = getattr(request.config, "workerinput", None)
    start, workers = 0, os.cpu_count() or 1
    if worker is not None:
        # pytest-xdist: one or two workers come here first, others have tests elsewhere. Each starts
        # at another form, and none compiles what another has.
        start = len(every) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
        workers = max(1, workers // 2)
    with warnings.catch_warnings():
        # Of fork beside CUDA's threads: the children only call NVRTC.
        warnings.simplefilter("ignore", DeprecationWarning)
        compile_all(every[start:] + every[:start], workers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_first_small_product(dtype: torch.dtype) -> None:
    """One tile, one K block: what a first run looks at before anything else."""
    problem = problem_of(64, 128, 128)
    work = make_work(make_form(64, 128, dtype_of(dtype)), 64, 128, 128, 1)
    assert torch.equal(problem.run(work, dtype), problem.expected.to(dtype))


@pytest.mark.parametrize("share", Share)
def test_a_first_cluster(share: Share) -> None:
    problem = problem_of(256, 256, 512)
    form = make_form(128, 128, dtype_of(torch.bfloat16), share=share)
    out = problem.run(make_work(form, 256, 256, 512, 2), torch.bfloat16)
    assert torch.equal(out, problem.expected.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(293, 416, 912), (1, 8, 16), (3, 32, 16), (77, 1000, 400)], ids=str
)
def test_every_form_gives_the_float64_product_bit_for_bit(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Ragged each way; with four multiprocessors each block has several tiles."""
    problem = problem_of(*shape)
    bias = torch.randint(-4, 5, (problem.n,), device="cuda").to(dtype)
    expected = (problem.expected + bias.double()).to(dtype)
    fitting = [form for form in all_forms(dtype) if fits(form, problem.n)]
    assert fitting
    wrong = [
        form.name
        for form in fitting
        if not torch.equal(problem.run(make_work(form, *shape, 4), dtype, bias), expected)
    ]
    assert not wrong


@pytest.mark.parametrize("m", [7, 300])
def test_scale_fingerprint(m: int) -> None:
    """Ones with a power of two of their own in each block: a wrong scale index would show."""
    problem = problem_of(m, 464, 1280)
    problem.activation.data.fill_(1.0)
    problem.weight.data.fill_(1.0)
    blocks = torch.arange(10, device="cuda")
    rows = torch.arange(m, device="cuda") % 7
    problem.activation.scales.copy_(2.0 ** (rows[:, None] + blocks))
    columns = torch.arange(4, device="cuda")
    problem.weight.scales.copy_(2.0 ** -(blocks + 3.0 * columns[:, None]))
    expected = problem.expected
    for form in offered(torch.float32):
        out = problem.run(make_work(form, m, 464, 1280, 6), torch.float32)
        assert torch.equal(out.double(), expected), form.name


@pytest.mark.parametrize("m", [16, 128, 1500])
def test_every_form_gives_the_same_bits_and_gluon_s(m: int) -> None:
    """Any values: the chain of an element does not depend on who computes it."""
    pytest.importorskip("triton", reason="the Gluon kernels need Triton 3.6")
    from blockscale.kernels.gluon.product import GluonProduct
    from blockscale.kernels.gluon.work import dense_variant, dense_work

    problem = problem_of(m, 2112, 7168)
    generator = torch.Generator("cuda").manual_seed(m)
    for operand in (problem.activation, problem.weight):
        values = torch.randn(operand.data.shape, generator=generator, device="cuda")
        operand.data.copy_(values.to(torch.float8_e4m3fn))
        operand.scales.mul_(torch.rand(operand.scales.shape, generator=generator, device="cuda"))
    gluon = GluonProduct(problem.weight)
    gluon.use(dense_work(dense_variant(128, 128, 4), m, 2112, 7168, 132), m, torch.float32)
    expected = torch.empty((m, 2112), device="cuda")
    gluon(problem.activation, expected, None)
    wrong = []
    for form in offered(torch.float32):
        for _ in range(3):
            out = problem.run(make_work(form, m, 2112, 7168, 132), torch.float32)
            wrong += [] if torch.equal(out, expected) else [form.name]
    assert not wrong


@pytest.mark.parametrize("columns", [144, 160])
def test_blocks_of_a_cluster_may_end_in_any_order(columns: int) -> None:
    """One whose last tile lies outside has nothing to write after it gave back its last slot.

    Launches failed: the other block had ended when the arrival came (one in some ten thousand).
    """
    problem = problem_of(3072, 6144, 128)
    tile = make_form(128, columns, dtype_of(torch.float32), share=Share.ACTIVATION)
    work = make_work(by_lanes(tile, When.LATE), 3072, 6144, 128, 132)
    assert (work.unit_columns * 2 - 1) * columns >= problem.n
    out = problem.run(work, torch.float32)
    for _ in range(50_000):
        problem.product(problem.activation, out, None)
    torch.cuda.synchronize()
    assert torch.equal(out.double(), problem.expected)


def test_more_than_two_to_the_31_elements() -> None:
    """Output of 2.16e9 elements, checked where an overflow would hit."""
    m, n = 131_080, 16_512
    problem = problem_of(m, n, 128)
    out = problem.run(None, torch.bfloat16)
    a, b = wide(problem.activation, rows=1), wide(problem.weight, rows=128)
    for rows in (slice(0, 300), slice(m // 2, m // 2 + 300), slice(max(0, m - 300), m)):
        assert torch.equal(out[rows], (a[rows] @ b.T).to(torch.bfloat16))
