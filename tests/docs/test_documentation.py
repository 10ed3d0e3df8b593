"""What the documents show is what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.testing.model_shapes import minimax_m25, write_model_headers

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def fenced(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def test_the_plan_in_the_readme_is_the_plan_that_is_printed(tmp_path: Path) -> None:
    write_model_headers(tmp_path / "minimax", minimax_m25())
    command = "blockscale plan minimax --device sm_100 --dtype float16"
    (block,) = [text for text in fenced(ROOT / "README.md", "") if f"$ {command}\n" in text]
    shown = block.split(f"$ {command}\n")[1]
    printed = subprocess.run(
        [sys.executable, "-m", "blockscale.cli.main", *command.split()[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        file = document.parent / target if target else document
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file), link


def test_nothing_cites_a_file_that_a_clone_does_not_have() -> None:
    """The team's notes lie beside the repository."""
    notes = re.compile(r"\b(facts|baseline|shared)/\w")
    sources = [*DOCUMENTS, *ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py")]
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in sources
        if path != Path(__file__)
        for line in path.read_text(encoding="utf-8").splitlines()
        if notes.search(line)
    ]
    assert found == []


def anchors(document: Path) -> set[str]:
    """What a forge calls the headings of a document in links."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_backend_is_documented() -> None:
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    for backend in BACKENDS:
        assert f"`{backend.name}`" in text


def test_tables_are_generated_from_the_committed_records() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}run python tools/tables.py"
