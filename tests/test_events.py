"""Log records: one tree, sentences for people, facts for machines, nothing unless wanted."""

from __future__ import annotations

import io
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

from blockscale import events
from blockscale.backends.registry import BACKENDS
from blockscale.events import JsonLines, Kind
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.linear import BlockScaledLinear
from blockscale.modules.ranges import add_nvtx_ranges
from blockscale.modules.report import report_of
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe.proving import Pace, prove
from blockscale.reference import expert_of, quantize
from blockscale.testing import expert_cases

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockscale.planning.plan import ModelPlan
    from blockscale.tensor import BlockScaledTensor

N, K = 192, 256


def plan_of(*names: str, backends: tuple[str, ...] = ("cpu",)) -> ModelPlan:
    requests = [
        LinearRequest(name, N, K, FP8_128X128_FP32, DType.FLOAT32, DType.FLOAT32) for name in names
    ]
    return plan_model(requests, Device.named("cpu"), PlanPolicy(backends=backends), BACKENDS)


def weight_of(seed: int = 0) -> BlockScaledTensor:
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    return quantize(values, FP8_128X128_FP32)


def facts(caplog: pytest.LogCaptureFixture, kind: str) -> list[dict[str, Any]]:
    records = [r for r in caplog.records if r.name == f"blockscale.{kind}"]
    return [r.blockscale for r in records]  # type: ignore[attr-defined]  # the extra field


@pytest.fixture
def everything(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, logger="blockscale"):
        yield caplog


def test_a_plan_is_one_record(everything: pytest.LogCaptureFixture) -> None:
    plan_of("a", "b")
    (found,) = facts(everything, "plan")
    assert found["event"] == "plan"
    assert found["backends"] == {"cpu": 2}
    assert found["conversions"] == {"none": 2}
    assert found["unservable"] == []
    assert everything.records[-1].getMessage() == "planned 2 layers for cpu: cpu 2"
    assert json.loads(json.dumps(found)) == found


def test_a_plan_names_what_nobody_serves(everything: pytest.LogCaptureFixture) -> None:
    plan_of("a", "b", backends=("deep_gemm",))
    assert facts(everything, "plan")[0]["unservable"] == ["a", "b"]
    assert "2 without a backend" in everything.text


def test_prepare_and_update_name_their_layer(everything: pytest.LogCaptureFixture) -> None:
    layer = BlockScaledLinear(plan_of("model.o_proj").layers[0], weight_of())
    layer.update(weight_of(1))
    (prepared,), (updated,) = facts(everything, "prepare"), facts(everything, "update")
    assert prepared["layer"] == updated["layer"] == "model.o_proj"
    assert prepared["bytes"] == N * K + 4 * 2 * 2
    assert prepared["scale_layout"] == "k_major"
    assert prepared["seconds"] >= 0
    assert updated["updates"] == 1


def test_experts_are_prepared_stack_by_stack_and_updated_one_by_one(
    everything: pytest.LogCaptureFixture,
) -> None:
    w13, w2 = expert_cases.exact_weights()
    layer = BlockScaledExperts(expert_cases.plan_for(), w13, w2)
    layer.update_expert(4, [expert_of(w13, 0)], [expert_of(w2, 0)])
    prepared, (updated,) = facts(everything, "prepare"), facts(everything, "update")
    assert [record["layer"] for record in prepared] == ["mlp.experts.w13", "mlp.experts.w2"]
    assert [record["bytes"] for record in prepared] == [w13.nbytes, w2.nbytes]
    assert (updated["layer"], updated["expert"], updated["updates"]) == ("mlp.experts", 4, 1)
    assert {entry.updates for entry in report_of(layer).layers} == {1}


def test_a_probe_is_a_record_for_each_proof(everything: pytest.LogCaptureFixture) -> None:
    from blockscale.backends.reference import Reference

    prove([Reference()], (DType.FLOAT32,), Pace(time_limit_s=0.001))
    found, *experts = facts(everything, "probe")
    assert [one["arrangement"] for one in experts] == ["contiguous", "masked"]
    assert found["verdict"] == "failed"
    assert "no answer within" in found["detail"]
    assert everything.records[-1].levelname == "WARNING"


def test_nothing_is_collected_unless_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not events.is_wanted(Kind.PREPARE, logging.DEBUG)
    monkeypatch.setattr(logging.Logger, "log", lambda *_, **__: pytest.fail("logged"))
    BlockScaledLinear(plan_of("a").layers[0], weight_of()).update(weight_of(1))


def test_json_lines_hold_sentence_and_facts() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("blockscale")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        plan_of("a")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    document = json.loads(stream.getvalue())
    assert document["logger"] == "blockscale.plan"
    assert document["message"] == "planned 1 layers for cpu: cpu 1"
    assert document["layers"] == 1


def test_ranges_open_and_close_around_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", marks.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: marks.append("end"))
    layer = BlockScaledLinear(plan_of("model.o_proj").layers[0], weight_of())
    handles = add_nvtx_ranges(torch.nn.Sequential(layer, torch.nn.ReLU()))
    layer(torch.zeros(2, K))
    assert marks == ["blockscale model.o_proj (cpu)", "end"]
    with pytest.raises(Exception, match="planned for"):
        layer(torch.zeros(2, K + 1))
    assert marks[2:] == ["blockscale model.o_proj (cpu)", "end"]
    for handle in handles:
        handle.remove()
    layer(torch.zeros(2, K))
    assert len(marks) == 4


def test_experts_mark_their_time_as_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", marks.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: marks.append("end"))
    layer = BlockScaledExperts(expert_cases.plan_for(), *expert_cases.exact_weights())
    add_nvtx_ranges(layer)
    layer(expert_cases.exact_tokens(2), *expert_cases.routing(2))
    assert marks == ["blockscale mlp.experts (cpu)", "end"]


def test_a_report_says_what_runs() -> None:
    names = ("layers.0.up", "layers.1.up")
    layers = [BlockScaledLinear(plan, weight_of()) for plan in plan_of(*names).layers]
    layers[1].update(weight_of(1))
    report = report_of(torch.nn.Sequential(*layers))
    assert report.backends == {"cpu": 2}
    assert [layer.updates for layer in report.layers] == [0, 1]
    assert [layer.module for layer in report.layers] == ["0", "1"]
    assert report.bytes == 2 * (N * K + 16)
    document = report.document()
    assert json.loads(json.dumps(document))["layers"][1]["layer"] == "layers.1.up"
    text = str(report)
    assert text.splitlines()[0] == "2 planned layers, 0.1 MB of codes and scales"
    assert "    2  layers.*.up  192x256  cpu (M >= 0)" in text
    assert "not deep_gemm: the policy allows only cpu" in text
