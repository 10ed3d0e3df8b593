"""Experts are decided as sets: one backend runs all stacked weights between two permutations.

The rows of w13's product are what w2's product reads, after the activation function. Their order,
padding and slots are therefore one decision, and so is the backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.planning.decision import Obstacle, Offer, Rejection

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from blockscale.planning.request import LinearRequest


def expert_sets(requests: Iterable[LinearRequest]) -> tuple[tuple[LinearRequest, ...], ...]:
    """Requests that are decided together, in order of first appearance; dense ones alone.

    Stacks of as many experts, in the same dtypes, whose names differ in the last component are one
    set.
    """
    sets: dict[tuple[object, ...], list[LinearRequest]] = {}
    for request in requests:
        key: tuple[object, ...] = (request.name,)
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
