"""The pages in Chromium: sorted, filtered, on a phone, in the dark, without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.scales import ScaleFacts
from blockscale.checkpoint.verify import DataError, LayerCheck, Verification
from blockscale.formats import FP8_128X128_FP32, DType, PowerOfTwo
from blockscale.planning.device import Device
from blockscale.planning.plan import Finding, Severity
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.report.plan_page import Subject, plan_page
from blockscale.report.verify_page import verify_page

if TYPE_CHECKING:
    from blockscale.planning.plan import ModelPlan

PHONE = (390, 844)
LUMINANCE = """(() => {
  const channels = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = (text) => channels(text)
    .map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!colour.startsWith("rgba(0, 0, 0, 0")) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("main *, header *")]
    .filter((node) => [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim()))
    .filter((node) => node.offsetParent && !node.closest("svg"))
    .map((node) => {
      const pair = [luminance(getComputedStyle(node).color), luminance(ground(node))].sort();
      const [low, high] = pair[0] < pair[1] ? pair : pair.reverse();
      return [(high + 0.05) / (low + 0.05), node.className + ": " + node.textContent.slice(0, 40)];
    })
    .filter(([ratio]) => ratio < 4.5);
})()"""


@pytest.fixture
def plan_html(minimax_plan: tuple[ModelPlan, str]) -> str:
    return minimax_plan[1]


@pytest.fixture(scope="module")
def verify_html() -> str:
    """A hundred layers, the first the worst, as verify orders them."""
    some = tuple(
        LayerCheck(
            f"model.layers.{index}.{leaf}_proj",
            128 * (index + 1),
            256,
            FP8_128X128_FP32,
            ScaleFacts(2, PowerOfTwo.NO, index, 0, 0, 0, 0.25, 4.0),
            DataError((100 - index) / 1000, 0.5, 30.0),
        )
        for index in range(50)
        for leaf in ("q", "o")
    )
    return verify_page(Verification(some, ()), "x", "y")


def test_nothing_is_loaded_and_nothing_goes_wrong(reader: Any, plan_html: str) -> None:
    reader.open(plan_html)
    assert reader.run("performance.getEntriesByType('resource').map(e => e.name)") == []
    assert reader.driver.get_log("browser") == []
    assert reader.run("document.documentElement.classList.contains('js')")


def test_a_click_sorts_and_another_turns_it(reader: Any, plan_html: str) -> None:
    reader.open(plan_html)
    button = reader.find("#layers-table th:nth-child(5) button")
    assert button.text.startswith("Weights")
    button.click()
    assert reader.column("layers-table", 4) == ["18.7 GB", "9.4 GB", "195.0 MB", "146.3 MB"]
    assert reader.run("document.querySelector('#layers-table th:nth-child(5)').ariaSort") == (
        "descending"
    )
    button.click()
    assert reader.column("layers-table", 4) == ["146.3 MB", "195.0 MB", "9.4 GB", "18.7 GB"]


def test_the_keyboard_sorts_too(reader: Any, plan_html: str) -> None:
    reader.open(plan_html)
    reader.find("#layers-table th:nth-child(1) button").send_keys("\n")
    leaves = [name.rpartition(".")[2] for name in reader.column("layers-table", 0)]
    assert leaves == ["w2", "w13", "o_proj", "qkv_proj"], "numbers in names count as numbers"


def test_a_row_unfolds_and_its_reasons_move_with_it(reader: Any, plan_html: str) -> None:
    reader.open(plan_html)
    first = reader.column("layers-table", 0)[0]
    summary = reader.find("#layers-table details summary")
    summary.click()
    reader.find("#layers-table th:nth-child(1) button").click()
    reader.find("#layers-table th:nth-child(1) button").click()
    found = reader.run("document.querySelector('details[open]').closest('tbody').innerText")
    assert first in found
    assert "deep_gemm" in found


def test_the_filter_keeps_rows_with_all_words(reader: Any, plan_html: str) -> None:
    reader.open(plan_html)
    everything = len(reader.column("rejections-table", 0))
    reader.find("input[data-filter='rejections-table']").send_keys("gemm BLOCK")
    kept = reader.run(
        "[...document.querySelectorAll('#rejections-table tbody tr')].filter(r => !r.hidden)"
        ".map(r => r.textContent.toLowerCase())"
    )
    assert 0 < len(kept) < everything
    assert all("gemm" in text and "block" in text for text in kept)


def test_long_tables_show_a_part_until_asked(reader: Any, verify_html: str) -> None:
    reader.open(verify_html)
    assert len(reader.column("layers-table", 0)) == 60
    button = reader.find("#layers-table + button.all")
    assert button.text == "Show all 100"
    # Sorting is over all rows, shown or not.
    reader.find("#layers-table th:nth-child(7) button").click()
    reader.find("#layers-table th:nth-child(7) button").click()
    assert reader.column("layers-table", 6)[0] == "0.0510"
    assert len(reader.column("layers-table", 0)) == 60
    reader.run("arguments[0].click()", button)
    assert len(reader.column("layers-table", 0)) == 100
    assert not button.is_displayed()


@pytest.mark.parametrize("page", ["plan", "verify"])
def test_a_phone_needs_no_sideways_scrolling(
    reader: Any, plan_html: str, verify_html: str, page: str
) -> None:
    reader.sit(*PHONE)
    reader.open(plan_html if page == "plan" else verify_html)
    assert reader.run("document.documentElement.scrollWidth") == PHONE[0]
    assert not reader.find("#layers-table thead").is_displayed()
    labels = reader.run("getComputedStyle(document.querySelector('td.num'), '::before').content")
    assert labels in {'"Layers"', '"N \u00d7 K"'}
    wide = reader.run(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.plot'))"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []


def test_a_phone_sorts_by_a_menu(reader: Any, plan_html: str) -> None:
    from selenium.webdriver.support.ui import Select

    reader.sit(*PHONE)
    reader.open(plan_html)
    menu = reader.find("select[data-sort-for='layers-table']")
    assert menu.is_displayed()
    Select(menu).select_by_visible_text("Weights ↑")
    assert reader.column("layers-table", 4) == ["146.3 MB", "195.0 MB", "9.4 GB", "18.7 GB"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["plan", "verify"])
def test_text_stands_out_in_both_colour_schemes(
    reader: Any, plan_html: str, verify_html: str, page: str, scheme: str
) -> None:
    """WCAG AA: a contrast of 4.5 for every text on the page, folded parts opened."""
    reader.sit(1280, 900, scheme)
    reader.open(plan_html if page == "plan" else verify_html)
    reader.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    red = int(reader.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
    assert (red < 60) == (scheme == "dark")
    assert reader.run(LUMINANCE) == []


def test_hostile_names_are_shown_and_not_run(reader: Any) -> None:
    name = '<script>hacked=1</script>"><img src=x onerror=hacked=1>'
    request = LinearRequest(name, 512, 512, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16)
    finding = Finding(Severity.FAULT, "x", name, name)
    plan = plan_model([request], Device.named("sm_90"), PlanPolicy(), BACKENDS, findings=[finding])
    reader.open(plan_page(plan, Subject(name, "bfloat16")))
    assert reader.run("typeof hacked") == "undefined"
    assert reader.run("document.images.length") == 0
    assert reader.find("h1").text == name
    assert reader.column("layers-table", 0) == [name]


def test_the_policy_stops_what_escaping_would_miss(reader: Any) -> None:
    plan = plan_model([], Device.named("cpu"), PlanPolicy(), BACKENDS)
    html = plan_page(plan, Subject("MARK", "bfloat16"))
    attack = "<script>hacked=1</script><img src='http://127.0.0.1:9/x' onerror='hacked=1'>"
    reader.open(html.replace("<h1>MARK</h1>", f"<h1>{attack}</h1>"))
    assert reader.run("typeof hacked") == "undefined"
    assert any(
        "Content Security Policy" in entry["message"] for entry in reader.driver.get_log("browser")
    )


def test_points_of_the_plot_name_their_layer(reader: Any, verify_html: str) -> None:
    reader.open(verify_html)
    titles = reader.run("[...document.querySelectorAll('circle title')].map(t => t.textContent)")
    assert len(titles) == 100
    assert titles[0] == "model.layers.0.o_proj: 0.1000"
    assert reader.run("document.querySelectorAll('.plot svg').length") == 2
    assert reader.find(".plot svg").size["height"] > 150
