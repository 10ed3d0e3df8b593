"""What an engine that runs a plan wants to receive when its weights change, tensor by tensor.

The contract names the *prepared* form: a trainer that quantizes its masters straight to it rounds
once, where checkpoint-form FP8 would be requantized for some backends, and the engine copies what
it gets. It is plain values and JSON: the trainer needs neither the engine nor its plan.
"""

from __future__ import annotations

import hashlib
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec

from blockscale.errors import FormatError, PlanError
from blockscale.formats import ScaleFormat, block_format_named, scale_layout_named
from blockscale.planning.plan import Conversion

if TYPE_CHECKING:
    from blockscale.formats import BlockFormat, ScaleLayout
    from blockscale.planning.plan import LinearPlan, ModelPlan

SCHEMA_VERSION = 1


class Role(Enum):
    """What a tensor of a layer is."""

    CODES = "codes"
    SCALES = "scales"
    BIAS = "bias"


class WantedTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor to send, contiguous: ``shape`` elements of ``dtype`` (torch's name)."""

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: str


class WantedLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer. Its master is a float (``experts``, n, k) matrix called ``NAME.weight``.

    ``quantize_to``: the format that rounds the master, once. ``format`` and ``scale_layout``: how
    the result is sent; where ``format`` is another, it says the same values exactly. All three are
    names in ``blockscale.formats``. ``parts``: rows of the merged weights, in order, where the
    engine merges several.
    """

    name: str
    n: int
    k: int
    experts: int | None
    parts: tuple[int, ...]
    quantize_to: str
    format: str
    scale_layout: str
    tensors: tuple[WantedTensor, ...]

    @property
    def rounding_format(self) -> BlockFormat:
        """``quantize_to`` as a value. Raises FormatError if the name is malformed."""
        return block_format_named(self.quantize_to)

    @property
    def block_format(self) -> BlockFormat:
        """``format`` as a value. Raises FormatError if the name is malformed."""
        return block_format_named(self.format)

    @property
    def layout(self) -> ScaleLayout:
        """Where scales lie. Raises FormatError if there is no such layout."""
        return scale_layout_named(self.scale_layout)

    @property
    def master_shape(self) -> tuple[int, ...]:
        """Of the float matrix that is quantized."""
        return (self.n, self.k) if self.experts is None else (self.experts, self.n, self.k)

    def tensor(self, role: Role) -> WantedTensor | None:
        """The tensor of that role; None for the bias of a layer that has none."""
        return next((tensor for tensor in self.tensors if tensor.role is role), None)


class Contract(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All layers of one rank, in the plan's order. Unquantized weights are not in it."""

    schema: int
    layers: tuple[WantedLayer, ...]

    @property
    def digest(self) -> str:
        """Two contracts with the same digest want the same bytes."""
        return hashlib.sha256(self.to_json()).hexdigest()[:16]

    def layer(self, name: str) -> WantedLayer | None:
        """The layer of that name, if there is one."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def document(self) -> dict[str, Any]:
        """JSON values."""
        built: dict[str, Any] = msgspec.json.decode(self.to_json())
        return built

    def to_json(self) -> bytes:
        """The contract as JSON; the inverse is ``contract_of_json``."""
        return msgspec.json.encode(self)


def contract_of(plan: ModelPlan) -> Contract:
    """What ``plan`` wants. Raises PlanError, naming it, if a layer has no backend."""
    return Contract(SCHEMA_VERSION, tuple(wanted_by(layer) for layer in plan.layers))


def contract_of_json(text: bytes | str) -> Contract:
    """The contract that ``to_json`` wrote. Raises FormatError, saying where, if it is none."""
    try:
        contract = msgspec.json.decode(text, type=Contract)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        msg = f"not a contract of schema {SCHEMA_VERSION}: {error}"
        raise FormatError(msg) from None
    if contract.schema != SCHEMA_VERSION:
        msg = f"a contract of schema {contract.schema}; this blockscale reads {SCHEMA_VERSION}"
        raise FormatError(msg)
    return contract


def wanted_by(plan: LinearPlan) -> WantedLayer:
    """What one layer wants. Raises PlanError if it has no backend."""
    if plan.weight is None:
        msg = f"layer {plan.name!r} has no backend, so it wants no weight; see the plan for reasons"
        raise PlanError(msg)
    request, form = plan.request, plan.weight
    leading = () if request.experts is None else (request.experts,)
    stored = form.layout.stored(request.n, request.k, form.format)
    codes = form.format.element.torch_name
    tensors = [
        WantedTensor(f"{plan.name}.weight", Role.CODES, (*leading, request.n, request.k), codes),
        WantedTensor(
            f"{plan.name}.weight_scale",
            Role.SCALES,
            (*leading, *stored.shape),
            stored.dtype.value,
        ),
    ]
    if request.has_bias:
        shape = (*leading, request.n)
        tensors.append(WantedTensor(f"{plan.name}.bias", Role.BIAS, shape, request.out_dtype.value))
    return WantedLayer(
        plan.name,
        request.n,
        request.k,
        request.experts,
        request.parts,
        _rounding_format(plan, form.format).name,
        form.format.name,
        form.layout.name,
        tuple(tensors),
    )


def _rounding_format(plan: LinearPlan, prepared: BlockFormat) -> BlockFormat:
    """The checkpoint's, so that the engine serves what it would load; the kernel's if lossy.

    A weight that is requantized at load would be rounded twice if the checkpoint's format were
    published.
    """
    if plan.conversion is Conversion.REQUANTIZE:
        return prepared
    source = plan.request.format
    return source.with_scale(ScaleFormat.FP32) if source.scale is ScaleFormat.BF16 else source
