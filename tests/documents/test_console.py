"""Every console block of the documents runs and prints what is shown.

``$ command`` lines run one after the other, a document at a time, in a folder with the repository's
tools and weights; lines shown under a command must be printed by it, in that order. Hub ids lead to
a server on this machine, so nothing needs a network.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import document_blocks as lists
from blockscale.testing.hub_server import HubServer
from blockscale.testing.model_shapes import qwen3_8b, write_model_headers

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("forked")

ROOT = Path(__file__).parent.parent.parent
# Lines that say what the machine is or how fast it was.
VARIES = re.compile(r"^cpu \(|tokens/s|^\[\d+ tokens|^─+$")


CONSOLE_BLOCKS = [b for b in lists.BLOCKS if b.is_console and not b.is_listed]
CONSOLE = sorted({block.document for block in CONSOLE_BLOCKS})


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The Hub ids that documents name."""
    folder = tmp_path_factory.mktemp("hub")
    write_model_headers(folder / "Qwen" / "Qwen3-8B-FP8", qwen3_8b())
    with HubServer(folder).running() as server:
        yield server


@pytest.mark.parametrize("document", CONSOLE)
def test_commands_run_and_print_what_is_shown(
    document: str, hub: HubServer, tmp_path: Path
) -> None:
    blocks = [
        b for b in lists.BLOCKS if b.document == document and b.is_console and not b.is_listed
    ]
    commands = [
        session
        for block in blocks
        for session in sessions(block.code)
        if not session[0].startswith(tuple(lists.NOT_HERE))
    ]
    for command, _ in commands:
        if command.startswith("blockscale generate"):
            pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")
        if " Qwen/" in command:
            pytest.importorskip("huggingface_hub", reason="pip install 'blockscale[hub]'")
    if any(".cache/weights" in block.code for block in blocks):
        weights = ROOT / ".cache" / "weights" / "smollm2"
        if not (weights / "config.json").is_file():
            pytest.skip(f"{weights} is missing; fetch it with `make weights`")
        (tmp_path / ".cache" / "weights").mkdir(parents=True)
        (tmp_path / ".cache" / "weights" / "smollm2").symlink_to(weights.resolve())
    for name in ("tools", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("BLOCKSCALE_", "HF_"))}
    environ |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "PATH": f"{_programs(tmp_path)}{os.pathsep}{environ['PATH']}",
    }
    for command, shown in commands:
        run(command, shown, tmp_path, environ)


def _programs(folder: Path) -> Path:
    """``blockscale`` and ``python`` as this test runs them."""
    programs = folder / "bin"
    programs.mkdir()
    for name, line in (("blockscale", "-m blockscale.cli.main "), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {line}"$@"\n')
        (programs / name).chmod(0o755)
    return programs


def sessions(code: str) -> list[tuple[str, list[str]]]:
    """Each command with the lines shown under it."""
    found: list[tuple[str, list[str]]] = []
    for line in code.splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        elif line.strip():
            found[-1][1].append(line.rstrip())
    return found


def run(command: str, shown: list[str], folder: Path, environ: dict[str, str]) -> None:
    done = subprocess.run(  # noqa: S602 - our own documents, which show pipes
        command,
        shell=True,
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, f"$ {command}\n{done.stderr}"
    # Columns are as wide as the widest cell, also of a row that the document cuts.
    printed = iter([line.split() for line in done.stdout.splitlines()])
    for line in shown:
        if not VARIES.search(line):
            assert line.split() in printed, f"$ {command}\ndid not print, in this order:\n{line}"
