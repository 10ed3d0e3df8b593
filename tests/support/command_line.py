"""The ``blockscale`` command in this process: a new one would import torch for each call.

What only a process of its own shows (imports, pipes, signals, ``--help`` as installed) is tested
with one, beside the tests that use this.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from subprocess import CompletedProcess
from unittest import mock

from blockscale.cli import main


def blockscale(*arguments: object, **environ: str) -> CompletedProcess[str]:
    """What the command printed and its exit code; ``environ`` adds to the environment."""
    words = ["blockscale", *map(str, arguments)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BLOCKSCALE_")}
    out, err = StringIO(), StringIO()
    code: object = None
    with (
        mock.patch.dict(os.environ, {**clean, **environ}, clear=True),
        mock.patch.object(sys, "argv", words),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main.run()
        except SystemExit as end:
            code = end.code
    return CompletedProcess(words, int(str(code or 0)), out.getvalue(), err.getvalue())
