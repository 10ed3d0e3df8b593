"""--html beside what a command prints anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from command_line import blockscale

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_html_is_written_and_changes_nothing_else(
    fp8_checkpoint: Path, float_checkpoint: Path, tmp_path: Path, command: str
) -> None:
    options: tuple[object, ...] = ("--device", "sm_90") if command == "plan" else ()
    if command == "verify":
        options = ("--against", float_checkpoint)
    file = tmp_path / "report.html"
    plain = blockscale(command, fp8_checkpoint, *options)
    done = blockscale(command, fp8_checkpoint, *options, "--html", file)
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, "")
    html = file.read_text()
    assert html.startswith("<!doctype html>")
    assert str(fp8_checkpoint) in html
    assert "model.layers.0.self_attn.o_proj" in html
    again = blockscale(command, fp8_checkpoint, *options, "--html", file, "--json")
    assert again.returncode == 0
    assert file.read_text() == html


def test_a_report_on_a_path_that_is_no_utf8(fp8_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "bad\udcff"  # the byte 0xff, as Python spells it
    fp8_checkpoint.rename(other)
    page = tmp_path / "page.html"
    assert blockscale("verify", other, "--html", page).returncode == 0
    assert r"bad\udcff" in page.read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_is_one_line(fp8_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "report.html"
    done = blockscale("plan", fp8_checkpoint, "--device", "sm_90", "--html", file)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{file}: cannot be written" in done.stderr
