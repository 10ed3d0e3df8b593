"""Everything blockscale raises on purpose.

::

    BlockscaleError
    ├── FormatError      a value contradicts its format or layout (also a ValueError)
    ├── PlanError        no backend may serve a layer; carries every rejection
    │   └── PlanMismatchError  a saved plan is for another checkpoint, device or version
    ├── BackendError     a planned backend cannot be prepared or run on this machine
    ├── CheckpointError  a file cannot be read, or contradicts itself
    ├── SettingsError    an environment variable or option has no meaning
    └── ModelError       a model object does not match its checkpoint or its plan

A message is one line that says what was asked, what was found and what to do about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class BlockscaleError(Exception):
    """Base of all errors that blockscale raises on purpose."""


class FormatError(BlockscaleError, ValueError):
    """A tensor, a shape or a scale contradicts the format or layout that it claims."""


class PlanError(BlockscaleError):
    """A layer cannot be served under the policy; the message gives every backend's reasons."""


class PlanMismatchError(PlanError):
    """A saved plan does not fit the checkpoint, the device or the versions here.

    ``reasons``: all of them, each one line.
    """

    def __init__(self, source: str, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{source} does not fit: {'; '.join(self.reasons)}; plan again")


class BackendError(BlockscaleError):
    """A provider is missing or refused at ``prepare`` what the plan asked of it."""


class SettingsError(BlockscaleError):
    """An environment variable or command-line option holds a value without meaning."""


class ModelError(BlockscaleError):
    """A model object does not match the checkpoint or plan it is asked to run."""


# Names come from files of unknown origin: a message stays one line whatever they are.
LONGEST_NAME = 200
LONGEST_PROBLEM = 1200


class CheckpointError(BlockscaleError):
    """A checkpoint file cannot be read or contradicts itself.

    ``path`` and ``tensor`` say where; ``str(error)`` starts with both and is one line of bounded
    length.
    """

    def __init__(self, path: Path | str, problem: str, *, tensor: str | None = None) -> None:
        self.path = str(path)
        self.tensor = tensor
        self.problem = problem
        where = str(path)
        if tensor is not None:
            where += f": tensor {_cut(tensor, LONGEST_NAME)!r}"
        line = f"{where}: {_cut(problem, LONGEST_PROBLEM)}"
        super().__init__(line if line.isprintable() else " ".join(line.split()))


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "..."
