"""``python -m blockscale.probe.child MODULE:CLASS DTYPE...``: checks in a process of its own.

Prints one JSON object a line: ``{"started": ...}`` before each step, ``{"dtype", "verdict",
"detail"}`` after each dtype. A crash ends the lines where it happened.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING, cast

from blockscale.formats import DType
from blockscale.planning.device import Verdict
from blockscale.probe.checks import WrongNumbersError, check_backend
from blockscale.probe.machine import read_machine

if TYPE_CHECKING:
    from blockscale.backends.base import Backend


def main() -> None:
    """Check the named backend for each dtype."""
    module, _, name = sys.argv[1].partition(":")
    backend = cast("Backend", getattr(importlib.import_module(module), name)())
    device = read_machine()
    for text in sys.argv[2:]:
        dtype = DType(text)
        _say({"started": dtype.value})
        try:
            outcome = check_backend(backend, device, dtype, lambda step: _say({"started": step}))
            verdict, detail = Verdict.PROVEN, str(outcome)
            if outcome.shapes == 0:
                _say({"dtype": text, "verdict": None, "detail": "its gates let no shape pass"})
                continue
        except WrongNumbersError as error:
            verdict, detail = Verdict.FAILED, str(error)
        except Exception as error:  # noqa: BLE001 - whatever a provider raises is its verdict
            first = (str(error).strip().splitlines() or [""])[0]
            verdict, detail = Verdict.FAILED, f"{type(error).__name__}: {first}"
        _say({"dtype": text, "verdict": verdict.value, "detail": detail})


def _say(line: dict[str, str | None]) -> None:
    # Providers may print too; the marker tells our lines from theirs.
    sys.stdout.write("@probe " + json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
