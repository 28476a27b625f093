"""The page at `/` in headless Chromium: it shows what the routes answer, and nothing that it shows can run."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from running_service import post, running
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait
from sentence_encoders import save_encoder
from served_exports import chat_tokenizer, decoders
from tiny_image_processors import drawn_image, tiny_processor
from tiny_models import tiny_model
from tiny_speech import sound, wav, whisper_export

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.format import adapter_paths
from gralora_fx.service.replies import TextAnswers
from gralora_fx.serving import Decoder, load
from tests.architectures.image_prompts import tiny_image_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
HOSTILE = "<img src=x onerror=document.title='hacked'>"
LABELS: dict[str, Any] = {"num_labels": 3, "id2label": {0: "sport", 1: HOSTILE, 2: "law"}, "pad_token_id": 0}
ANSWERED = "first after"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="there is no chromium with its chromedriver: apt-get install chromium chromium-driver",
)


class Page:
    """A browser on the page of a service."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.url = ""

    def open(self, url: str, *, width: int = 1200) -> None:
        """Load the page afresh; wait until it shows the service, or asks for its key."""
        self.url = url
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # what other tests left
        self.driver.get(url)
        self.wait(lambda: self.shown("#service") or self.shown("#key") or self.shown("#api"))

    def wait(self, condition: Callable[[], Any]) -> Any:
        waiting = WebDriverWait(self.driver, 15, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: condition())

    def all(self, selector: str) -> list[WebElement]:
        """Return the elements that are shown."""
        return [found for found in self.driver.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]

    def shown(self, selector: str) -> bool:
        return bool(self.all(selector))

    def one(self, selector: str) -> WebElement:
        """Return the only element that is shown."""
        found = self.all(selector)
        if len(found) != 1:  # which a wait goes on after
            raise NoSuchElementException(f"{len(found)} elements are {selector}, not one")
        return found[0]

    def mode(self, name: str) -> None:
        """Choose what to do."""
        (choice,) = [label for label in self.all("#modes label") if label.text == name]
        choice.click()

    def fill(self, selector: str, value: str) -> None:
        field = self.one(selector)
        field.clear()
        field.send_keys(value)

    def choose(self, adapter: str) -> None:
        Select(self.one("#adapter select")).select_by_value(adapter)

    def complete(self, prompt: str, count: int = 12) -> str:
        """Return the streamed answer to a prompt, and nothing of what was there before."""
        self.one("button[name=clear]").click()
        self.fill("textarea[name=prompt]", prompt)
        self.fill("input[name=temperature]", "0")
        self.fill("input[name=max_tokens]", str(count))
        self.one("button[name=send]").click()
        self.wait(lambda: ANSWERED in self.one(".note").text and self.one("button[name=send]").text == "Send")
        return str(self.one(".answer").get_property("textContent"))

    def bars(self) -> list[tuple[str, float, float]]:
        """Each bar's name, its value, and how much of its width is filled."""
        rows = self.wait(lambda: self.all(".bars li"))
        parts = [
            [row.find_element(By.CSS_SELECTOR, part) for part in (".name", ".value", ".track", ".fill")] for row in rows
        ]
        fraction = "return parseFloat(arguments[0].style.width) / 100"  # its end: the bar grows slowly
        return [
            (name.text, float(text.text), self.driver.execute_script(fraction, fill)) for name, text, _, fill in parts
        ]

    def tile(self, title: str) -> float:
        """Return the number of a tile."""
        tiles = {tile.find_element(By.TAG_NAME, "h3").text: tile for tile in self.all(".tile")}
        return float(tiles[title].find_element(By.TAG_NAME, "strong").text.replace(",", ""))

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [message["request"]["url"] for message in sent]

    def problems(self) -> list[str]:
        """Return the messages of the browser's console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def is_too_wide(self) -> bool:
        """Return whether the page scrolls sideways."""
        return bool(self.driver.execute_script("return document.documentElement.scrollWidth > innerWidth"))


@pytest.fixture(scope="session")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def page(driver: webdriver.Chrome) -> Iterator[Page]:
    yield Page(driver)
    driver.get("about:blank")  # its polling ends with the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def services() -> Iterator[Callable[[ServiceSettings], tuple[str, Any]]]:
    """Start services, which end with the module."""
    with ExitStack() as stack:
        yield lambda settings: stack.enter_context(running(settings))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Path:
    return decoders(folder, "data")[0]["data"]


@pytest.fixture(scope="module")
def text_service(decoder: Path, services: Any) -> tuple[str, Any]:
    hostile = {HOSTILE: decoder / "adapters" / "wide.onnx_adapter"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_paths, "_NAME", re.compile(".+"))  # the service itself takes plain names alone
        return services(ServiceSettings(decoder, max_batch=1, adapters=hostile))  # type: ignore[no-any-return]


def by_api(url: str, model: str, prompt: str, count: int = 12) -> str:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": count}
    found = post(f"{url}v1/completions", body)
    return str(found["choices"][0]["text"])


def test_the_page_shows_the_model_and_asks_nobody_else(page: Page, text_service: tuple[str, Any]) -> None:
    page.open(text_service[0])
    assert page.one("h1").text == "data"
    page.wait(lambda: page.one("#status").text == "Ready")
    facts = dict(zip([e.text for e in page.all("#facts dt")], [e.text for e in page.all("#facts dd")], strict=True))
    assert facts["Task"] == "text-generation-with-past"
    assert facts["Context"] == "64 tokens"
    assert facts["Adapters"] == "3, data"
    assert [option.text for option in Select(page.one("#adapter select")).options] == [
        "data (no adapter)",
        HOSTILE,
        "small",
        "wide",
    ]
    assert "word by word" in page.one(".empty").text
    page.wait(lambda: [tile.text for tile in page.all(".tile h3")][:2] == ["Requests", "Tokens/s"])
    hosts = {urlsplit(url).netloc for url in page.requests()}
    assert hosts == {urlsplit(page.url).netloc}
    assert page.problems() == []


def test_a_streamed_answer_is_the_apis(page: Page, text_service: tuple[str, Any]) -> None:
    url = text_service[0]
    page.open(url)
    page.mode("Complete")
    answers = []
    for model in ("data", "wide", HOSTILE):
        page.choose(model)
        answers.append(page.complete("Hello there"))
        assert len(page.one(".answer").get_property("childNodes")) == 1  # one a token is slow
        assert answers[-1] == by_api(url, model, "Hello there")
        note = page.one(".note").text
        assert note.startswith(f"{model} · 12 tokens · ")
    assert answers[0] != answers[1]
    assert answers[1] == answers[2]  # the same adapter under a name that is markup
    assert page.driver.title == "data · gralora-fx"
    assert not page.driver.find_elements(By.CSS_SELECTOR, "main img")
    assert page.problems() == []


def test_a_chat_goes_on(page: Page, text_service: tuple[str, Any]) -> None:
    url = text_service[0]
    page.open(url)
    page.choose("small")
    page.fill("input[name=temperature]", "0")
    page.fill("input[name=max_tokens]", "8")
    messages: list[dict[str, str]] = []
    for turn, text in enumerate(("hi", "go on"), 1):
        page.one("textarea[name=prompt]").send_keys(text + "\n")
        page.wait(lambda turn=turn: len(page.all(".answer")) == turn and ANSWERED in page.all(".note")[-1].text)
        page.wait(lambda: page.one("button[name=send]").text == "Send")
        messages.append({"role": "user", "content": text})
        body = {"model": "small", "messages": messages, "temperature": 0, "max_tokens": 8}
        reference = post(f"{url}v1/chat/completions", body)["choices"][0]["message"]["content"]
        assert page.all(".answer")[-1].get_property("textContent") == reference
        messages.append({"role": "assistant", "content": reference})


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 2}},
    "required": ["a"],
    "additionalProperties": False,
}


def unfold(page: Page, title: str) -> None:
    """Open a box below the prompt."""
    (found,) = [summary for summary in page.all("summary") if summary.text == title]
    found.click()


def test_a_system_prompt_a_form_and_the_same_by_curl(page: Page, text_service: tuple[str, Any]) -> None:
    url = text_service[0]
    page.open(url)
    page.choose("small")
    page.fill("input[name=temperature]", "0")
    page.fill("input[name=max_tokens]", "30")
    unfold(page, "System prompt")
    page.fill("textarea[name=system]", "Go")
    unfold(page, "Form of the answer")
    page.fill("textarea[name=schema]", json.dumps(SCHEMA))
    assert [summary.text for summary in page.all("summary")][:2] == ["System prompt", "Form of the answer"]
    assert len(page.all(".is-set")) == 2
    page.fill("textarea[name=prompt]", "it's")
    unfold(page, "Copy as curl")
    command = page.one("pre").get_property("textContent")
    page.one("button[name=copy]").click()
    page.wait(lambda: page.one(".copied").text)
    words = shlex.split(str(command).replace("\\\n", " "))
    assert words[:3] == ["curl", "-N", f"{url}v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["messages"] == [{"role": "system", "content": "Go"}, {"role": "user", "content": "it's"}]
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert body.pop("stream") is True
    assert body.pop("stream_options") == {"include_usage": True}
    reference = post(words[2], body)["choices"][0]["message"]["content"]
    assert list(json.loads(reference)) == ["a"]
    page.one("button[name=send]").click()
    page.wait(lambda: ANSWERED in page.one(".note").text and page.one("button[name=send]").text == "Send")
    assert page.one(".answer").get_property("textContent") == reference
    after = json.loads(shlex.split(str(page.one("pre").get_property("textContent")).replace("\\\n", " "))[-1])
    assert [message["content"] for message in after["messages"]] == ["Go", "it's", reference, ""]
    page.mode("Complete")
    assert [summary.text for summary in page.all("summary")] == ["Form of the answer", "Copy as curl"]
    assert page.problems() == []


def test_forms_that_cannot_be_taken(page: Page, text_service: tuple[str, Any]) -> None:
    page.open(text_service[0])
    page.mode("Complete")
    unfold(page, "Form of the answer")
    page.fill("textarea[name=prompt]", "Hello")
    page.fill("textarea[name=schema]", '{"type": ')
    unfold(page, "Form of the answer")  # closes it
    page.one("button[name=send]").click()
    page.wait(lambda: "This is not JSON" in page.one(".more .error").text)
    field = page.one("textarea[name=schema]")
    assert page.driver.switch_to.active_element == field
    assert field.get_attribute("aria-invalid") == "true"
    assert page.shown(".empty")
    page.fill("textarea[name=schema]", '{"type": "object", "propertyNames": {"maxLength": 3}}')
    assert not page.shown(".panel .error")
    page.one("button[name=send]").click()
    page.wait(lambda: page.shown(".panel .error"))
    assert page.one(".panel .error").text.startswith("400: ")
    assert "propertyNames" in page.one(".panel .error").text
    assert page.one("textarea[name=prompt]").get_property("value") == "Hello"


def test_cached_tokens_are_shown(page: Page, text_service: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = TextAnswers.usage
    details = {"prompt_tokens_details": {"cached_tokens": 4}}
    monkeypatch.setattr(TextAnswers, "usage", lambda answers: {**usage(answers), **details})
    page.open(text_service[0])
    page.mode("Complete")
    page.complete("Hello", 4)
    assert page.one(".note").text.endswith(" · cut at max tokens · 4 of 5 prompt tokens cached")


def test_the_share_of_cached_tokens(page: Page, text_service: tuple[str, Any]) -> None:
    url = text_service[0]
    page.open(url)
    for _ in range(2):
        by_api(url, "wide", "abc" * 16)
    metrics = urlopen(f"{url}metrics", timeout=30).read().decode()
    hits, queries = (
        float(re.findall(rf"^gralora_fx_prefix_cache_{kind}_total (\S+)$", metrics, re.MULTILINE)[0])
        for kind in ("hits", "queries")
    )
    assert hits > 0
    page.wait(lambda: page.tile("Prompts cached") == pytest.approx(100 * hits / queries, abs=0.06))


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(page: Page, text_service: tuple[str, Any]) -> None:
    page.open(text_service[0])
    for title in ("System prompt", "Form of the answer", "Copy as curl"):
        unfold(page, title)
    controls = {"textbox", "spinbutton", "button", "combobox", "radio", "DisclosureTriangle", "link"}
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in controls]
    assert len(found) >= 16
    assert [node["role"]["value"] for node in found if not node["name"]["value"].strip()] == []
    page.one("textarea[name=prompt]").click()
    reached = []
    for _ in range(11):
        webdriver.ActionChains(page.driver).send_keys(Keys.TAB).perform()
        focused = page.driver.switch_to.active_element
        reached.append(focused.get_attribute("name") or focused.tag_name)
    expected = [
        "temperature",
        "max_tokens",
        "seed",
        "clear",
        "send",
        "summary",
        "system",
        "summary",
        "schema",
        "summary",
    ]
    assert reached == [*expected, "pre"]


def test_errors_are_shown(page: Page, text_service: tuple[str, Any]) -> None:
    page.open(text_service[0])
    for mode in ("Chat", "Complete"):
        page.mode(mode)
        page.fill("textarea[name=prompt]", "a" * 70)
        page.one("button[name=send]").click()
        page.wait(lambda: page.shown(".panel .error"))
        assert "beyond the context of 64 tokens" in page.one(".panel .error").text
        assert page.one("textarea[name=prompt]").get_property("value") == "a" * 70
        assert page.shown(".empty")
    page.complete("Hello")
    assert not page.shown(".panel .error")


def test_stop_frees_the_row(page: Page, text_service: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    url, app = text_service
    permits = threading.Semaphore(3)
    step = Decoder.step

    def held(decoder: Decoder, tokens: Any, *more: Any) -> Any:
        assert permits.acquire(timeout=30)
        return step(decoder, tokens, *more)

    monkeypatch.setattr(Decoder, "step", held)
    page.open(url)
    page.fill("textarea[name=prompt]", "Hello")
    page.fill("input[name=temperature]", "0")  # tokens that are drawn may have no text
    page.fill("input[name=max_tokens]", "30")
    page.one("button[name=send]").click()
    page.wait(lambda: page.one(".answer").text)
    queue = app.state.engine.queue
    assert queue.running == 1
    page.one("button[name=send]").click()
    page.wait(lambda: "stopped" in page.one(".note").text)
    page.wait(lambda: permits.release() or queue.running == 0)  # the step that ran when the button was pressed
    assert page.one("button[name=send]").text == "Send"
    assert not page.shown(".panel .error")
    permits.release(100)
    page.mode("Complete")
    assert page.complete("Hello", 4) == by_api(url, "data", "Hello", 4)


def test_metrics_are_live(page: Page, text_service: tuple[str, Any]) -> None:
    url = text_service[0]
    page.open(url)

    page.wait(lambda: page.one("#status").text == "Ready")
    before = page.tile("Requests")
    by_api(url, "small", "Hello")
    page.wait(lambda: page.tile("Requests") == before + 1)


def test_what_is_rejected_is_of_the_requests(page: Page, text_service: tuple[str, Any]) -> None:
    url = text_service[0]
    page.open(url)
    page.wait(lambda: page.one("#status").text == "Ready")
    before = [page.tile(title) for title in ("Requests", "Rejected")]
    for path, body in (("nothing", None), ("v1/models/nothing", None), ("v1/completions", {}), ("nothing", {})):
        data = None if body is None else json.dumps(body).encode()
        with pytest.raises(HTTPError):
            urlopen(Request(url + path, data, {"Content-Type": "application/json"}), timeout=30)
    page.wait(lambda: [page.tile(title) for title in ("Requests", "Rejected")] == [count + 2 for count in before])


def test_max_tokens_have_a_bound(page: Page, text_service: tuple[str, Any]) -> None:
    page.open(text_service[0])
    for mode in ("Chat", "Complete"):
        page.mode(mode)
        field = page.one("input[name=max_tokens]")
        assert field.find_element(By.XPATH, "..").text.startswith("Max tokens")
        assert [field.get_property(name) for name in ("min", "max", "value")] == ["1", "63", "32"]
        page.fill("textarea[name=prompt]", "a")
        page.fill("input[name=max_tokens]", "64")
        page.one("button[name=send]").click()
        assert page.driver.execute_script("return arguments[0].validity.rangeOverflow", field)
        assert page.shown(".empty")


def test_a_key_is_asked_for(page: Page, decoder: Path, services: Any) -> None:
    page.open(services(ServiceSettings(decoder, api_key="secret"))[0])
    assert not page.shown("#service")
    page.fill("input[name=key]", "wrong")
    page.one("#key button").click()
    page.wait(lambda: "the service does not take this key" in page.one("#key .error").text)
    page.fill("input[name=key]", "secret")
    page.one("#key button").click()
    page.wait(lambda: page.shown("#service") and not page.shown("#key"))
    page.mode("Complete")
    assert page.complete("Hello", 4)
    kept = "return localStorage.length + sessionStorage.length + document.cookie.length"
    assert page.driver.execute_script(kept) == 0


@pytest.fixture(scope="module")
def encoders(folder: Path, services: Any) -> dict[str, str]:
    """Addresses of services of a classifier, a sentence encoder and a model of tensors."""
    export_onnx(trace(tiny_model("bert", **LABELS)), folder / "news", verify=False, tokenizer=chat_tokenizer())
    encoder = save_encoder("bert", folder, "mean")
    export_onnx(load_traced(str(encoder), None, None), folder / "sentences", tokenizer=str(encoder), verify=False)
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    export_onnx(trace(network, (torch.randn(2, 4),)), folder / "net", verify=False)
    convolution = torch.nn.Conv2d(3, 4, 3, stride=8)
    fixed = trace(convolution, (torch.randn(1, 3, 224, 224),), dynamic=False)
    export_onnx(fixed, folder / "image", verify=False)
    return {name: services(ServiceSettings(folder / name))[0] for name in ("news", "sentences", "net", "image")}


def test_bars_of_labels(page: Page, encoders: dict[str, str]) -> None:
    page.open(encoders["news"])
    page.mode("Classify")
    for text in ("A text of the news", HOSTILE):
        page.fill("textarea[name=text]", text)
        page.one(".panel button.primary").click()
        (answer,) = post(f"{page.url}classify", {"input": [text]})["data"]
        pairs = sorted(zip(answer["labels"], answer["probs"], strict=True), key=lambda pair: -pair[1])
        shown = [(label, round(score, 3)) for label, score in pairs]
        page.wait(lambda shown=shown: [bar[:2] for bar in page.bars()] == shown)
        assert [filled for _, _, filled in page.bars()] == pytest.approx([score for _, score in pairs], abs=1e-3)
    assert HOSTILE in [label for label, _ in shown]
    assert page.driver.title == "news · gralora-fx"


def test_bars_of_similarities(page: Page, encoders: dict[str, str]) -> None:
    page.open(encoders["sentences"])
    assert page.one("#no-adapters").text == "This export has no choice of adapters."
    page.one("button[name=add]").click()
    texts = ["Hello there", "Hello there", "something else", "x y z"]
    page.fill("textarea[name=first]", texts[0])
    for field, text in zip(page.all(".other textarea"), texts[1:], strict=True):
        field.send_keys(text)
    page.one(".panel button.primary").click()
    body = {"model": "sentences", "input": texts}
    data = post(f"{page.url}v1/embeddings", body)["data"]
    first, *others = [np.asarray(entry["embedding"]) for entry in data]
    cosines = [float(first @ other / np.linalg.norm(first) / np.linalg.norm(other)) for other in others]
    expected = sorted(zip(texts[1:], cosines, strict=True), key=lambda pair: -pair[1])
    bars = page.bars()
    assert [name for name, _, _ in bars] == [text for text, _ in expected]
    assert [value for _, value, _ in bars] == pytest.approx([cosine for _, cosine in expected], abs=1e-3)
    assert bars[0][1] == 1


def operate(page: Page, path: str) -> None:
    """Try GET of a path in Swagger UI."""
    selector = f".opblock-get:has(.opblock-summary-path[data-path='{path}'])"
    page.wait(lambda: page.shown(selector))
    page.one(f"{selector} .opblock-summary-control").click()
    page.wait(lambda: page.shown(f"{selector} .try-out__btn"))
    page.one(f"{selector} .try-out__btn").click()
    page.wait(lambda: page.shown(f"{selector} .execute"))
    page.one(f"{selector} .execute").click()
    page.wait(lambda: page.shown(f"{selector} .live-responses-table"))
    status = page.all(f"{selector} .live-responses-table tr.response td.response-col_status")
    assert status[0].text.startswith("200")


def test_docs(page: Page, encoders: dict[str, str]) -> None:
    page.open(f"{encoders['news']}docs")
    operate(page, "/info")
    described = {found.get_attribute("data-path") for found in page.all(".opblock-post .opblock-summary-path")}
    assert {"/classify", "/v2/models/{name}/infer"} <= described
    hosts = {urlsplit(url).netloc for url in page.requests() if not url.startswith("data:")}
    assert hosts == {urlsplit(page.url).netloc}
    assert page.problems() == []
    page.open(f"{encoders['news']}docs", width=360)
    page.wait(lambda: page.shown(".opblock"))
    assert not page.is_too_wide()


def test_docs_ask_for_a_key(page: Page, decoder: Path, services: Any) -> None:
    page.open(f"{services(ServiceSettings(decoder, api_key='secret'))[0]}docs")
    assert not page.shown("#api .opblock")
    page.fill("input[name=key]", "wrong")
    page.one("#key button").click()
    page.wait(lambda: "the service does not take this key" in page.one("#key .error").text)
    page.fill("input[name=key]", "secret")
    page.one("#key button").click()
    operate(page, "/v1/models")
    assert not page.shown("#key")
    kept = "return localStorage.length + sessionStorage.length + document.cookie.length"
    assert page.driver.execute_script(kept) == 0


@pytest.mark.parametrize("name", ["news", "sentences", "net", "image"])
def test_the_request_that_is_there_runs(page: Page, encoders: dict[str, str], name: str) -> None:
    page.open(encoders[name])
    if page.shown("#modes"):
        page.mode("Tensors")
    request = str(page.one("textarea[name=request]").get_property("value"))
    answer = urlopen(
        Request(f"{page.url}v2/models/{name}/infer", request.encode(), {"Content-Type": "application/json"}), timeout=30
    )
    outputs = json.load(answer)["outputs"]
    page.one(".panel button.primary").click()
    page.wait(lambda: page.shown(".output"))
    assert [output.text.partition(" ")[0] for output in page.all(".output")] == [output["name"] for output in outputs]
    assert page.shown(".panel .note") == (name == "image")
    page.wait(lambda: page.one("#status").text == "Ready")
    titles = [tile.text for tile in page.all(".tile h3")]
    assert ("Tokens/s" in titles) == (name in ("news", "sentences"))
    assert ("Context" in [fact.text for fact in page.all("#facts dt")]) == ("Tokens/s" in titles)
    assert page.problems() == []


def test_tensors_and_their_command(page: Page, encoders: dict[str, str]) -> None:
    page.open(encoders["net"])
    assert "any, 4" in page.one(".tables").text
    page.one(".panel button.primary").click()
    page.wait(lambda: page.shown(".output"))
    words = shlex.split(page.one("pre").text.replace("\\\n", " "))
    assert words[:2] == ["curl", f"{page.url}v2/models/net/infer"]
    body = json.loads(words[words.index("-d") + 1])
    assert body == json.loads(str(page.one("textarea[name=request]").get_property("value")))
    output = post(words[1], body)["outputs"][0]
    shown = [float(value) for value in page.one(".output code").text.split()]
    assert shown == pytest.approx(output["data"], abs=1e-4)
    page.fill("textarea[name=request]", "{")
    page.one(".panel button.primary").click()
    page.wait(lambda: "400: the body is not JSON" in page.one(".panel .error").text)


def test_narrow_windows_do_not_scroll_sideways(
    page: Page, text_service: tuple[str, Any], encoders: dict[str, str]
) -> None:
    for url in (text_service[0], *encoders.values()):
        page.open(url, width=360)
        assert not page.is_too_wide(), url
        for mode in [label.text for label in page.all("#modes label")]:
            page.mode(mode)
            assert not page.is_too_wide(), (url, mode)
    page.open(text_service[0], width=360)
    page.mode("Complete")
    page.choose(HOSTILE)
    page.complete("Hello there", 40)
    assert not page.is_too_wide()


def test_bars_of_relevance(page: Page, folder: Path, services: Any) -> None:
    model = tiny_model("bert", num_labels=1, pad_token_id=0)
    export_onnx(trace(model, task="text-classification"), folder / "cross", verify=False, tokenizer=chat_tokenizer())
    page.open(services(ServiceSettings(folder / "cross"))[0])
    documents = ["rivers", "x y z", "A rather longer document"]
    page.fill("textarea[name=query]", "rivers")
    page.one("textarea[name=documents]").send_keys("\n\n".join(documents))
    page.one(".panel button.primary").click()
    results = post(f"{page.url}v1/rerank", {"query": "rivers", "documents": documents})["results"]
    shown = [(documents[result["index"]], round(result["relevance_score"], 3)) for result in results]
    assert len(shown) == 3
    page.wait(lambda: [bar[:2] for bar in page.bars()] == shown)


@pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning")  # of training alone
def test_speech_is_written_down(page: Page, folder: Path, services: Any) -> None:
    from gralora_fx.features.speech.recordings import read_audio

    shutil.copytree(whisper_export(), folder / "whisper")
    (folder / "a.wav").write_bytes(wav(sound()))
    (folder / "long.wav").write_bytes(wav(sound(seconds=1.5)))
    url, _ = services(ServiceSettings(folder / "whisper"))
    page.open(url)
    assert page.one("#panels form").text.startswith("Recording")
    page.one("input[name=file]").send_keys(str(folder / "long.wav"))
    page.one("#panels .primary").click()
    page.wait(lambda: "1.5 seconds long, and the model reads 1" in page.one("#panels .error").text)
    page.one("input[name=file]").send_keys(str(folder / "a.wav"))
    page.fill("input[name=language]", "de")
    page.one("#panels .primary").click()
    expected = load(folder / "whisper").generate(read_audio(wav(sound()), 1).samples, language="de", task="transcribe")
    said = page.wait(lambda: page.one("#panels .result p:not(.empty)"))
    assert said.get_property("textContent") == expected.strip()
    assert not page.shown("#panels .error")
    assert not page.is_too_wide()
    assert all("400" in problem for problem in page.problems())


def give(page: Page, kind: str, name: str, data: bytes) -> None:
    """Paste or drop a file onto the chat."""
    page.driver.execute_script(
        """const [target, kind, name, text] = arguments;
        const data = new DataTransfer();
        const type = name.endsWith('.png') ? 'image/png' : 'text/plain';
        data.items.add(new File([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], name, { type }));
        const options = { bubbles: true, cancelable: true };
        target.dispatchEvent(
          kind === 'paste'
            ? new ClipboardEvent('paste', { clipboardData: data, ...options })
            : new DragEvent('drop', { dataTransfer: data, ...options }),
        );""",
        page.one("textarea[name=prompt]"),
        kind,
        name,
        base64.b64encode(data).decode(),
    )


def test_images_are_chosen_pasted_and_dropped(
    page: Page, folder: Path, services: Any, text_service: tuple[str, Any]
) -> None:
    source = tiny_image_model("LlavaForConditionalGeneration", vocab_size=128, max_position_embeddings=512).eval()
    traced = trace(source, task="image-text-to-text-with-past")
    export_onnx(traced, folder / "sees", verify=False, tokenizer=tiny_processor(source))
    files = [folder / f"picture{number}.png" for number in range(3)]
    for seed, file in enumerate(files):
        drawn_image(70, 50, seed).save(file)
    urls = [f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files]
    page.open(services(ServiceSettings(folder / "sees"))[0])
    page.fill("input[name=temperature]", "0")
    page.fill("input[name=max_tokens]", "8")

    def attached() -> list[str]:
        return [str(image.get_attribute("src")) for image in page.all(".attached img")]

    page.one("input[name=images]").send_keys(str(files[0]))
    page.wait(lambda: attached() == urls[:1])
    give(page, "paste", "pasted.png", files[1].read_bytes())
    page.wait(lambda: attached() == urls[:2])
    give(page, "drop", "dropped.png", files[2].read_bytes())
    page.wait(lambda: attached() == urls)
    give(page, "drop", "notes.txt", b"text")
    page.wait(lambda: page.one(".panel .error").text == "notes.txt is not an image.")
    page.one("button[aria-label='Remove image 2']").click()
    page.wait(lambda: attached() == [urls[0], urls[2]])
    page.fill("textarea[name=prompt]", "What is it?")
    page.one("button[name=send]").click()
    page.wait(lambda: ANSWERED in page.one(".note").text and page.one("button[name=send]").text == "Send")
    assert [image.get_attribute("src") for image in page.all(".prompt img")] == [urls[0], urls[2]]
    assert attached() == []
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in (urls[0], urls[2])]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}
    body = {"model": "sees", "messages": [asked], "temperature": 0, "max_tokens": 8}
    reference = post(f"{page.url}v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert page.one(".answer").get_property("textContent") == reference
    unfold(page, "Copy as curl")
    command = shlex.split(str(page.one("pre").get_property("textContent")).replace("\\\n", " "))
    assert json.loads(command[-1])["messages"][0] == asked  # the chat goes on with them
    assert page.problems() == []
    page.open(text_service[0])
    assert not page.shown("input[name=images]")  # of a model that reads texts alone
