"""Plans and verifications to report, and a browser to read the pages with."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.advice import advise
from blockscale.checkpoint.rank_plan import plan_rank
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import RequestOptions
from blockscale.checkpoint.schema import read_layers
from blockscale.formats import DType
from blockscale.planning.device import Device
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.sharded import Target
from blockscale.planning.sharding import Parallelism
from blockscale.report.plan_page import Subject, plan_page
from blockscale.testing.model_shapes import minimax_m25, write_model_headers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from blockscale.planning.plan import ModelPlan

WINDOW = (1280, 900)


@pytest.fixture(scope="session")
def minimax_plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPlan, str]:
    """MiniMax-M2.5 at TP 8 on a Blackwell GPU, where blocks are split; and its page."""
    folder = tmp_path_factory.mktemp("minimax")
    write_model_headers(folder, minimax_m25())
    checkpoint = read_checkpoint(folder)
    layers = read_layers(checkpoint)
    options = RequestOptions(DType.BFLOAT16, Parallelism(8))
    target = Target(Device.named("sm_100"), PlanPolicy(), BACKENDS)
    plan = plan_rank(checkpoint, layers, options, target).plan
    advice = advise(checkpoint, layers, DType.BFLOAT16, target, (1, 8))
    return plan, plan_page(plan, Subject("MiniMax-M2.5", "bfloat16", 8), advice)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium that Debian's packages bring; .ci/run installs them."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = Options()
    options.binary_location = browser
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's sandbox does not run as root.
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    yield running
    running.quit()


class Reader:
    """Someone who reads a page: on a screen of some size, in the light or in the dark."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self.folder = folder

    def sit(self, width: int, height: int, scheme: str = "light") -> None:
        """Change the screen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, html: str) -> None:
        """Open a page from a file, as a user would."""
        file = self.folder / "page.html"
        file.write_text(html, encoding="utf-8")
        self.driver.get(file.as_uri())

    def run(self, script: str, *arguments: object) -> Any:
        """The value of a script in the page."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def find(self, selector: str) -> Any:
        """The first element."""
        return self.driver.find_element("css selector", selector)

    def column(self, table: str, index: int) -> list[str]:
        """Texts of a column's visible cells, from the top."""
        return self.run(
            "[...document.querySelectorAll(`#${arguments[0]} tr`)]"
            ".filter(r => r.cells.length > 1 && r.offsetParent && r.cells[0].tagName === 'TD')"
            ".map(r => r.cells[arguments[1]].innerText.trim())",
            table,
            index,
        )


@pytest.fixture
def reader(chromium: Any, tmp_path: Path) -> Reader:
    """At a desktop, in light colours."""
    made = Reader(chromium, tmp_path)
    made.sit(*WINDOW)
    return made
