"""What `make weights` says when it cannot do its work."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import real_weights


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_named_before_anything_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**8, 10**8))
    with pytest.raises(SystemExit) as stop:
        real_weights.build("minilm", tmp_path / "minilm")
    assert str(stop.value) == (
        f"real_weights: 100 MB are free in {tmp_path}, 1000 MB are needed to make minilm;"
        " make room there, or name another place (--cache, TMPDIR)"
    )
    assert not list(tmp_path.iterdir())
