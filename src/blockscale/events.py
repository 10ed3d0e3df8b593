"""What blockscale did, as log records that a person reads and a machine parses.

One tree of loggers: ``blockscale.plan``, ``.prepare``, ``.probe``, ``.update``. The message is a
sentence; ``record.blockscale`` is a dict of JSON values with the same facts, its first key
``event``. Nothing is printed until a program configures logging; an event nobody wants costs one
comparison. Decisions are never made here.

==============  =======  =======================================================================
logger          level    one record for
==============  =======  =======================================================================
``.plan``       INFO     a planned model: layers of each backend, conversions, findings
``.prepare``    DEBUG    a layer or stack that was prepared: backend, conversion, bytes, seconds
``.prepare``    INFO     a model whose layers were all prepared
``.probe``      INFO     a backend that was proven or failed, WARNING if it failed
``.update``     INFO     new weights that were taken, WARNING if they were refused
==============  =======  =======================================================================
"""

from __future__ import annotations

import json
import logging
from enum import Enum

ROOT = "blockscale"
logging.getLogger(ROOT).addHandler(logging.NullHandler())


class Kind(Enum):
    """What happened; the value names the logger below ``blockscale``."""

    PLAN = "plan"
    PREPARE = "prepare"
    PROBE = "probe"
    UPDATE = "update"


class Ranges(Enum):
    """Whether layers mark their time on a profiler's timeline."""

    NONE = "none"
    NVTX = "nvtx"


def is_wanted(kind: Kind, level: int = logging.INFO) -> bool:
    """Whether somebody listens: facts that cost something to collect are collected then only."""
    return logging.getLogger(f"{ROOT}.{kind.value}").isEnabledFor(level)


def emit(kind: Kind, message: str, level: int = logging.INFO, **facts: object) -> None:
    """One record: ``message``, and ``facts`` (JSON values) as ``record.blockscale``."""
    logger = logging.getLogger(f"{ROOT}.{kind.value}")
    if logger.isEnabledFor(level):
        logger.log(level, "%s", message, extra={ROOT: {"event": kind.value, **facts}}, stacklevel=2)


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object on one line: level, logger, message and facts."""

    def format(self, record: logging.LogRecord) -> str:
        """Facts of records from elsewhere are empty."""
        document = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, ROOT, {}),
        }
        return json.dumps(document)
