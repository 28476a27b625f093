"""The demonstration on a few texts: every stage runs and every file is written."""

from __future__ import annotations

import io
import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
from rich.console import Console
from rich.progress import Progress
from running_service import post, running

from gralora_fx.base.progress.console import SILENCED
from gralora_fx.base.progress.live_stages import print_news
from gralora_fx.base.progress.stages import counting, displayed
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.demo import news_classifier, news_writer
from gralora_fx.demo import run as run_module
from gralora_fx.demo.news_classifier import load_news
from gralora_fx.demo.run import run as run_demo
from gralora_fx.errors import GraloraError
from gralora_fx.serving import load

pytestmark = pytest.mark.usefixtures("own_garbage")


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
    few_texts(monkeypatch, news_classifier, news_writer)
    monkeypatch.setattr(run_module, "SILENCE", 0.02)
    monkeypatch.setenv(SILENCED, "1")
    run_demo(tmp_path / "demo", epochs=2, seed=0, steps=4)
    output = capsys.readouterr().out
    check_lines(output)
    for path in re.findall(r"^wrote (\S+): ", output, re.MULTILINE):
        assert Path(path).exists(), path
    assert "test accuracy after, ONNX Runtime" in output
    report = (tmp_path / "demo" / "report.md").read_text()
    assert "largest logit difference" in report
    pictures = re.findall(r"^!\[loss\]\((.*)\)$", report, re.MULTILINE)
    assert pictures == ["loss.png", "hybrid/loss.png"]
    assert all((tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    config = peft.GraloraConfig.from_pretrained(str(tmp_path / "demo" / "adapter"))
    assert config.task_type == "SEQ_CLS"
    served = load(tmp_path / "demo" / "onnx")
    assert served.config["id2label"]["4"] == "tech"
    assert served(**dict(served.tokenizer(["Goal!"], return_tensors="np"))).logits.shape == (1, 5)
    assert "bits per character, sports, merged, ONNX Runtime" in report
    assert re.search(r"answers in one batch equal to those alone +4 of 4", output)
    assert peft.GraloraConfig.from_pretrained(str(tmp_path / "demo" / "hybrid" / "adapter" / "sports")).r == 16
    answers_in_the_service(tmp_path / "demo" / "hybrid" / "onnx")


def check_lines(output: str) -> None:
    """Check that a log has stages, steps with loss and time left, the plan as one line, and no line twice."""
    steps = re.findall(r"^train: \d+/\d+(?:, loss \d+\.\d\d)?(?:, about \d+ s left)?$", output, re.MULTILINE)
    assert any("loss" in line for line in steps)
    assert len(steps) == output.count("\ntrain: ")
    assert len(re.findall(r"^37 of 38 sites adapted; .*$", output, re.MULTILINE)) == 1
    assert "attention.self.query" not in output
    assert "so far" not in output
    named = [line for line in output.splitlines() if line.endswith(" ...")]
    assert all(before != after for before, after in itertools.pairwise(named))


def test_after_the_first_part_there_is_something_to_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    few_texts(monkeypatch, news_classifier)
    monkeypatch.setattr(run_module, "write_news", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, epochs=1, seed=0)
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"plan.txt", "loss.png", "graph.html", "adapter", "onnx", "report.md"}
    output = capsys.readouterr().out
    assert there == {Path(path).name for path in re.findall(r"^wrote (\S+): ", output, re.MULTILINE)}
    assert "classifier" in (tmp_path / "plan.txt").read_text()
    assert "| held-out text | class |" in (tmp_path / "report.md").read_text()


def test_steps_come_at_least_every_fifteen_seconds() -> None:
    """With five seconds for a step, which a slow machine takes."""
    sink, now = io.StringIO(), [0.0]
    progress = Progress(console=Console(file=sink, get_time=lambda: now[0]))
    token, due, times = displayed.set(progress), run_module.SILENCE, [0.0]
    with counting("train", 45, "") as count:
        for tenth in range(1, 2250):
            now[0] = tenth / 10
            if tenth % 50 == 0:
                count(tenth // 50, detail="loss 0.41")
            if now[0] >= due:
                before = sink.tell()
                due = now[0] + print_news(progress, run_module.SILENCE)
                times += [now[0]] if sink.tell() > before else []
    displayed.reset(token)
    assert max(after - before for before, after in itertools.pairwise(times)) <= 15
    assert sink.getvalue().splitlines()[-3] == "train: 40/45, loss 0.41, about 25 s left"


def answers_in_the_service(export: Path) -> None:
    """Check that base and adapter, asked at once over HTTP, answer each as alone."""
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
    small = news._replace(train=news.train[:32], test=news.test[:16])
    monkeypatch.setattr(news_writer, "HELD_OUT", 8)
    for module in modules:
        monkeypatch.setattr(module, "load_news", lambda _: small)


def test_training_that_shows_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_texts(monkeypatch, news_writer)
    monkeypatch.setattr(news_writer, "fit", lambda *_: [])
    with pytest.raises(GraloraError, match="training makes held-out text no likelier"):
        news_writer.write_news(tmp_path, steps=4, seed=0)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news_classifier, "find_spec", lambda _: None)
    with pytest.raises(GraloraError, match=r"install 'gralora-fx\[demo\]'"):
        load_news(0)
