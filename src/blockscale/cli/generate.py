"""``blockscale generate``: load by plan, generate text."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli.options import (
    AllowLossy,
    Backends,
    CheckpointPath,
    DTypeOption,
    Json,
    policy_from,
)
from blockscale.cli.output import ExitCode, console, print_json, progress
from blockscale.errors import SettingsError
from blockscale.planning.explain import layer_count

if TYPE_CHECKING:
    from blockscale.planning.plan import ModelPlan
    from blockscale.planning.policy import PlanPolicy


def generate(
    path: CheckpointPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    dtype: DTypeOption = None,
    backend: Backends = None,
    allow_lossy: AllowLossy = False,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Run this plan (plan --layers module --save)."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Load a checkpoint by plan and continue a prompt, greedily."""
    from blockscale.checkpoint.read import read_checkpoint
    from blockscale.checkpoint.schema import read_layers

    policy = policy_from(backend, allow_lossy=allow_lossy)
    if plan_file is not None:
        _check_alone(policy)
    # Unreadable files are found here, before transformers takes seconds to import.
    count = len(read_layers(read_checkpoint(path)).quantized)

    from blockscale.integrations.transformers import generate_text, load_model

    started = time.perf_counter()
    with progress("preparing", count, unit="layers") as advance:
        loaded = load_model(
            path,
            dtype=dtype.dtype if dtype else None,
            policy=policy,
            plan=plan_file,
            progress=advance,
        )
    load_seconds = time.perf_counter() - started
    result = generate_text(loaded, path, prompt, max_new_tokens)
    backends = _backend_counts(loaded.plan)
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "text": result.text,
                "new_tokens": result.new_tokens,
                "tokens_per_second": result.new_tokens / result.seconds,
                "load_seconds": load_seconds,
                "backends": backends,
            }
        )
        return ExitCode.FINE
    out = console()
    out.print(f"{prompt}{result.text}", markup=False)
    served = ", ".join(f"{layer_count(layers)} on {name}" for name, layers in backends.items())
    out.print(
        f"\n[{result.new_tokens} tokens, {result.new_tokens / result.seconds:.1f} tokens/s; loaded "
        f"in {load_seconds:.1f} s; {served or 'no layer is quantized'}]",
        markup=False,
    )
    return ExitCode.FINE


def _check_alone(policy: PlanPolicy) -> None:
    """Raises SettingsError if options or the environment want to decide what the file has."""
    from blockscale.planning.policy import PlanPolicy

    if policy != PlanPolicy():
        msg = (
            "--plan brings its own policy; drop --backend, --allow-lossy and BLOCKSCALE_ settings, "
            "or plan again with them"
        )
        raise SettingsError(msg)


def _backend_counts(plan: ModelPlan) -> dict[str, int]:
    return dict(Counter(name for layer in plan.layers for name in layer.backends))
