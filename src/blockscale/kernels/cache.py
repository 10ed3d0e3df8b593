"""Where compiled kernels are kept on disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from blockscale.errors import BackendError


def cache_directory() -> Path:
    """A directory that this user can write to, made if it is not there.

    Raises BackendError if there is none.
    """
    for candidate in (Path.home() / ".cache" / "blockscale", Path(tempfile.gettempdir())):
        try:
            candidate.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(candidate, os.W_OK):
            return candidate
    msg = "no writable cache directory for compiled kernels (tried ~/.cache and the temp folder)"
    raise BackendError(msg)
