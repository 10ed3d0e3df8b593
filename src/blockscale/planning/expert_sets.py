"""Experts are decided as sets: one backend runs all stacked weights between two permutations.

The rows of w13's product are what w2's product reads, after the activation function. Their order,
padding and slots are therefore one decision, and so is the backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.errors import PlanError
from blockscale.planning.decision import Obstacle, Offer, Rejection

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from blockscale.planning.plan import LinearPlan, ModelPlan
    from blockscale.planning.request import LinearRequest

W13, W2 = "w13", "w2"


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """The plans of gate and up together (``w13``) and down (``w2``) of one set of experts.

    Raises PlanError if they are not those of one set, decided together.
    """

    w13: LinearPlan
    w2: LinearPlan

    def __post_init__(self) -> None:
        """Compare shapes, dtypes and choices."""
        up, down = self.w13.request, self.w2.request
        shapes = f"w13 is {up.experts} x {up.n} x {up.k}, w2 {down.experts} x {down.n} x {down.k}"
        if up.experts is None or (up.experts, up.n, up.k) != (down.experts, 2 * down.k, down.n):
            msg = f"{self.name!r} is no set of experts with gate, up and down: {shapes}"
            raise PlanError(msg)
        dtypes = {up.activation_dtype, up.out_dtype, down.activation_dtype, down.out_dtype}
        if len(dtypes) > 1:
            names = ", ".join(sorted(dtype.value for dtype in dtypes))
            msg = f"experts {self.name!r} run in one dtype from end to end, not in {names}"
            raise PlanError(msg)
        if self._served(self.w13) != self._served(self.w2):
            msg = f"the weights of experts {self.name!r} were not planned together (plan_experts)"
            raise PlanError(msg)

    @property
    def name(self) -> str:
        """What comes before ``.w13`` and ``.w2``."""
        return self.w13.name.rpartition(".")[0]

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.w13.request.experts or 0

    @staticmethod
    def _served(plan: LinearPlan) -> list[object]:
        return [(c.m_range, c.offer.backend, c.offer.rows) for c in plan.choices]


def experts_plan(plan: ModelPlan, name: str) -> ExpertsPlan:
    """The plans of the experts called ``name``. Raises KeyError if there are none."""
    return ExpertsPlan(plan.layer(f"{name}.{W13}"), plan.layer(f"{name}.{W2}"))


def expert_sets(requests: Iterable[LinearRequest]) -> tuple[tuple[LinearRequest, ...], ...]:
    """Requests that are decided together, in order of first appearance; dense ones alone.

    Stacks of as many experts, in the same dtypes, whose names differ in the last component are one
    set.
    """
    sets: dict[tuple[object, ...], list[LinearRequest]] = {}
    for request in requests:
        key: tuple[object, ...] = (request,)
        if request.experts is not None:
            prefix = request.name.rpartition(".")[0]
            key = (prefix, request.experts, request.activation_dtype, request.out_dtype)
        sets.setdefault(key, []).append(request)
    return tuple(tuple(together) for together in sets.values())


def jointly(
    requests: Sequence[LinearRequest], answers: Sequence[Offer | list[Rejection]]
) -> list[Offer | list[Rejection]]:
    """One backend's answers to a set: offers only if it serves every member in the same way."""
    offers = [answer for answer in answers if isinstance(answer, Offer)]
    refusing = [
        request
        for request, answer in zip(requests, answers, strict=True)
        if not isinstance(answer, Offer)
    ]
    if refusing:
        shape = f"N={refusing[0].n} K={refusing[0].k}"
        reason = f"cannot run the experts' other weight ({shape}), and one backend runs both"
    elif len({(offer.m_range, offer.rows) for offer in offers}) > 1:
        reason = "serves the weights of these experts for different numbers of tokens"
    else:
        return list(answers)
    return [
        [Rejection(answer.backend, Obstacle.EXPERT_SET, reason)]
        if isinstance(answer, Offer)
        else answer
        for answer in answers
    ]
