"""The decision: ask every backend, keep every answer, take the first admissible offer.

Read ``plan_linear`` aloud: for each backend in order of preference, refuse it if the policy excludes
it, ask it, hold its offer against the policy, and keep every reason. The first offer that serves any
M is the anchor; offers before it that serve fewer M and read the very same prepared weight take
their range. Nothing here looks at a machine, an environment or a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from blockscale.errors import PlanError
from blockscale.formats import K_MAJOR, PowerOfTwo, ScaleFormat
from blockscale.planning.decision import (
    MRange,
    Obstacle,
    Offer,
    OperandForm,
    PlannableBackend,
    Readiness,
    Rejection,
)
from blockscale.planning.device import Device, Verdict
from blockscale.planning.plan import (
    Choice,
    Conversion,
    Finding,
    LinearPlan,
    ModelPlan,
    Severity,
    SkippedLayer,
)
from blockscale.planning.policy import Determinism, Exactness, PlanPolicy, Strictness
from blockscale.planning.request import LinearRequest


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
    Raises PlanError, naming every backend and reason, if nothing fits and the policy is strict.
    """
    admissible: list[Offer] = []
    rejected: list[Rejection] = []
    for backend in _in_order(backends, policy):
        answer = _answer(backend, request, device, policy)
        if isinstance(answer, Offer):
            admissible.append(answer)
        else:
            rejected.extend(answer)
    rejected += _excluded(backends, policy)
    anchor = next((offer for offer in admissible if _is_unbounded(offer.m_range)), None)
    if anchor is None:
        rejected += [_bounded_without_anchor(offer) for offer in admissible]
        plan = LinearPlan(request, (), None, Conversion.NONE, None, tuple(rejected))
        if policy.strictness is Strictness.RAISE:
            raise PlanError(unservable_message(plan, device))
        return plan
    choices, shadowed = _cover(admissible, anchor, request)
    step = conversion_step(request, anchor.weight)
    return LinearPlan(
        request,
        choices,
        anchor.weight,
        step.conversion,
        step.is_lossless,
        tuple(rejected + shadowed),
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

    Layers that differ only in name are decided once. Raises PlanError as ``plan_linear`` does.
    """
    decided: dict[LinearRequest, LinearPlan] = {}
    layers: list[LinearPlan] = []
    for request in requests:
        nameless = replace(request, name="")
        plan = decided.get(nameless)
        if plan is None:
            plan = plan_linear(request, device, policy, backends)
            decided[nameless] = plan
        layers.append(replace(plan, request=request))
    found = [*findings, *_unservable_findings(layers), *_unverified_findings(layers, policy)]
    return ModelPlan(device, policy, tuple(layers), tuple(skipped), tuple(found))


def conversion_step(request: LinearRequest, target: OperandForm) -> ConversionStep:
    """What ``prepare`` must do to bring the checkpoint's weight into ``target``.

    Checkpoints store scales in ``K_MAJOR``. Restating a scale that the new format holds exactly and
    repeating it for smaller blocks change no value: that is a relayout. Anything else requantizes.
    """
    source = request.format
    if source == target.format:
        unchanged = target.layout == K_MAJOR
        return ConversionStep(Conversion.NONE if unchanged else Conversion.RELAYOUT, True)
    refines = (
        source.block.mn % target.format.block.mn == 0 and source.block.k % target.format.block.k == 0
    )
    if source.element != target.format.element or not refines:
        return ConversionStep(Conversion.REQUANTIZE, False)
    if target.format.scale is source.scale or target.format.scale is ScaleFormat.FP32:
        return ConversionStep(Conversion.RELAYOUT, True)
    if request.power_of_two is PowerOfTwo.YES:
        return ConversionStep(Conversion.RELAYOUT, True)
    unknown = request.power_of_two is PowerOfTwo.UNKNOWN
    return ConversionStep(Conversion.REQUANTIZE, None if unknown else False)


def unservable_message(plan: LinearPlan, device: Device) -> str:
    """Why no backend serves a layer: what was asked, then every backend with every reason."""
    request = plan.request
    asked = (
        f"no backend serves layer {request.name!r} (N={request.n}, K={request.k}, {request.format}, "
        f"{request.activation_dtype.value} to {request.out_dtype.value}) on {device.name}"
    )
    by_backend: dict[str, list[str]] = {}
    for rejection in plan.rejected:
        by_backend.setdefault(rejection.backend, []).append(rejection.reason)
    reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in by_backend.items())
    return f"{asked}: {reasons}"


def _in_order(
    backends: Sequence[PlannableBackend], policy: PlanPolicy
) -> list[PlannableBackend]:
    if policy.backends is None:
        return list(backends)
    by_name = {backend.name: backend for backend in backends}
    unknown = [name for name in policy.backends if name not in by_name]
    if unknown:
        msg = f"the policy names unknown backends {unknown}; known: {', '.join(by_name)}"
        raise PlanError(msg)
    return [by_name[name] for name in policy.backends]


def _excluded(backends: Sequence[PlannableBackend], policy: PlanPolicy) -> list[Rejection]:
    if policy.backends is None:
        return []
    allowed = ", ".join(policy.backends)
    return [
        Rejection(
            backend.name,
            Obstacle.EXCLUDED_BY_POLICY,
            f"the policy allows only {allowed}",
        )
        for backend in backends
        if backend.name not in policy.backends
    ]


def _answer(
    backend: PlannableBackend, request: LinearRequest, device: Device, policy: PlanPolicy
) -> Offer | list[Rejection]:
    answer = backend.evaluate(request, device)
    rejections = [] if isinstance(answer, Offer) else list(answer)
    proof = device.proof(backend.name, request.out_dtype)
    if proof is not None and proof.verdict is Verdict.FAILED:
        rejections.append(Rejection(backend.name, Obstacle.FAILED_PROBE, proof.detail))
    if isinstance(answer, Offer):
        rejections += _against_policy(answer, request, policy)
        if answer.readiness is Readiness.PLAN_ONLY and device.packages is not None:
            reason = "its gates are known, but blockscale cannot run it yet"
            rejections.append(Rejection(backend.name, Obstacle.NO_RUN, reason))
        if not rejections:
            return answer
    return rejections


def _against_policy(offer: Offer, request: LinearRequest, policy: PlanPolicy) -> list[Rejection]:
    rejections = []
    if policy.determinism is Determinism.REQUIRED and not offer.is_deterministic:
        rejections.append(
            Rejection(
                offer.backend,
                Obstacle.NOT_DETERMINISTIC,
                "its sums depend on timing; the policy requires the same bits on every run",
            )
        )
    step = conversion_step(request, offer.weight)
    if step.is_lossless is not True and policy.exactness is Exactness.EXACT:
        rejections.append(_lossy(offer, step))
    return rejections


def _lossy(offer: Offer, step: ConversionStep) -> Rejection:
    wanted = offer.weight.format
    if step.is_lossless is None:
        return Rejection(
            offer.backend,
            Obstacle.UNVERIFIED_SCALES,
            f"wants {wanted.scale.value} scales; whether these float32 scales are powers of two "
            "is unknown until they are read (plan --read-scales, verify), and the policy is exact",
        )
    return Rejection(
        offer.backend,
        Obstacle.LOSSY_CONVERSION,
        f"wants {wanted}; requantizing would change the weights by about 2.6 % and the policy is "
        "exact (--allow-lossy permits it)",
    )


def _is_unbounded(m_range: MRange) -> bool:
    return m_range.max_m is None and m_range.min_m <= 1


def _cover(
    offers: Sequence[Offer], anchor: Offer, request: LinearRequest
) -> tuple[tuple[Choice, ...], list[Rejection]]:
    """Split all M among the anchor and preferred offers with the same prepared weight."""
    taken: list[Choice] = []
    shadowed: list[Rejection] = []
    for offer in offers[: offers.index(anchor)]:
        if offer.weight != anchor.weight:
            shadowed.append(_second_copy(offer, anchor, request))
            continue
        last = offer.m_range.max_m
        free = last is not None and all(
            last < choice.m_range.min_m or offer.m_range.min_m > (choice.m_range.max_m or 0)
            for choice in taken
        )
        if free:
            taken.append(Choice(offer.m_range, offer))
    taken.sort(key=lambda choice: choice.m_range.min_m)
    return _fill_gaps(taken, anchor), shadowed


def _fill_gaps(taken: Sequence[Choice], anchor: Offer) -> tuple[Choice, ...]:
    choices: list[Choice] = []
    next_m = 0
    for choice in taken:
        if choice.m_range.min_m > max(next_m, 1):
            choices.append(Choice(MRange(next_m, choice.m_range.min_m - 1), anchor))
            next_m = choice.m_range.min_m
        # M = 0 launches nothing, so the first range may as well include it.
        start = 0 if next_m == 0 else choice.m_range.min_m
        choices.append(Choice(MRange(start, choice.m_range.max_m), choice.offer))
        next_m = (choice.m_range.max_m or 0) + 1
    choices.append(Choice(MRange(next_m, None), anchor))
    return tuple(choices)


def _second_copy(offer: Offer, anchor: Offer, request: LinearRequest) -> Rejection:
    stored = offer.weight.layout.stored(request.n, request.k, offer.weight.format)
    copies = request.experts or 1
    same_data = offer.weight.format.block == anchor.weight.format.block
    extra = stored.bytes * copies + (0 if same_data else request.weight_bytes)
    return Rejection(
        offer.backend,
        Obstacle.WEIGHT_FORM,
        f"serves {offer.m_range} but reads {offer.weight.format} in {offer.weight.layout}, unlike "
        f"{anchor.backend}; a second prepared copy would cost {extra} bytes",
    )


def _bounded_without_anchor(offer: Offer) -> Rejection:
    return Rejection(
        offer.backend,
        Obstacle.M_RANGE,
        f"serves only {offer.m_range}, and no other backend serves the rest",
    )


def _unservable_findings(layers: Iterable[LinearPlan]) -> list[Finding]:
    return [
        Finding(
            Severity.FAULT,
            "unservable",
            "no backend serves this layer; see its rejections",
            plan.name,
        )
        for plan in layers
        if not plan.is_servable
    ]


def _unverified_findings(layers: Iterable[LinearPlan], policy: PlanPolicy) -> list[Finding]:
    """One finding for each backend that unread scales kept out, not one for each layer."""
    if policy.exactness is not Exactness.EXACT:
        return []
    kept_out: Counter[str] = Counter()
    for plan in layers:
        obstacles: dict[str, set[Obstacle]] = {}
        for rejection in plan.rejected:
            obstacles.setdefault(rejection.backend, set()).add(rejection.obstacle)
        for backend, found in obstacles.items():
            if found == {Obstacle.UNVERIFIED_SCALES}:
                kept_out[backend] += 1
    return [
        Finding(
            Severity.NOTE,
            "scales_unread",
            f"{backend} would serve {count} more layers if their scales are powers of two: read "
            "them with plan --read-scales or verify; --allow-lossy converts them in any case",
        )
        for backend, count in kept_out.items()
    ]
