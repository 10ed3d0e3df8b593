"""The documentation site: what it lists exists, and its generated page is the commands'."""

from __future__ import annotations

import importlib.util
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nav_pages() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return re.findall(r"[\w/-]+\.md", text.partition("\nnav:\n")[2])


def test_every_listed_page_exists_once() -> None:
    pages = nav_pages()
    assert len(pages) > 25
    assert len(set(pages)) == len(pages)
    for page in pages:
        assert (DOCS / page).is_file(), page


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=lambda p: p.name)
def test_every_documented_module_exists(page: Path) -> None:
    for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        if ".transformers" in name:
            pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")
        assert import_module(name).__doc__


def test_unlisted_pages_are_listed_under_more(site: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "adr").mkdir()
    for name in ("index.md", "new.md", "adr/0001-x.md", "deep.md"):
        (tmp_path / name).write_text("x")
    nav = ["index.md", {"Section": ["deep.md"]}]
    made = site.on_config({"docs_dir": str(tmp_path), "nav": nav})
    assert made["nav"] == [*nav, {"Decisions": ["adr/0001-x.md"]}, {"More": ["new.md"]}]


def test_links_out_of_the_site_become_paths(site: ModuleType, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "page.md").write_text("x")
    text = "[a](page.md#b) [c](../tools/x.py) [d](https://e) ![f](../g.png)"
    shown = site.inward(text, docs / "start.md", docs)
    assert shown == "[a](page.md#b) c (`tools/x.py`) [d](https://e) ![f](../g.png)"


def test_make_docs_installs_the_extra() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^docs = \[(.*)\]$", project, re.MULTILINE)
    wanted = re.findall(r'"([^"]+)"', extra)
    assert len(wanted) == 2
    for requirement in wanted:
        assert f"'{requirement}'" in makefile
