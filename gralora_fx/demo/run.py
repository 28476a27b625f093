"""The command: both programs, with what they found as tables, a plot of the losses and a report."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.markdown import Markdown

from gralora_fx.base.progress.console import StageProgress
from gralora_fx.demo.news_classifier import classify_news
from gralora_fx.demo.news_writer import BASE_STEPS, TOPIC, write_news
from gralora_fx.errors import ExportError
from gralora_fx.exporters.artifact.staging import check_output
from gralora_fx.format.export_directory import MANIFEST_NAME

CLASSIFIER = ("MiniLM on BBC news with GraLoRA", "Answers on ONNX Runtime")
WRITER = ("A hybrid of Mamba2 and attention on BBC news, with GraLoRA", "Base and adapter in one batch on ONNX Runtime")
SILENCE = 10.0  # the least seconds between two lines of a log; a step of training may come on top


def run(output: Path, *, epochs: int, seed: int, steps: int = BASE_STEPS) -> None:
    """Train MiniLM to classify news and a small hybrid model to write them; export, verify and run both."""
    report, hybrid = output / "report.md", output / "hybrid"
    for folder in (output / "onnx", hybrid / "onnx", hybrid / "merged"):
        check_output(folder)
        if (folder / MANIFEST_NAME).is_file() and not report.is_file():
            raise ExportError(f"{folder} holds an export that no demo has written; give another --output")
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)  # the libraries' output is suppressed later
    say = partial(console.print, markup=False)
    written = ""
    output.mkdir(parents=True, exist_ok=True)
    classify, write = partial(classify_news, epochs=epochs), partial(write_news, steps=steps)
    for program, folder, title, asked in ((classify, output, *CLASSIFIER), (write, hybrid, *WRITER)):
        begin = time.perf_counter()
        with StageProgress(console, silence=SILENCE):
            figures, answers, losses = program(folder, say, seed=seed)
        picture = folder / "loss.png"
        draw_losses(losses, picture)
        figures["seconds"] = f"{time.perf_counter() - begin:.1f}"
        parts = []
        for heading, rows in ((f"# {title}", [("what", "value"), *figures.items()]), (f"## {asked}", answers)):
            header, *others = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
            parts += [heading, "\n".join([header, "| --- " * len(rows[0]) + "|", *others])]
        console.print(Markdown("\n\n".join(parts)), soft_wrap=False)
        written += "\n\n".join([*parts, f"![loss]({picture.relative_to(output).as_posix()})\n\n"])
        report.write_text(written, encoding="utf-8")
        say(f"wrote {picture}: the loss of every step\nwrote {report}: these answers and figures")
    say(f"ask it yourself: gralora-fx generate --onnx {hybrid / 'onnx'} --adapter {TOPIC} --prompt England")


def draw_losses(losses: Sequence[float], path: Path) -> None:
    """Plot the loss of every step."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="tight")).subplots()
    axes.plot(losses, alpha=0.3)
    axes.plot([fmean(losses[max(0, end - 10) : end]) for end in range(1, len(losses) + 1)])
    axes.set(xlabel="step", ylabel="cross entropy", title="Training loss: each step, and the mean of 10")
    figure.savefig(path, dpi=120)
