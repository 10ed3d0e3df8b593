"""Fills the templates: escaped by default, undefined names are errors, one script by its hash."""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from blockscale.planning.explain import human_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

# Rows of one table. A page with more is slow to open; `--json` has all of them.
MAX_ROWS = 2000
COLOURS = 8


def page(template: str, context: Mapping[str, object]) -> str:
    """The HTML of ``templates/<template>`` filled with ``context``."""
    environment = _environment()
    script = _source(environment, "script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        context,
        style=_source(environment, "style.css"),
        script=script,
        script_hash=digest,
        version=metadata.version("blockscale"),
        colours=COLOURS,
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("blockscale.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["bytes"] = human_bytes
    made.filters["count"] = "{:,}".format
    return made


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def finding_rank(severity: str) -> int:
    """Faults first, notes last."""
    return ("fault", "warning", "note").index(severity)
