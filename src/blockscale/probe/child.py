"""``python -m blockscale.probe.child MODULE:CLASS ITEM...``: checks in a process of its own.

Prints one JSON object a line: ``{"started": ITEM}``, then ``{"item", "shapes", "error"}`` or
``{"item", "failed"}``. A crash ends the lines where it happened. So does what a provider raises: a
GPU may be of no use to the process after that.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING, Any, cast

from blockscale.probe.checks import check_item
from blockscale.probe.children import MARKER
from blockscale.probe.items import Item
from blockscale.probe.machine import read_machine
from blockscale.probe.outcome import WrongNumbersError

if TYPE_CHECKING:
    from blockscale.backends.base import Backend


def main() -> None:
    """Check the named backend, item after item."""
    module, _, name = sys.argv[1].partition(":")
    backend = cast("Backend", getattr(importlib.import_module(module), name)())
    device = read_machine()
    for text in sys.argv[2:]:
        _say({"started": text})
        try:
            outcome = check_item(backend, device, Item.parsed(text))
        except WrongNumbersError as error:
            _say({"item": text, "failed": str(error)})
        except Exception as error:  # noqa: BLE001 - whatever a provider raises is its verdict
            first = (str(error).strip().splitlines() or [""])[0]
            _say({"item": text, "failed": f"{type(error).__name__}: {first}"})
            return
        else:
            _say({"item": text, "shapes": outcome.shapes, "error": outcome.max_relative_error})


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(MARKER + json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
