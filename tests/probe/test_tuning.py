"""Measured tables: made on this machine, kept, read back, used by plans."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from command_line import blockscale

from blockscale.backends.registry import BACKENDS
from blockscale.errors import SettingsError
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.planning.device import Device, Measurement
from blockscale.planning.plan import Conversion
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe.machine import read_machine
from blockscale.probe.measured import kept_path, read_table, with_measurements
from blockscale.probe.tuning import make_room, save_measurements, tune

if TYPE_CHECKING:
    from pathlib import Path

BF16 = DType.BFLOAT16


def request(name: str, n: int, k: int) -> LinearRequest:
    return LinearRequest(name, n, k, FP8_128X128_FP32, BF16, BF16)


def test_every_runnable_backend_is_timed_once_for_each_shape() -> None:
    wanted = [request("a", 192, 256), request("b", 192, 256), request("c", 130, 128)]
    found = tune(wanted, read_machine(), BACKENDS, tokens=(1, 9))
    keys = [(one.backend, one.n, one.k, one.m) for one in found]
    assert sorted(keys) == sorted(
        (backend, n, k, m)
        for backend in ("cpu", "reference")
        for n, k in ((192, 256), (130, 128))
        for m in (1, 9)
    )
    assert all(one.time_us > 0 for one in found)


def test_a_kept_table_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    device = read_machine()
    assert with_measurements(device).measurements == ()
    table = (Measurement("cpu", 192, 256, BF16, 1, 12.5),)
    save_measurements(kept_path(device), device, table)
    assert with_measurements(device).measurements == table


@pytest.mark.parametrize("text", ["", "{}", '{"rows": [[1]]}', '{"rows": [["a",1,1,"int8",1,1]]}'])
def test_a_damaged_table_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match=r"here\.json is no table of measured times"):
        read_table(text, "here.json")


def test_the_command_keeps_a_table_for_later_plans(fp8_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    command = ["tune", fp8_checkpoint, "--tokens", "1", "--out", out, "--json"]
    done = blockscale(*command)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["backend"] for row in rows} == {"cpu", "reference"}
    assert len(read_table(out.read_text(), str(out))) == len(rows)


def test_the_shipped_table_chooses_among_backends_on_an_h200(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 layers go to the faster of two kernels that read the same weight, by token count."""
    monkeypatch.setenv("HOME", str(tmp_path))
    h200 = with_measurements(replace(Device.named("sm_90"), name="NVIDIA H200"))
    assert {one.backend for one in h200.measurements} >= {"deep_gemm", "gluon", "triton"}
    plan = plan_linear(request("x", 2112, 7168), h200, PlanPolicy(), BACKENDS)
    # At no token count was DeepGEMM faster by what a switch is worth (``gemm.py``, 68f4835).
    assert set(plan.backends) == {"gluon", "cuda"}
    assert plan.conversion is Conversion.NONE
    assert plan.choice_for(1).offer.backend == "gluon"


def test_a_table_that_could_not_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"times\.json: cannot be written: File exists"):
        make_room(tmp_path / "file" / "times.json")
