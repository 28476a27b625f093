"""Photograph the page of the HTTP service into `docs/images/page.png`, in headless Chromium.

The model is the small one of `examples/peft_to_onnx.py`, trained and exported here with its adapter as data.

Run: python docs/draw_page.py
"""

from __future__ import annotations

import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait
from transformers import AutoModelForCausalLM

from gralora_fx import GraloraModel, trace
from gralora_fx.exporters import export_onnx

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "page.png"
WIDTH, HEIGHT = 1100, 720
QUESTIONS = ("What is the capital of Peru?", "Where is Kenya?")


def export(folder: Path) -> Path:
    """Train the example's checkpoint below a folder, and return an export of it."""
    runpy.run_path(str(ROOT / "examples" / "peft_to_onnx.py"))["make_checkpoint"](folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    gralora = GraloraModel.from_pretrained(
        trace(base, task="text-generation-with-past"), folder / "adapter", adapter_name="capitals"
    )
    export_onnx(gralora, folder / "countries", adapters="data", tokenizer=folder / "base")
    return folder / "countries"


def photograph(address: str) -> bytes:
    """Chat on the page at an address, and return a PNG of it."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(address)
        wait = WebDriverWait(driver, 60, ignored_exceptions=[Exception])
        wait.until(
            lambda _: Select(driver.find_element(By.CSS_SELECTOR, "#adapter select")).select_by_value("capitals") or 1
        )
        temperature = driver.find_element(By.NAME, "temperature")
        temperature.clear()
        temperature.send_keys("0")
        for turn, question in enumerate(QUESTIONS, 1):
            driver.find_element(By.NAME, "prompt").send_keys(question + "\n")
            wait.until(
                lambda _, turn=turn: "first after" in driver.find_elements(By.CSS_SELECTOR, ".note")[turn - 1].text
            )
        wait.until(lambda _: driver.find_element(By.NAME, "send").text == "Send")
        wait.until(lambda _: driver.find_element(By.CSS_SELECTOR, ".tile strong").text == str(len(QUESTIONS)))
        return driver.get_screenshot_as_png()
    finally:
        driver.quit()


def main() -> None:
    """Export, serve, photograph."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "gralora_fx.cli",
            "serve",
            "--onnx",
            str(export(Path(folder))),
            "--port",
            str(port),
        ]
        service = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert service.stderr is not None
            next(line for line in service.stderr if "running on http://" in line)
            PICTURE.write_bytes(photograph(f"http://127.0.0.1:{port}"))
        finally:
            service.terminate()
            service.wait(30)
    print(f"wrote {PICTURE}, {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
