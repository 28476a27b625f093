"""The demonstration on a few texts: every stage runs and every file is written."""

from __future__ import annotations

import dataclasses
import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
from rich.console import Console
from running_service import post, running

from gralora_fx.config.service_settings import ServiceSettings
from gralora_fx.demo import news_classifier as news_module
from gralora_fx.demo import news_writer, writing
from gralora_fx.demo import run as run_demo
from gralora_fx.demo.news_classifier import load_news
from gralora_fx.demo.timed_stages import Stages
from gralora_fx.errors import GraloraError
from gralora_fx.progress import console
from gralora_fx.serving import load


def test_news_split_is_seeded_and_covers_every_text() -> None:
    news = load_news(0)
    assert news.classes == ("business", "entertainment", "politics", "sports", "tech")
    assert len(news.train) + len(news.test) == 2225
    assert {label for _, label in news.test} == set(range(5))
    assert load_news(0) == news
    assert load_news(1) != news


def test_demo_writes_adapter_export_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    run_module = importlib.import_module("gralora_fx.demo.run")
    few_texts(monkeypatch, run_module, news_writer)
    monkeypatch.setattr(console, "FIRST", 0.01)
    monkeypatch.setattr(console, "SILENCE", 0.01)
    run_demo(tmp_path / "demo", epochs=1, seed=0, steps=4)
    output = capsys.readouterr().out
    assert "37 of 38 sites adapted" in output
    assert {"trace", "train", "comparing"} <= set(re.findall(r"^(.+?) \.\.\.$", output, re.MULTILINE))
    assert "test accuracy after, ONNX Runtime" in output
    report = (tmp_path / "demo" / "report.md").read_text()
    assert "largest logit difference" in report
    assert (tmp_path / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = peft.GraloraConfig.from_pretrained(str(tmp_path / "demo" / "adapter"))
    assert config.task_type == "SEQ_CLS"
    served = load(tmp_path / "demo" / "onnx")
    assert served.config["id2label"]["4"] == "tech"
    assert served(**dict(served.tokenizer(["Goal!"], return_tensors="np"))).logits.shape == (1, 5)
    assert "bits per character, sports, merged, ONNX Runtime" in report
    assert re.search(r"answers in one batch equal to those alone +│ 4 of 4", output)
    assert peft.GraloraConfig.from_pretrained(str(tmp_path / "demo" / "hybrid" / "adapter" / "sports")).r == 16
    answers_in_the_service(tmp_path / "demo" / "hybrid" / "onnx")


def answers_in_the_service(export: Path) -> None:
    """Base and adapter, asked at once over HTTP, each answer as alone."""
    model = load(export)
    alone = [model.generate("England", max_new_tokens=8, adapter=name) for name in (None, "sports")]
    with running(ServiceSettings(export)) as (url, _), ThreadPoolExecutor(2) as pool:

        def answer(name: str) -> str:
            body = {"model": name, "prompt": "England", "max_tokens": 8, "temperature": 0}
            text: str = post(f"{url}v1/completions", body)["choices"][0]["text"]
            return text

        assert list(pool.map(answer, ("onnx", "sports"))) == alone


def few_texts(monkeypatch: pytest.MonkeyPatch, *modules: object) -> None:
    """Let modules of the demonstration read a few texts instead of all."""
    news = load_news(0)
    small = dataclasses.replace(news, train=news.train[:32], test=news.test[:16])
    monkeypatch.setattr(news_writer, "_HELD_OUT", 8)
    for module in modules:
        monkeypatch.setattr(module, "load_news", lambda _: small)


def test_training_that_shows_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_texts(monkeypatch, news_writer)
    monkeypatch.setattr(writing, "trace", lambda model, **_: model)
    monkeypatch.setattr(writing, "train", lambda *_, **__: None)
    silent = Console(file=io.StringIO())
    with pytest.raises(GraloraError, match="training makes held-out text no likelier"):
        writing.write_news(tmp_path, Stages(silent, console.Heartbeat(silent)), steps=4, seed=0)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news_module, "find_spec", lambda _: None)
    with pytest.raises(news_module.GraloraError, match=r"install 'gralora-fx\[demo\]'"):
        load_news(0)
