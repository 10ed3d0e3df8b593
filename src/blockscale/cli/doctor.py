"""``blockscale doctor``: this machine, and what each backend could do on it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockscale.cli.options import Json, device_from
from blockscale.cli.output import (
    ExitCode,
    console,
    print_json,
    progress,
    table,
)
from blockscale.formats import DType
from blockscale.planning.explain import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from blockscale.planning.decision import PlannableBackend
    from blockscale.planning.device import Device, Proof

# A layer that no shape gate refuses: what is left is about machine, packages and dtypes.
EXAMPLE_N, EXAMPLE_K = 4096, 4096


def doctor(
    device: Annotated[
        str | None,
        typer.Option(help="cpu, sm_80 ... sm_121; default: this machine.", show_default=False),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Test each backend's numbers here, and keep what was found."),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="End --probe after so long, and keep what was found; default: to its end.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Show the device, and for each backend whether it can serve it, or why not."""
    from blockscale.backends.registry import all_backends

    if probe:
        _probe(device, seconds)
    target = device_from(device)
    answers = [_answers(backend, target) for backend in all_backends()]
    if as_json:
        print_json(
            {
                "device": _device_document(target),
                "backends": answers,
                "proofs": [_proof_document(proof) for proof in target.proofs],
            }
        )
        return ExitCode.FINE
    out = console()
    out.print(_device_words(target))
    if target.packages is not None:
        out.print(
            "installed: " + ", ".join(f"{name} {version}" for name, version in target.packages),
            soft_wrap=True,
        )
    out.print()
    dtypes = list(answers[0]["dtypes"])
    rows = table("backend", *dtypes, "state", "why not")
    for answer in answers:
        rows.add_row(
            answer["backend"],
            *("yes" if answer["dtypes"][dtype] else "-" for dtype in dtypes),
            answer["state"] or "",
            "\n".join(_decisive(answer["reasons"])),
        )
    out.print(rows)
    _print_proofs(out, target)
    out.print(
        f"\nasked for N={EXAMPLE_N}, K={EXAMPLE_K}, 128x128 blocks; a layer may fail on shape"
    )
    return ExitCode.FINE


def _probe(device: str | None, seconds: float | None) -> None:
    """Test every runnable backend in processes of their own; the next lines read what was kept."""
    from blockscale.backends.registry import all_backends
    from blockscale.errors import SettingsError
    from blockscale.probe.machine import read_machine
    from blockscale.probe.proving import Pace, keep_proof, proof_count, proofs_path, prove
    from blockscale.probe.tuning import make_room

    if device is not None:
        msg = f"--probe tests this machine; it cannot test the invented device {device!r}"
        raise SettingsError(msg)
    machine = read_machine()
    make_room(proofs_path(machine))
    with progress("probing", proof_count(all_backends()), unit="proofs") as advance:

        def report(proof: Proof) -> None:
            keep_proof(machine, proof)
            advance(1)
            if not sys.stderr.isatty():
                print(f"{proof.words}: {proof.detail}", file=sys.stderr, flush=True)

        prove(all_backends(), pace=Pace.on(machine, seconds), report=report)


def _print_proofs(out: Console, device: Device) -> None:
    if not device.proofs:
        if device.packages is not None:
            out.print("\nnothing proven on this machine yet: blockscale doctor --probe")
        return
    rows = table("probed", "layers", "output", "verdict", "detail")
    for proof in device.proofs:
        layers = "dense" if proof.arrangement is None else f"{proof.arrangement.value} experts"
        rows.add_row(
            proof.backend, layers, proof.out_dtype.value, proof.verdict.value, proof.detail
        )
    out.print()
    out.print(rows)


def _answers(backend: PlannableBackend, device: Device) -> dict[str, Any]:
    """For each output dtype whether the backend offers, and the reasons where it never does."""
    from blockscale.formats import PowerOfTwo
    from blockscale.planning.decision import Offer
    from blockscale.planning.explain import offer_words

    dtypes: dict[str, bool] = {}
    state: str | None = None
    reasons: dict[str, dict[str, str]] = {}
    for dtype in DType:
        answer = _evaluated(backend, device, dtype, PowerOfTwo.YES)
        dtypes[dtype.value] = isinstance(answer, Offer)
        if isinstance(answer, Offer):
            state = state or offer_words(answer)
        else:
            for rejection in answer:
                reasons[rejection.reason] = {
                    "obstacle": rejection.obstacle.value,
                    "reason": rejection.reason,
                }
    return {
        "backend": backend.name,
        "dtypes": dtypes,
        "state": state,
        "reasons": [] if any(dtypes.values()) else list(reasons.values()),
    }


def _decisive(reasons: list[dict[str, str]]) -> list[str]:
    """What a person would act on: on a wrong architecture nothing else matters."""
    wrong = [reason["reason"] for reason in reasons if reason["obstacle"] == "architecture"]
    return wrong or [reason["reason"] for reason in reasons]


def _evaluated(backend: PlannableBackend, device: Device, dtype: Any, power_of_two: Any) -> Any:  # noqa: ANN401 - enums imported late
    from blockscale.formats import FP8_128X128_FP32
    from blockscale.planning.request import LinearRequest

    request = LinearRequest(
        "example", EXAMPLE_N, EXAMPLE_K, FP8_128X128_FP32, dtype, dtype, power_of_two
    )
    return backend.evaluate(request, device)


def _device_words(device: Device) -> str:
    if device.is_cpu:
        return device.name
    words = [f"{device.name} ({device.architecture})"]
    if device.sm_count:
        words.append(f"{device.sm_count} SMs")
    if device.memory_bytes:
        words.append(human_bytes(device.memory_bytes))
    if device.cuda:
        words.append(f"CUDA {device.cuda[0]}.{device.cuda[1]}")
    return ", ".join(words)


def _proof_document(proof: Proof) -> dict[str, str | None]:
    return {
        "backend": proof.backend,
        "out_dtype": proof.out_dtype.value,
        "verdict": proof.verdict.value,
        "detail": proof.detail,
        "arrangement": proof.arrangement.value if proof.arrangement is not None else None,
    }


def _device_document(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "architecture": device.architecture,
        "sm_count": device.sm_count,
        "memory_bytes": device.memory_bytes,
        "cuda": list(device.cuda) if device.cuda else None,
        "packages": dict(device.packages) if device.packages is not None else None,
    }
