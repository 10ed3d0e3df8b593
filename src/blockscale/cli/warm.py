"""``blockscale warm``: build a plan file's kernels before the first request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockscale.cli.options import Json
from blockscale.cli.output import ExitCode, console, print_json, progress, table
from blockscale.errors import PlanMismatchError


def warm(
    file: Annotated[Path, typer.Argument(metavar="PLAN_FILE", help="Written by plan --save.")],
    only_list: Annotated[
        bool, typer.Option("--list", help="Show the kernels; build nothing.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Run every distinct kernel of a plan file once on this machine, so that later calls are fast.

    The checkpoint is not needed: weights are made up.
    """
    from blockscale.checkpoint.plan_file import read_plan
    from blockscale.planning.warm_up import kernel_document, warm_up_of

    saved = read_plan(file)
    found = warm_up_of(saved.plan)
    calls = 0
    if not only_list:
        from blockscale.modules.warm import warm as run
        from blockscale.probe import detect_device

        device = detect_device()
        if device.architecture != saved.plan.device.architecture:
            planned = saved.plan.device.architecture
            reason = f"planned for {planned}, this is {device.architecture}"
            raise PlanMismatchError(str(file), [reason])
        with progress("warming", len(found.plans), unit="kernels") as advance:
            calls = run(found.plans, "cpu" if device.is_cpu else "cuda", advance)
    if as_json:
        kernels = [kernel_document(kernel) for kernel in found.kernels]
        print_json({"kernels": kernels, "calls": calls})
        return ExitCode.FINE
    out = console()
    rows = table("backend", "N", "K", "dtype", "M", "layers", numbers=("N", "K", "layers"))
    for kernel in found.kernels:
        shape = f"{kernel.experts} x {kernel.n}" if kernel.experts else str(kernel.n)
        dtype = f"{kernel.activation_dtype.value} to {kernel.out_dtype.value}"
        rows.add_row(
            kernel.backend, shape, str(kernel.k), dtype, str(kernel.m_range), str(kernel.layers)
        )
    out.print(rows)
    done = "listed, none built" if only_list else f"built and run, {calls} calls"
    out.print(f"\n{len(found.kernels)} kernels {done}")
    return ExitCode.FINE
