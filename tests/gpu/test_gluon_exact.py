"""The Gluon kernels on a GPU: bit for bit where no tolerance is needed.

Small whole numbers with powers of two as scales: every sum is exact in float32 and in the tensor
cores' narrower sums, so that each kernel, tile and split must give the float64 product, rounded
once.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the Gluon kernels need Triton 3.6")

from blockscale.kernels.gluon.choice import candidates, variants
from blockscale.kernels.gluon.product import GluonProduct
from blockscale.kernels.gluon.work import (
    DenseVariant,
    Work,
    dense_work,
    small_work,
)
from blockscale.testing.exact_problem import ExactProblem, wide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the Gluon kernels run on SM90 (H100, H200)",
    ),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def problem_of(m: int, n: int, k: int) -> ExactProblem:
    return ExactProblem(m, n, k, GluonProduct)


def works(m: int, n: int, k: int, out_bytes: int, processors: int) -> list[Work]:
    """Every variant once on this shape."""
    found: list[Work] = []
    for variant in variants(out_bytes):
        if isinstance(variant, DenseVariant):
            pieces = 3 if variant.split else 1
            found.append(dense_work(variant, m, n, k, processors, pieces=pieces))
        elif m <= variant.tokens or (variant.tokens >= 32 and m <= 4 * variant.tokens):
            found.append(small_work(variant, m, n, k, 3 if variant.split else 1))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "processors"),
    [(5, 264, 1040, 132), (64, 456, 1152, 132), (330, 456, 944, 5), (1000, 2112, 2048, 132)],
)
def test_every_variant_is_exact_with_ragged_edges(
    m: int, n: int, k: int, processors: int, dtype: torch.dtype
) -> None:
    """With few processors each program walks many tiles, and some of them are split."""
    problem = problem_of(m, n, k)
    bias = torch.randint(-8, 9, (n,), device="cuda").to(dtype)
    plain = problem.expected
    wrong = []
    for work in works(m, n, k, dtype.itemsize, processors):
        for added in (None, bias):
            expected = (plain if added is None else plain + added.double()).to(dtype)
            if not torch.equal(problem.run(work, dtype, added), expected):
                wrong.append((work.name, added is not None))
    assert not wrong


@pytest.mark.parametrize(("n", "k"), [(4096, 7168), (2112, 7168), (576, 7168), (7168, 2048)])
@pytest.mark.parametrize("m", [1, 8, 33, 64, 65, 128, 257, 1024])
def test_what_the_model_chooses_from_is_exact_on_model_shapes(m: int, n: int, k: int) -> None:
    problem = problem_of(m, n, k)
    expected = problem.expected.to(torch.bfloat16)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    wrong = [
        work.name
        for work in candidates(m, n, k, 2, processors)
        if not torch.equal(problem.run(work, torch.bfloat16), expected)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 16), (65, 8, 16), (128, 128, 128), (129, 136, 2064)]
)
def test_the_smallest_and_just_exceeded_shapes(m: int, n: int, k: int) -> None:
    problem = problem_of(m, n, k)
    assert torch.equal(problem.run(None, torch.bfloat16), problem.expected.to(torch.bfloat16))


@pytest.mark.parametrize("m", [7, 300])
def test_scale_fingerprint(m: int) -> None:
    """Ones with a power of two of their own in each block: a wrong scale index would show."""
    problem = problem_of(m, 456, 1280)
    problem.activation.data.fill_(1.0)
    problem.weight.data.fill_(1.0)
    blocks = torch.arange(10, device="cuda")
    rows = torch.arange(m, device="cuda") % 7
    problem.activation.scales.copy_(2.0 ** (rows[:, None] + blocks))
    columns = torch.arange(4, device="cuda")
    problem.weight.scales.copy_(2.0 ** -(blocks + 3.0 * columns[:, None]))
    expected = problem.expected
    for work in works(m, 456, 1280, 4, 7):
        assert torch.equal(problem.run(work, torch.float32).double(), expected), work.name


@pytest.mark.parametrize("m", [16, 128, 1500])
def test_every_unsplit_schedule_gives_the_same_bits(m: int) -> None:
    problem = problem_of(m, 2112, 7168)
    generator = torch.Generator("cuda").manual_seed(m)
    for operand in (problem.activation, problem.weight):
        values = torch.randn(operand.data.shape, generator=generator, device="cuda")
        operand.data.copy_(values.to(torch.float8_e4m3fn))
        operand.scales.mul_(torch.rand(operand.scales.shape, generator=generator, device="cuda"))
    results = {
        work.name: problem.run(work, torch.float32)
        for work in works(m, 2112, 7168, 4, 132)
        if not work.variant.split
    }
    first = next(iter(results.values()))
    assert not [name for name, result in results.items() if not torch.equal(result, first)]


@pytest.mark.parametrize("m", [4, 48, 128, 400])
def test_split_sums_have_the_same_bits_on_every_run(m: int) -> None:
    problem = problem_of(m, 576, 7168)
    values = torch.randn(problem.weight.data.shape, device="cuda")
    problem.weight.data.copy_(values.to(torch.float8_e4m3fn))
    for work in works(m, 576, 7168, 2, 132):
        if work.variant.split:
            first = problem.run(work, torch.bfloat16)
            again = [problem.run(work, torch.bfloat16) for _ in range(30)]
            assert all(torch.equal(result, first) for result in again), work.name


@pytest.mark.parametrize(("m", "n"), [(131_080, 16_512), (40, 16_512)])
def test_more_than_two_to_the_31_elements(m: int, n: int) -> None:
    """Output of 2.16e9 elements; and operands of many rows. Checked where an overflow would hit."""
    problem = problem_of(m, n, 128)
    out = problem.run(None, torch.bfloat16)
    a, b = wide(problem.activation, rows=1), wide(problem.weight, rows=128)
    for rows in (slice(0, 300), slice(m // 2, m // 2 + 300), slice(max(0, m - 300), m)):
        assert torch.equal(out[rows], (a[rows] @ b.T).to(torch.bfloat16))
