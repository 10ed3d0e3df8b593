"""mkdocs hooks: pages that the navigation does not list, and links that leave the site.

A page that nobody put into ``nav`` is listed under "More", so that no page is lost. A link to a
file of the repository that is no page becomes its path: the site has no copy of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)")


def on_config(config: Any) -> Any:  # noqa: ANN401 - mkdocs is not installed where this is checked
    """Append decisions and unlisted pages to the navigation."""
    docs = Path(config["docs_dir"])
    listed = set(pages_of(config["nav"]))
    found = sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))
    decisions = [page for page in found if page.startswith("adr/")]
    more = [page for page in found if page not in listed and page not in decisions]
    config["nav"] = [*config["nav"], {"Decisions": decisions}, *([{"More": more}] if more else [])]
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:  # noqa: ANN401, ARG001 - mkdocs calls it so
    """Show links out of the site as paths."""
    docs = Path(config["docs_dir"])
    return inward(markdown, docs / page.file.src_uri, docs)


def pages_of(nav: Any) -> Iterator[str]:  # noqa: ANN401 - nested lists and mappings of YAML
    """Every page that a navigation names."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for value in nav.values():
            yield from pages_of(value)
    else:
        for item in nav:
            yield from pages_of(item)


def inward(markdown: str, source: Path, docs: Path) -> str:
    """``[text](../tools/x.py)`` becomes ``text (`tools/x.py`)`` where the target is no page."""

    def shown(match: re.Match[str]) -> str:
        target = match["target"]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (source.parent / target).resolve()
        if path.is_relative_to(docs.resolve()) and path.is_file():
            return match[0]
        where = path.relative_to(docs.resolve().parent)
        return f"{match['text']} (`{where}`)"

    return _LINK.sub(shown, markdown)
