"""The demonstration on a few texts: every stage runs and every file is written."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import peft
import pytest

from gralora_fx.demo import news_classifier as news_module
from gralora_fx.demo import run as run_demo
from gralora_fx.demo.news_classifier import load_news
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
    news = load_news(0)
    small = dataclasses.replace(news, train=news.train[:32], test=news.test[:16])
    monkeypatch.setattr(run_module, "load_news", lambda _: small)
    monkeypatch.setattr(console, "SILENCE", 0.1)
    run_demo(tmp_path / "demo", epochs=1, seed=0)
    output = capsys.readouterr().out
    assert "37 of 38 sites adapted" in output
    assert {"trace", "train", "export and verify"} <= set(
        re.findall(r"^(.+?) +\d+\.\d s so far$", output, re.MULTILINE)
    )
    assert "test accuracy after, ONNX Runtime" in output
    report = (tmp_path / "demo" / "report.md").read_text()
    assert "largest logit difference" in report
    assert (tmp_path / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = peft.GraloraConfig.from_pretrained(str(tmp_path / "demo" / "adapter"))
    assert config.task_type == "SEQ_CLS"
    served = load(tmp_path / "demo" / "onnx")
    assert served.config["id2label"]["4"] == "tech"
    assert served(**dict(served.tokenizer(["Goal!"], return_tensors="np"))).logits.shape == (1, 5)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news_module, "find_spec", lambda _: None)
    with pytest.raises(news_module.GraloraError, match=r"install gralora-fx\[demo\]"):
        load_news(0)
