"""The ``blockscale`` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

import blockscale
from blockscale.cli import (
    advise,
    convert,
    doctor,
    generate,
    inspect,
    plan,
    quantize,
    tune,
    verify,
    warm,
)
from blockscale.cli.output import ExitCode, error_line
from blockscale.errors import BlockscaleError

app = typer.Typer(
    name="blockscale",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("doctor")(doctor.doctor)
app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("advise")(advise.advise)
app.command("quantize")(quantize.quantize)
app.command("convert")(convert.convert)
app.command("verify")(verify.verify)
app.command("generate")(generate.generate)
app.command("tune")(tune.tune)
app.command("warm")(warm.warm)


# What commands import when they run, and what brings it.
INSTALL = {
    "torch": "torch (inspect and verify work without, as do plan and advise with --device)",
    "transformers": "'blockscale[transformers]'",
    "accelerate": "'blockscale[transformers]'",
}


def _print_version(asked: bool) -> None:
    if asked:
        print(f"blockscale {blockscale.__version__}")
        raise typer.Exit


@app.callback()
def _blockscale(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Plan, prepare and run block-scaled FP8 linear layers."""


def _interrupted() -> NoReturn:
    error_line("interrupted; nothing half-written was left behind, and the same command goes on")
    sys.exit(ExitCode.INTERRUPTED)


def _reader_left() -> NoReturn:
    """The reader closed the pipe (`| head`): not our error; stdout must not be flushed again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]  # a pipe was there
    sys.exit(ExitCode.FINE)


def _needs(error: ModuleNotFoundError) -> None:
    """One line for a package that a user may well be without; any other is our own fault."""
    package = (error.name or "").partition(".")[0]
    if package not in INSTALL:
        raise error
    error_line(
        f"this command needs {package}, which is not installed: pip install {INSTALL[package]}"
    )


def _command(error: TyperException) -> str:
    """``blockscale plan`` if the mistake was made there."""
    context = getattr(error, "ctx", None)
    if context is None or context.parent is None:
        return "blockscale"
    return f"blockscale {context.info_name}"


def run() -> None:
    """Entry point: every expected failure is one line on stderr and an exit code."""
    try:
        status = app(["--help"] if len(sys.argv) == 1 else None, standalone_mode=False)
        sys.stdout.flush()
    except BlockscaleError as error:
        error_line(str(error))
        sys.exit(ExitCode.WRONG_USE)
    except TyperException as error:
        message = error.format_message().rstrip(".").replace(" Value error,", "")
        error_line(f"{message}; see {_command(error)} --help")
        sys.exit(ExitCode.WRONG_USE)
    except ModuleNotFoundError as error:
        _needs(error)
        sys.exit(ExitCode.WRONG_USE)
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
    except BrokenPipeError:
        _reader_left()
    except SystemExit as end:  # Typer turns a closed pipe into 1, which says FINDING here.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        _reader_left()
    if status == ExitCode.INTERRUPTED:  # Typer turns Ctrl-C into this status.
        _interrupted()
    sys.exit(status if isinstance(status, int) else ExitCode.FINE)


if __name__ == "__main__":
    run()
