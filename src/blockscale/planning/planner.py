"""The decision: ask every backend, keep every answer, take the first admissible offer.

Read ``plan_linear`` aloud: for each backend in order of preference, refuse it if the policy
excludes it, ask it, hold its offer against the policy, and keep every reason. The first offer that
serves any M is the anchor; offers before it that serve fewer M and read the very same prepared
weight take their range. Where times are known,
measured or estimated, those that read that weight share the token counts by them. Nothing here
looks at a machine, an environment or a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blockscale.errors import BackendError, PlanError, SettingsError
from blockscale.formats import K_MAJOR, PowerOfTwo, ScaleFormat
from blockscale.planning.announce import announce_plan
from blockscale.planning.decision import (
    Evidence,
    MRange,
    Obstacle,
    Offer,
    OperandForm,
    Readiness,
    Rejection,
)
from blockscale.planning.device import Verdict
from blockscale.planning.estimated import timed_for
from blockscale.planning.expert_sets import expert_sets, jointly
from blockscale.planning.explain import unservable_message
from blockscale.planning.findings import findings_of
from blockscale.planning.measured import ranges_of_set
from blockscale.planning.plan import Choice, Conversion, LinearPlan, ModelPlan
from blockscale.planning.policy import Determinism, Exactness, PlanPolicy, Proving, Strictness
from blockscale.planning.timed import in_ranges

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blockscale.planning.decision import PlannableBackend
    from blockscale.planning.device import Device, Proof
    from blockscale.planning.plan import Finding, SkippedLayer
    from blockscale.planning.request import LinearRequest
    from blockscale.planning.timed import Served, Timed


@dataclass(frozen=True, slots=True)
class ConversionStep:
    """What turns the checkpoint's weight into the form an offer wants.

    ``is_lossless`` is None where that depends on scales that nobody has read.
    """

    conversion: Conversion
    is_lossless: bool | None


def plan_linear(
    request: LinearRequest,
    device: Device,
    policy: PlanPolicy,
    backends: Sequence[PlannableBackend],
) -> LinearPlan:
    """The plan of one layer: a backend for every M, or none and the reasons.

    ``backends``: all that exist, in the registry's order; ``policy.backends`` narrows and reorders.
    Each of them is either chosen for some M or has at least one rejection in the plan.

    Raises SettingsError if the policy names a backend that does not exist; PlanError, naming every
    backend and reason, if nothing fits and ``policy.strictness`` is RAISE.
    """
    (plan,) = plan_experts([request], device, policy, backends)
    return plan


def plan_experts(
    requests: Sequence[LinearRequest],
    device: Device,
    policy: PlanPolicy,
    backends: Sequence[PlannableBackend],
) -> tuple[LinearPlan, ...]:
    """One decision for the stacked weights of one set of experts (w13 and w2).

    Their products share the tokens' order in memory, so a backend serves all of them or none, for
    the same numbers of tokens. Otherwise as ``plan_linear``.
    """
    # Who names the backends has also said in which order they are wanted.
    measurements = device.measurements if policy.backends is None else ()
    measured = ranges_of_set(requests, measurements)
    setting = _Setting(device, policy, backends, measured, tuple(requests))
    return tuple(
        _decided(request, answers, setting)
        for request, answers in zip(
            requests, _answers(requests, device, policy, backends), strict=True
        )
    )


@dataclass(frozen=True, slots=True)
class _Answers:
    """What the backends said about one request: offers in order of preference, and refusals."""

    admissible: list[Offer]
    rejected: list[Rejection]
    excluded: list[Rejection]


def _answers(
    requests: Sequence[LinearRequest],
    device: Device,
    policy: PlanPolicy,
    backends: Sequence[PlannableBackend],
) -> list[_Answers]:
    """One for each of the requests, which must be served by the same backends."""
    excluded = _excluded(backends, policy)
    answers = [_Answers([], [], excluded) for _ in requests]
    for backend in _in_order(backends, policy):
        found = [answer_of(backend, request, device, policy) for request in requests]
        for each, answer in zip(answers, jointly(requests, found), strict=True):
            if isinstance(answer, Offer):
                each.admissible.append(answer)
            else:
                each.rejected.extend(answer)
    return answers


@dataclass(frozen=True, slots=True)
class _Setting:
    """Whom and what a decision is for; ``requests``: those that are decided together."""

    device: Device
    policy: PlanPolicy
    backends: Sequence[PlannableBackend]
    measured: tuple[Timed, ...]
    requests: tuple[LinearRequest, ...]

    def times(self, preferred: Sequence[Offer]) -> tuple[Timed, ...]:
        """What the offers, all on one prepared weight, would take; empty if nothing is known."""
        if self.policy.backends is not None:
            return ()
        names = [offer.backend for offer in preferred]
        return timed_for(self.requests, self.device, names, self.backends, self.measured)


def _decided(request: LinearRequest, answers: _Answers, setting: _Setting) -> LinearPlan:
    admissible, rejected, excluded = answers.admissible, answers.rejected, answers.excluded
    anchor = next((offer for offer in admissible if offer.m_range.is_unbounded), None)
    if anchor is None:
        rejected += [_bounded_without_anchor(offer) for offer in admissible]
        plan = LinearPlan(request, (), None, Conversion.NONE, None, (*rejected, *excluded))
        if setting.policy.strictness is Strictness.RAISE:
            raise PlanError(unservable_message(plan, setting.device))
        return plan
    sharing = [offer for offer in admissible if offer.weight == anchor.weight]
    times = setting.times(sharing)
    choices = _cover(sharing, times)
    rejected += _not_chosen(admissible, choices, anchor, _Ranking(request, times))
    step = conversion_step(request, anchor.weight)
    return LinearPlan(
        request,
        choices,
        anchor.weight,
        step.conversion,
        step.is_lossless,
        (*rejected, *excluded),
    )


def plan_model(
    requests: Iterable[LinearRequest],
    device: Device,
    policy: PlanPolicy,
    backends: Sequence[PlannableBackend],
    *,
    skipped: Sequence[SkippedLayer] = (),
    findings: Sequence[Finding] = (),
) -> ModelPlan:
    """Plans for all layers of a checkpoint, with findings about what the policy gave up.

    Layers that differ only in name are decided once, and so are the weights of one set of experts.
    Raises as ``plan_linear`` does.
    """
    decided: dict[tuple[LinearRequest, ...], tuple[LinearPlan, ...]] = {}
    asked = tuple(requests)
    planned: dict[LinearRequest, LinearPlan] = {}
    for together in expert_sets(asked):
        nameless = tuple(replace(request, name="") for request in together)
        plans = decided.get(nameless)
        if plans is None:
            plans = plan_experts(nameless, device, policy, backends)
            decided[nameless] = plans
        planned.update(
            (request, replace(plan, request=request))
            for request, plan in zip(together, plans, strict=True)
        )
    layers = [planned[request] for request in asked]
    lenient = replace(policy, strictness=Strictness.REPORT)
    if_powers_of_two: dict[LinearRequest, LinearPlan] = {}
    for nameless, plans in decided.items():
        if any(r.obstacle is Obstacle.UNVERIFIED_SCALES for plan in plans for r in plan.rejected):
            known = [replace(request, power_of_two=PowerOfTwo.YES) for request in nameless]
            then = plan_experts(known, device, lenient, backends)
            if_powers_of_two.update(zip(nameless, then, strict=True))
    found = (*findings, *findings_of(layers, if_powers_of_two))
    plan_of_all = ModelPlan(device, policy, tuple(layers), tuple(skipped), found)
    announce_plan(plan_of_all)
    return plan_of_all


def conversion_step(request: LinearRequest, target: OperandForm) -> ConversionStep:
    """What ``prepare`` must do to bring the checkpoint's weight into ``target``.

    Checkpoints store scales in ``K_MAJOR``. Restating a scale that the new format holds exactly and
    repeating it for smaller blocks change no value: that is a relayout. Anything else requantizes.
    """
    source = request.format
    if source == target.format:
        unchanged = target.layout == K_MAJOR
        return ConversionStep(
            Conversion.NONE if unchanged else Conversion.RELAYOUT, is_lossless=True
        )
    wanted = target.format
    refines = source.block.mn % wanted.block.mn == 0 and source.block.k % wanted.block.k == 0
    if source.element != wanted.element or not refines:
        return ConversionStep(Conversion.REQUANTIZE, is_lossless=False)
    if wanted.scale is source.scale or wanted.scale is ScaleFormat.FP32:
        return ConversionStep(Conversion.RELAYOUT, is_lossless=True)
    if wanted.scale is ScaleFormat.UE8M0 and request.power_of_two is not PowerOfTwo.NO:
        if request.power_of_two is PowerOfTwo.YES:
            return ConversionStep(Conversion.RELAYOUT, is_lossless=True)
        return ConversionStep(Conversion.REQUANTIZE, is_lossless=None)
    return ConversionStep(Conversion.REQUANTIZE, is_lossless=False)


def _in_order(backends: Sequence[PlannableBackend], policy: PlanPolicy) -> list[PlannableBackend]:
    if policy.backends is None:
        return list(backends)
    by_name = {backend.name: backend for backend in backends}
    unknown = [name for name in policy.backends if name not in by_name]
    if unknown:
        msg = f"no backend is called {', '.join(unknown)}; known: {', '.join(by_name)}"
        raise SettingsError(msg)
    return [by_name[name] for name in dict.fromkeys(policy.backends)]


def _excluded(backends: Sequence[PlannableBackend], policy: PlanPolicy) -> list[Rejection]:
    if policy.backends is None:
        return []
    reason = f"the policy allows only {', '.join(policy.backends)}"
    return [
        Rejection(backend.name, Obstacle.EXCLUDED_BY_POLICY, reason)
        for backend in backends
        if backend.name not in policy.backends
    ]


def answer_of(
    backend: PlannableBackend, request: LinearRequest, device: Device, policy: PlanPolicy
) -> Offer | list[Rejection]:
    """A backend's answer under a policy and what the probe found: an offer, or all reasons.

    Raises BackendError for what is no answer: backends of other packages are anybody's.
    """
    answer = backend.evaluate(request, device)
    _check_answer(backend.name, answer)
    proofs = _proofs(backend.name, request, device, answer)
    rejections = _against_proofs(backend.name, proofs, policy)
    if not isinstance(answer, Offer):
        return [*answer, *rejections]
    rejections += _against_policy(answer, request, policy)
    # On a real machine (one whose packages were listed) a plan is a promise to run.
    if answer.readiness is Readiness.PLAN_ONLY and device.packages is not None:
        reason = "its gates are known, but blockscale cannot run it yet"
        rejections.append(Rejection(backend.name, Obstacle.NO_RUN, reason))
    if answer.readiness is Readiness.ONCE_PROVEN and device.packages is not None:
        reason = "runs only where it was proven, which it was not here (blockscale doctor --probe)"
        rejections.append(Rejection(backend.name, Obstacle.NOT_PROVEN, reason))
    if rejections:
        return rejections
    if all(proof is not None for proof in proofs):
        return replace(answer, evidence=Evidence.PROVEN)
    return answer


def _check_answer(backend: str, answer: object) -> None:
    if isinstance(answer, Offer):
        if answer.backend != backend:
            msg = f"backend {backend} offers as {answer.backend!r}; an offer has its backend's name"
            raise BackendError(msg)
    elif not (
        isinstance(answer, Sequence)
        and answer
        and all(isinstance(reason, Rejection) for reason in answer)
    ):
        msg = (
            f"backend {backend} answers {str(answer)[:80]!r} when it is asked for a layer; "
            "evaluate gives an Offer, or at least one Rejection"
        )
        raise BackendError(msg)


def _proofs(
    backend: str, request: LinearRequest, device: Device, answer: Offer | Sequence[Rejection]
) -> list[Proof | None]:
    """What was found about the products of this layer: of experts, in each arrangement of rows.

    A backend that failed with dense layers is not trusted with experts either.
    """
    dense = device.proof(backend, request.out_dtype)
    if request.experts is None or not isinstance(answer, Offer):
        return [dense]
    arrangements = dict.fromkeys(rows.arrangement for rows in answer.rows)
    proofs = [device.proof(backend, request.out_dtype, how) for how in arrangements]
    if dense is not None and dense.verdict is Verdict.FAILED:
        proofs.append(dense)
    return proofs or [dense]


def _against_proofs(
    backend: str, proofs: Sequence[Proof | None], policy: PlanPolicy
) -> list[Rejection]:
    rejections = []
    for proof in proofs:
        if proof is not None and proof.verdict is Verdict.FAILED:
            experts = f" with {proof.arrangement.value} experts" if proof.arrangement else ""
            reason = f"failed the probe on this device{experts}: {proof.detail}"
            rejections.append(Rejection(backend, Obstacle.FAILED_PROBE, reason))
    if None in proofs and policy.proving is Proving.REQUIRED:
        reason = "never proven on this device, and the policy requires it (doctor --probe proves)"
        rejections.append(Rejection(backend, Obstacle.NOT_PROVEN, reason))
    return rejections


def _against_policy(offer: Offer, request: LinearRequest, policy: PlanPolicy) -> list[Rejection]:
    rejections = []
    if policy.determinism is Determinism.REQUIRED and not offer.is_deterministic:
        reason = "its sums depend on timing; the policy requires the same bits on every run"
        rejections.append(Rejection(offer.backend, Obstacle.NOT_DETERMINISTIC, reason))
    step = conversion_step(request, offer.weight)
    if step.is_lossless is not True and policy.exactness is Exactness.EXACT:
        rejections.append(_not_exact(offer, step, request))
    return rejections


def _not_exact(offer: Offer, step: ConversionStep, request: LinearRequest) -> Rejection:
    if step.is_lossless is None:
        return Rejection(
            offer.backend,
            Obstacle.UNVERIFIED_SCALES,
            f"reads {offer.weight.format.scale.value} scales; whether the checkpoint's "
            f"{request.format.scale.value} scales are powers of two is unknown until they are read "
            "(plan --read-scales, verify), and the policy is exact",
        )
    return Rejection(
        offer.backend,
        Obstacle.LOSSY_CONVERSION,
        f"reads {offer.weight.format}; requantizing from {request.format} changes values (about "
        "2.6 % on normal weights) and the policy is exact (--allow-lossy permits it)",
    )


def _cover(candidates: Sequence[Offer], times: Sequence[Timed]) -> tuple[Choice, ...]:
    """Every M from 0 up goes to one of the offers, all on the same weight, that serve it.

    By their times, where there are some, else to the most preferred.
    """
    ranges = in_ranges(times, [offer.backend for offer in candidates])
    starts = {1, *(one.min_m for one in ranges)}
    for offer in candidates:
        starts.add(max(1, offer.m_range.min_m))
        if offer.m_range.max_m is not None:
            starts.add(offer.m_range.max_m + 1)
    served: list[tuple[int, Offer, str]] = []
    for start in sorted(starts):
        serving = [offer for offer in candidates if offer.m_range.contains(start)]
        offer, reason = _best(serving, start, ranges, times)
        if not served or served[-1][1] is not offer:
            served.append((start, offer, reason))
        elif not served[-1][2]:
            served[-1] = (served[-1][0], offer, reason)
    ends = [start - 1 for start, _, _ in served[1:]]
    # M = 0 launches nothing, so the first range includes it.
    return tuple(
        Choice(MRange(start if index else 0, end), offer, reason)
        for index, ((start, offer, reason), end) in enumerate(
            zip(served, [*ends, None], strict=True)
        )
    )


def _best(
    serving: Sequence[Offer], m: int, ranges: Sequence[Served], times: Sequence[Timed]
) -> tuple[Offer, str]:
    """Who serves ``m`` tokens, and why; a bounded offer may not be there where it would be best."""
    chosen = next((one for one in reversed(ranges) if one.min_m <= m), None)
    if chosen is None:
        return serving[0], ""
    for offer in serving:
        if offer.backend == chosen.backend:
            return offer, chosen.reason
    here = next(one.time_us for one in reversed(times) if one.min_m <= m)
    timed = [offer for offer in serving if offer.backend in here]
    return (min(timed, key=lambda offer: here[offer.backend]) if timed else serving[0]), ""


@dataclass(frozen=True, slots=True)
class _Ranking:
    """What the choice among admissible offers went by."""

    request: LinearRequest
    times: Sequence[Timed]

    def order_words(self, backend: str, were: str) -> str:
        """Why others serve and this one does not, where there are times."""
        if not any(backend in one.time_us for one in self.times):
            basis = "estimated" if self.times[0].estimated else "measured"
            return f"{were} {basis}, and it was not"
        is_estimated = any(backend in one.estimated for one in self.times)
        return f"{were} {'estimated' if is_estimated else 'measured'} faster"


def _not_chosen(
    offers: Sequence[Offer], choices: Sequence[Choice], anchor: Offer, ranking: _Ranking
) -> list[Rejection]:
    """Why each admissible offer that serves no M was left out."""
    chosen = {choice.offer.backend for choice in choices}
    ahead_of_anchor = offers[: offers.index(anchor)]
    rejections = []
    for offer in offers:
        if offer.backend in chosen:
            continue
        if offer in ahead_of_anchor and offer.weight != anchor.weight:
            rejections.append(_second_copy(offer, anchor, ranking.request))
            continue
        names = list(dict.fromkeys(c.offer.backend for c in choices))
        verb = "comes" if len(names) == 1 else "come"
        order = f"{verb} earlier in the order of preference"
        if ranking.times and offer.weight == anchor.weight:
            order = ranking.order_words(offer.backend, "was" if len(names) == 1 else "were")
        reason = f"would serve it too, but {' and '.join(names)} {order}"
        rejections.append(Rejection(offer.backend, Obstacle.OUTRANKED, reason))
    return rejections


def _second_copy(offer: Offer, anchor: Offer, request: LinearRequest) -> Rejection:
    experts = request.experts or 1
    stored = offer.weight.layout.stored(request.n, request.k, offer.weight.format)
    extra = stored.bytes * experts
    if not _shares_data(request, offer.weight, anchor.weight):
        extra += request.weight_bytes
    return Rejection(
        offer.backend,
        Obstacle.WEIGHT_FORM,
        f"serves {offer.m_range} but reads {offer.weight.format} scales in {offer.weight.layout}, "
        f"unlike {anchor.backend}; a second prepared copy would cost {extra} bytes",
        extra,
    )


def _shares_data(request: LinearRequest, one: OperandForm, other: OperandForm) -> bool:
    """Whether both forms keep the checkpoint's codes, so that only scales would be copied."""
    return all(
        conversion_step(request, form).conversion is not Conversion.REQUANTIZE
        for form in (one, other)
    )


def _bounded_without_anchor(offer: Offer) -> Rejection:
    return Rejection(
        offer.backend,
        Obstacle.M_RANGE,
        f"serves only {offer.m_range}, and no other backend serves the rest",
    )
