"""plan --save, warm and generate --plan, as a user runs them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from command_line import blockscale

from blockscale.testing.model_shapes import minimax_m25, write_model_headers

if TYPE_CHECKING:
    from pathlib import Path
    from subprocess import CompletedProcess


def refused(done: CompletedProcess[str], *words: str) -> None:
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_save_writes_what_json_prints(fp8_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    printed = blockscale("plan", fp8_checkpoint, "--device", "sm_90", "--save", file, "--json")
    document = json.loads(file.read_text())
    assert document["plan"] == json.loads(printed.stdout)
    assert document["checkpoint"]["path"] == str(fp8_checkpoint)
    assert document["checkpoint"]["merging"] == "engine"


def test_warm_builds_a_saved_plan(fp8_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    blockscale("plan", fp8_checkpoint, "--device", "cpu", "--save", file)
    warmed = blockscale("warm", file, "--json")
    document = json.loads(warmed.stdout)
    assert document["schema"] == 1
    assert document["calls"] == 2 * len(document["kernels"]) == 4
    assert "2 kernels built and run, 4 calls" in blockscale("warm", file).stdout


def test_the_warm_up_list_needs_neither_device_nor_checkpoint(tmp_path: Path) -> None:
    write_model_headers(tmp_path / "minimax", minimax_m25(layers=6))
    file = tmp_path / "plan.json"
    blockscale("plan", tmp_path / "minimax", "--device", "sm_90", "--save", file)
    listed = json.loads(blockscale("warm", file, "--list", "--json").stdout)
    assert listed["calls"] == 0
    shapes = {(kernel["n"], kernel["k"], kernel["experts"]) for kernel in listed["kernels"]}
    assert shapes == {(8192, 3072, None), (3072, 6144, None), (3072, 3072, 256), (3072, 1536, 256)}
    refused(blockscale("warm", file), "planned for sm_90, this is cpu")


def test_generate_refuses_a_plan_that_does_not_fit(fp8_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    arguments = ("plan", fp8_checkpoint, "--save", file, "--device")
    assert blockscale(*arguments, "cpu").returncode == 0
    refused(blockscale("generate", fp8_checkpoint, "x", "--plan", file), "use --layers module")
    assert blockscale(*arguments, "sm_90", "--layers", "module").returncode == 0
    refused(blockscale("generate", fp8_checkpoint, "x", "--plan", file), "this is cpu; plan again")


@pytest.mark.parametrize("options", [("--backend", "reference"), ("--allow-lossy",), ()])
def test_a_plan_brings_its_own_policy(
    fp8_checkpoint: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    environ = {} if options else {"BLOCKSCALE_BACKENDS": "cpu"}
    file = tmp_path / "plan.json"
    done = blockscale("generate", fp8_checkpoint, "x", "--plan", file, *options, **environ)
    refused(done, "--plan brings its own policy")


def test_a_file_that_is_no_plan(fp8_checkpoint: Path) -> None:
    config = fp8_checkpoint / "config.json"
    refused(blockscale("warm", config), str(config), "not a plan file")
