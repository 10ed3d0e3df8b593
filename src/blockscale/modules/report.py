"""What a loaded model really runs: read from its modules, not from what was once planned."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.explain import layer_groups, reasons_by_backend

if TYPE_CHECKING:
    from torch import nn

    from blockscale.planning.plan import LinearPlan
    from blockscale.tensor import BlockScaledTensor


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One planned layer as it is in memory.

    ``module``: its name in the model; ``layer``: in the checkpoint. ``backends``: in order of
    rising M. ``experts``: how many are stacked, None for a linear layer. ``bytes``: of codes and
    scales, padding included. ``updates``: times the module took new weights, one expert's or
    one stack's at a time. ``lossless`` None: nobody knew when it was planned.
    """

    module: str
    layer: str
    n: int
    k: int
    experts: int | None
    backends: tuple[str, ...]
    format: str
    scale_layout: str
    conversion: str
    lossless: bool | None
    bytes: int
    device: str
    updates: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """Every planned layer of a model; ``str()`` is for people, ``document()`` for machines."""

    layers: tuple[LayerReport, ...]
    _plans: tuple[LinearPlan, ...]

    @property
    def backends(self) -> dict[str, int]:
        """How many layers each backend serves for some M."""
        return dict(Counter(name for layer in self.layers for name in layer.backends))

    @property
    def bytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(layer.bytes for layer in self.layers)

    def document(self) -> dict[str, Any]:
        """JSON values, schema 1."""
        return {
            "schema": 1,
            "backends": self.backends,
            "bytes": self.bytes,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """One line for each kind of layer, with the reasons against every other backend."""
        megabytes = self.bytes / 1e6
        lines = [f"{len(self.layers)} planned layers, {megabytes:.1f} MB of codes and scales"]
        for group in layer_groups(self._plans):
            plan = group.plan
            chosen = ", ".join(f"{c.offer.backend} ({c.m_range})" for c in plan.choices)
            shape = f"{plan.request.n}x{plan.request.k}"
            lines.append(f"{len(group.names):5d}  {group.pattern}  {shape}  {chosen}")
            for backend, reasons in reasons_by_backend(plan.rejected):
                lines.append(f"         not {backend}: {'; '.join(dict.fromkeys(reasons))}")
        return "\n".join(lines)


def report_of(model: nn.Module) -> ModelReport:
    """What ``model``'s planned layers run now; experts are two layers, w13 and w2."""
    layers: list[LayerReport] = []
    plans: list[LinearPlan] = []
    for name, module in model.named_modules():
        if isinstance(module, BlockScaledLinear):
            found = [(module.plan, module.weight)]
        elif isinstance(module, BlockScaledExperts):
            found = [(module.plan.w13, module.w13), (module.plan.w2, module.w2)]
        else:
            continue
        layers += [_layer(name, plan, weight, module.updates) for plan, weight in found]
        plans += [plan for plan, _ in found]
    return ModelReport(tuple(layers), tuple(plans))


def _layer(module: str, plan: LinearPlan, weight: BlockScaledTensor, updates: int) -> LayerReport:
    return LayerReport(
        module=module,
        layer=plan.name,
        n=plan.request.n,
        k=plan.request.k,
        experts=plan.request.experts,
        backends=plan.backends,
        format=weight.format.name,
        scale_layout=weight.layout.name,
        conversion=plan.conversion.value,
        lossless=plan.is_lossless,
        bytes=weight.nbytes,
        device=str(weight.device),
        updates=updates,
    )
