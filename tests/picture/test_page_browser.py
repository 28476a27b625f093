"""The page in headless Chromium: a wide graph can be read, as a whole and close up, by pointer and by keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By
from torch import Tensor, nn

from gralora_fx import LoraConfig, rewrite, trace

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
READABLE = 0.6

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="there is no chromium with its chromedriver: apt-get install chromium chromium-driver",
)


class Branches(nn.Module):
    """Layers side by side, so that the graph is far wider than a screen."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({f"branch_{index}": nn.Linear(8, 8) for index in range(20)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches.values()]).sum(0)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = rewrite(trace(Branches(), (torch.randn(2, 8),)), LoraConfig(r=2, target_modules="all-linear"))
    path: Path = tmp_path_factory.mktemp("page") / "wide.html"
    model.to_html(path)
    return path


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


def opened(driver: webdriver.Chrome, page: Path, width: int) -> Any:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.as_uri())
    return driver.find_element(By.ID, "paper")


def sizes(driver: webdriver.Chrome) -> dict[str, float]:
    """Widths of the graph and of the area that shows it, the place of that area, and the scale of the graph."""
    result: dict[str, float] = driver.execute_script(
        "const p = document.getElementById('paper'), g = p.querySelector('svg');"
        "return {graph: g.getBoundingClientRect().width, area: p.clientWidth, left: p.scrollLeft,"
        " drawn: g.getBoundingClientRect().width / g.viewBox.baseVal.width,"
        " overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth}"
    )
    return result


@pytest.mark.parametrize("width", [400, 1200, 2400])
def test_a_wide_graph_starts_readable_and_fits_when_asked(driver: webdriver.Chrome, page: Path, width: int) -> None:
    paper = opened(driver, page, width)
    first = sizes(driver)
    assert first["drawn"] >= READABLE - 0.01
    assert first["overflow"] <= 0  # the graph scrolls in its own area, the page does not
    driver.find_element(By.ID, "fit").click()
    fitted = sizes(driver)
    assert fitted["graph"] <= fitted["area"]
    assert fitted["drawn"] <= 1
    paper.send_keys("0")
    assert sizes(driver)["drawn"] == pytest.approx(1, abs=0.01)
    assert driver.find_element(By.ID, "scale").text == "100 %"
    assert driver.get_log("browser") == []


def test_keys_buttons_and_the_wheel_zoom(driver: webdriver.Chrome, page: Path) -> None:
    paper = opened(driver, page, 1200)
    paper.send_keys("0")
    for action, factor in (("+", 1.25), ("-", 0.8), ("larger", 1.25), ("smaller", 0.8)):
        before = sizes(driver)["drawn"]
        paper.send_keys(action) if len(action) == 1 else driver.find_element(By.ID, action).click()
        assert sizes(driver)["drawn"] == pytest.approx(before * factor, rel=0.01)
    box = paper.rect
    at = {"x": box["x"] + box["width"] / 2, "y": 20}
    wheel = {"type": "mouseWheel", "deltaX": 0, "deltaY": -100, **at}
    driver.execute_script("document.getElementById('paper').scrollIntoView()")
    driver.execute_cdp_cmd("Input.dispatchMouseEvent", {**wheel, "modifiers": 2})  # with Ctrl
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert sizes(driver)["drawn"] > 1.1


def test_dragging_moves_the_graph(driver: webdriver.Chrome, page: Path) -> None:
    paper = opened(driver, page, 1200)
    driver.execute_script("document.getElementById('paper').scrollIntoView()")
    left, x = sizes(driver)["left"], paper.rect["x"] + 300
    for kind, moved in (("mousePressed", 0), ("mouseMoved", -120), ("mouseReleased", -120), ("mouseMoved", 50)):
        event = {"type": kind, "x": x + moved, "y": 60, "button": "left", "clickCount": 1}
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)
    assert sizes(driver)["left"] == pytest.approx(left + 120, abs=2)
