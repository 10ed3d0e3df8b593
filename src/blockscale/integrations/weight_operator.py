"""``torch.ops.blockscale.linear_of``: a planned layer, named in traced code by its own weight.

``blockscale.linear`` takes a handle, an integer that means a layer in one process only. An engine
that keeps compiled graphs on disk would replay it in another process, and layers of one shape would
be as many graphs as there are layers. Here the graph's own input, the weight, says which plan runs:
looked up by address, so a weight that was moved or replaced is an error and never another layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from blockscale import ops
from blockscale.errors import BackendError

if TYPE_CHECKING:
    from blockscale.modules.linear import BlockScaledLinear

_BY_ADDRESS: WeakValueDictionary[int, BlockScaledLinear] = WeakValueDictionary()


def name_by_weight(weight: torch.Tensor, linear: BlockScaledLinear) -> None:
    """From now on, while ``linear`` lives, ``weight`` names it.

    ``weight``: (n, k), the engine's own parameter, which must stay where it is.
    """
    _BY_ADDRESS[weight.data_ptr()] = linear


def linear_of(
    activation: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply: activation (..., k) x weight^T + bias as (..., n), as planned for ``weight``.

    ``out_dtype``: the planned one; tracing needs it before anything runs. Raises BackendError if
    no plan is known for the weight, or the activation is not the planned one.
    """
    # Called eagerly, the dispatcher would cost more than small layers take (see ops.linear).
    if not torch.compiler.is_compiling():
        return _linear_of(activation, weight, bias, out_dtype)
    result: torch.Tensor = torch.ops.blockscale.linear_of(activation, weight, bias, out_dtype)
    return result


def _linear_of(
    activation: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,  # noqa: ARG001 - for tracing; the plan holds it
) -> torch.Tensor:
    linear = _BY_ADDRESS.get(weight.data_ptr())
    if linear is None:
        n, k = weight.shape
        msg = (
            f"no plan is known for this {n}x{k} weight: it was moved or replaced after loading, or "
            "a compiled graph from another setup was replayed (clear the engine's compile cache)"
        )
        raise BackendError(msg)
    return ops.linear(activation, bias, linear.handle)


def _linear_of_fake(
    activation: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,  # noqa: ARG001 - the operator's signature
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return activation.new_empty((*activation.shape[:-1], weight.shape[0]), dtype=out_dtype)


_LIBRARY = torch.library.Library("blockscale", "FRAGMENT")
_LIBRARY.define(
    "linear_of(Tensor activation, Tensor weight, Tensor? bias, ScalarType out_dtype) -> Tensor"
)
_LIBRARY.impl("linear_of", _linear_of, "CPU")
_LIBRARY.impl("linear_of", _linear_of, "CUDA")
torch.library.register_fake("blockscale::linear_of", _linear_of_fake, lib=_LIBRARY)
