"""Lists of modules that stay unquantized, matched as each system matches them.

The same entry means different layers to different readers: ``gate`` is a whole name to vLLM, a path
component to SGLang and the end of a name to transformers, for which ``b_proj`` also means
``q_b_proj``. ``SkipMatcher`` answers for every reader of a dialect, so that a checkpoint which only
some of them read rightly can be named.

Patterns come from files of unknown origin: they run in the ``regex`` package, which can be stopped,
within a budget of time for the whole list.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from fnmatch import translate
from typing import TYPE_CHECKING, Any

from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from typing import TypeAlias

    _Rule: TypeAlias = Callable[[str], bool]

REGEX_PREFIX = "re:"
# Far above any real list. What compiles and matches takes time that grows with both.
LONGEST_ENTRY = 1000
MOST_ENTRIES = 20_000
# For all patterns on all layers of one checkpoint.
PATTERN_SECONDS = 10.0

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
_WILDCARDS = frozenset("*?[")
_EXPERTS = ".experts"


class Reader(Enum):
    """A system whose matching rule is known, and where it is written down.

    Versions: transformers 5.24 (``should_convert_module``), vLLM 0.33 and SGLang 0.5.23
    (``is_layer_skipped`` of each), compressed-tensors 0.20 (``match_name``), ModelOpt 0.47 (the
    wildcards that its exporter writes and TensorRT-LLM reads).
    """

    TRANSFORMERS = "transformers"
    VLLM = "vLLM"
    SGLANG = "SGLang"
    COMPRESSED_TENSORS = "compressed-tensors"
    MODELOPT = "ModelOpt"


@dataclass(frozen=True, slots=True)
class SkipList:
    """The entries as declared, and who reads them. ``source``: the file that declares them."""

    entries: tuple[str, ...] = ()
    readers: tuple[Reader, ...] = ()
    source: Path | None = None


class SkipMatcher:
    """Who leaves which layer unquantized, by one list. Made once for all layers."""

    def __init__(self, skips: SkipList) -> None:
        readers = skips.readers if skips.entries else ()
        self._rules = [(reader, _RULES[reader](skips)) for reader in readers]

    def skipped_by(self, layer: str) -> tuple[Reader, ...]:
        """The readers that leave this layer unquantized.

        Raises CheckpointError if the list's patterns take longer than ``PATTERN_SECONDS``.
        """
        return tuple(reader for reader, rule in self._rules if rule(layer))


class Patterns:
    """Regular expressions that share a budget of seconds; those without meaning match nothing."""

    def __init__(self, patterns: Iterable[str], source: Path | None) -> None:
        self._source = source
        self._left = PATTERN_SECONDS
        self._compiled = [(p, c) for p in patterns if (c := _compiled(p)) is not None]

    def match(self, name: str) -> bool:
        """Whether any of them matches from the start of ``name``.

        Raises CheckpointError if they have taken longer than ``PATTERN_SECONDS`` in all.
        """
        return any(self._matches(text, pattern, name) for text, pattern in self._compiled)

    def _matches(self, text: str, pattern: Any, name: str) -> bool:  # noqa: ANN401 - regex has no types
        started = time.perf_counter()
        try:
            found = pattern.match(name, timeout=max(self._left, 0.001)) is not None
        except TimeoutError as error:
            where = self._source or "config.json"
            msg = f"the pattern {text[:80]!r} takes too long to match; simplify it"
            raise CheckpointError(where, msg) from error
        self._left -= time.perf_counter() - started
        return found


def _compiled(pattern: str) -> Any:  # noqa: ANN401 - regex has no types
    import regex

    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError, IndexError):
        return None


def _transformers(skips: SkipList) -> _Rule:
    """From the start up to a dot, also as a pattern; or the end of the name, dot or not."""
    plain = {entry for entry in skips.entries if _PLAIN.issuperset(entry)}
    ends = tuple(skips.entries)
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    patterns = Patterns(
        (rf"(?:{entry}){boundary}" for entry in skips.entries if entry not in plain), skips.source
    )

    def rule(layer: str) -> bool:
        return layer.endswith(ends) or _prefix_in(layer, plain) or patterns.match(layer)

    return rule


def _prefix_in(layer: str, names: set[str]) -> bool:
    """Whether ``layer`` or a path above it is among ``names``."""
    position = len(layer)
    while position > 0:
        if layer[:position] in names or layer[:position] + "." in names:
            return True
        position = layer.rfind(".", 0, position)
    return False


def _vllm(skips: SkipList) -> _Rule:
    """The whole name; of experts, any entry below or at the module that holds them."""
    exact = set(skips.entries)
    of_experts = [entry for entry in skips.entries if _EXPERTS[1:] in entry]

    def rule(layer: str) -> bool:
        stem, found, _ = layer.partition(_EXPERTS + ".")
        if found:
            module = stem + _EXPERTS
            return any(module in entry for entry in of_experts)
        return layer in exact

    return rule


def _sglang(skips: SkipList) -> _Rule:
    """Whole path components in a row, anywhere in the name."""
    exact = set(skips.entries)
    lengths = sorted({entry.count(".") + 1 for entry in exact})

    def rule(layer: str) -> bool:
        parts = layer.split(".")
        return any(
            ".".join(parts[begin : begin + length]) in exact
            for length in lengths
            for begin in range(len(parts) - length + 1)
        )

    return rule


def _compressed_tensors(skips: SkipList) -> _Rule:
    """The whole name, or a ``re:`` pattern from its start; class names match no name."""
    exact = {entry for entry in skips.entries if not entry.startswith(REGEX_PREFIX)}
    patterns = Patterns(
        (e.removeprefix(REGEX_PREFIX) for e in skips.entries if e.startswith(REGEX_PREFIX)),
        skips.source,
    )
    return lambda layer: layer in exact or patterns.match(layer)


def _modelopt(skips: SkipList) -> _Rule:
    """The whole name, or shell wildcards over it."""
    exact = set(skips.entries)
    wild = (entry for entry in skips.entries if _WILDCARDS.intersection(entry))
    patterns = Patterns(map(translate, wild), skips.source)
    return lambda layer: layer in exact or patterns.match(layer)


_RULES: dict[Reader, Callable[[SkipList], _Rule]] = {
    Reader.TRANSFORMERS: _transformers,
    Reader.VLLM: _vllm,
    Reader.SGLANG: _sglang,
    Reader.COMPRESSED_TENSORS: _compressed_tensors,
    Reader.MODELOPT: _modelopt,
}
