"""What a check comes to: an outcome, or ``WrongNumbersError`` that says where and by how much."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blockscale.formats import DType

# Relative Frobenius error on normal data: half an ulp of the output dtype, plus what Hopper's
# tensor cores drop inside a block of 128 products (about 14 bits are kept).
MAX_RELATIVE_ERROR = {DType.BFLOAT16: 4e-3, DType.FLOAT16: 1.5e-3, DType.FLOAT32: 1.5e-3}


class WrongNumbersError(Exception):
    """A backend's result differs from the reference; the message says where and by how much."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was checked. ``shapes`` is 0 if the backend's gates let no shape of the probe pass."""

    shapes: int
    max_relative_error: float

    def __str__(self) -> str:
        """For people, and for ``Proof.detail``."""
        return f"{self.shapes} shapes, relative error up to {self.max_relative_error:.1e}"


def place_of() -> str:
    """Where the checks run: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_same(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Raise WrongNumbersError unless both matrices hold the same values; NaN differs from all."""
    differs = (found != wanted).nonzero()
    if len(differs):
        row, column = (int(index) for index in differs[0][:2])
        msg = (
            f"{what}: {len(differs)} of {found.numel()} elements differ, the first at ({row}, "
            f"{column}): {float(found[row, column])!r} instead of {float(wanted[row, column])!r}"
        )
        raise WrongNumbersError(msg)
