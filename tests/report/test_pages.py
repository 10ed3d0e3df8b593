"""What the pages say, that they need nothing else, and that they believe no name."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.scales import ScaleFacts
from blockscale.checkpoint.schema import read_layers
from blockscale.checkpoint.verify import DataError, LayerCheck, Verification, verify_layers
from blockscale.formats import FP8_128X128_FP32, DType, PowerOfTwo
from blockscale.planning.device import Device
from blockscale.planning.plan import Finding, ModelPlan, Severity
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.report.plan_page import Subject, names_words, plan_page
from blockscale.report.verify_page import verify_page

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = '<script>hacked=1</script>"><img src=x onerror=hacked=1>{{ 7*7 }}&'
VOID = {"meta", "link", "br", "input", "circle", "line", "path"}


class Balance(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "action"}]
        if tag not in VOID or tag in {"circle", "line"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Closed where it was opened."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def text_of(html: str) -> str:
    body = re.sub(r"<(style|script)>.*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def hostile_plan(**changes: object) -> ModelPlan:
    request = LinearRequest(HOSTILE, 512, 512, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16)
    finding = Finding(Severity.FAULT, "x", HOSTILE, HOSTILE)
    policy = PlanPolicy(**changes)
    return plan_model([request], Device.named("sm_90"), policy, BACKENDS, findings=[finding])


def checks(**changes: object) -> tuple[LayerCheck, ...]:
    facts = ScaleFacts(4, PowerOfTwo.NO, 4, 0, 0, 0, 0.25, 8.0)
    error = DataError(0.02, 0.5, 33.0)
    return tuple(
        replace(LayerCheck(f"l.{i}.q_proj", 256, 256, FP8_128X128_FP32, facts, error), **changes)
        for i in range(12)
    )


def test_a_plan_page_has_every_part(minimax_plan: tuple[ModelPlan, str]) -> None:
    plan, html = minimax_plan
    text = text_of(html)
    assert text.startswith("Plan of MiniMax-M2.5 blockscale MiniMax-M2.5 Planned for sm_100")
    assert "one rank of tp=8 ep=1" in text
    for heading in ("Who serves what", "Findings", "Layers", "Conversions", "Not chosen, and why"):
        assert heading in text
    assert "Other parallel degrees" in text
    assert "Not quantized" in text
    for layer in plan.layers:
        for rejection in layer.rejected:
            assert " ".join(rejection.reason.split()) in text
    for finding in plan.findings:
        assert finding.message in text
    assert "model.layers.{0-61}.self_attn.qkv_proj" in text
    assert "124 layers · 28.1 GB · 98.8 %" in text


def test_a_verify_page_has_every_part(float_checkpoint: Path, fp8_checkpoint: Path) -> None:
    layers = read_layers(read_checkpoint(fp8_checkpoint))
    result = verify_layers(layers, read_checkpoint(float_checkpoint))
    html = verify_page(result, str(fp8_checkpoint), str(float_checkpoint))
    text = text_of(html)
    assert "every weight compared with" in text
    assert "Error of each layer" in text
    assert html.count("<circle") == len(result.layers) == 2
    assert html.count("<line x1") == 2
    for check in result.layers:
        assert check.error is not None
        assert f"{check.name}: {check.error.relative_error:.4f}" in text
    alone = text_of(verify_page(verify_layers(layers), str(fp8_checkpoint)))
    assert "Give --against the float checkpoint" in alone
    assert "Error of each layer" not in alone


PAGES = {
    "servable": lambda: plan_page(hostile_plan(), Subject(HOSTILE, "bfloat16")),
    "unservable": lambda: plan_page(
        hostile_plan(backends=("cpu",)), Subject(HOSTILE, "bfloat16", 4, 2)
    ),
    "lossy": lambda: plan_page(
        replace(hostile_plan(exactness=Exactness.ALLOW_LOSSY), skipped=()), Subject("x", "float16")
    ),
    "empty plan": lambda: plan_page(
        plan_model([], Device.named("cpu"), PlanPolicy(), BACKENDS), Subject("x", "float16")
    ),
    "verified": lambda: verify_page(
        Verification(checks(name=HOSTILE), (Finding(Severity.WARNING, "x", HOSTILE),)), HOSTILE, "y"
    ),
    "not compared": lambda: verify_page(Verification(checks(error=None), ()), HOSTILE),
    "exact": lambda: verify_page(
        Verification(checks(error=DataError(0.0, 0.0, float("inf"))), ()), "x", "y"
    ),
    "broken": lambda: verify_page(
        Verification(
            checks(
                error=DataError(float("nan"), float("inf"), float("-inf")),
                scales=ScaleFacts(4, PowerOfTwo.NO, 4, 4, 0, 0, None, None),
            ),
            (),
        ),
        "x",
        "y",
    ),
    "zero scales": lambda: verify_page(
        Verification(checks(scales=ScaleFacts(4, PowerOfTwo.NO, 4, 0, 4, 0, 0.0, 0.0)), ()), "x"
    ),
    "nothing": lambda: verify_page(Verification((), ()), "x"),
}


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_whole_and_need_nothing_else(name: str) -> None:
    html = PAGES[name]()
    page = Balance(html)
    assert page.open == []
    assert set(page.links) == {"data:,"}
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "@import" not in html


@pytest.mark.parametrize("name", PAGES)
def test_names_are_text(name: str) -> None:
    html = PAGES[name]()
    assert html.count("<script>") == 1
    assert "<img" not in html
    if name in {"servable", "verified"}:
        assert " ".join(HOSTILE.split()) in text_of(html)


def test_the_policy_allows_the_page_s_own_script_alone() -> None:
    import base64
    import hashlib

    html = PAGES["servable"]()
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert f"script-src 'sha256-{digest}'" in unescape(policy)
    assert "default-src 'none'" in unescape(policy)


@pytest.mark.parametrize("count", [1, 2, 1500, 4000])
def test_any_number_of_layers_is_drawn_and_the_page_stays_small(count: int) -> None:
    some = [replace(checks()[0], name=f"layers.{index}.q_proj") for index in range(count)]
    html = verify_page(Verification(tuple(some), ()), "x", "y")
    assert html.count("<circle") == (count if count <= 1500 else 0)
    assert html.count("<tr>") == 1 + min(count, 2000)
    assert ("and 2,000 more" in html) == (count == 4000)
    assert len(html) < 3_000_000


def test_names_are_given_as_ranges() -> None:
    names = [f"model.layers.{index}.mlp" for index in (*range(5), 7, 9, 10)]
    assert names_words(names) == "model.layers.{0-4,7,9-10}.mlp"
    assert names_words(["lm_head"]) == "lm_head"
    assert names_words(["a.1.b", "c.1.d", "e"]) == "a.{1}.b, c.{1}.d, e"
    many = names_words([f"x{index}" for index in range(500)])
    assert many.endswith("x199 and 300 more")


def test_a_page_is_the_same_when_made_again(minimax_plan: tuple[ModelPlan, str]) -> None:
    plan, _ = minimax_plan
    subject = Subject("x", "bfloat16")
    assert plan_page(plan, subject) == plan_page(plan, subject)
