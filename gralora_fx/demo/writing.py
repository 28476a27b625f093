"""The demo's second model: a hybrid learns to write news from scratch, and one more topic with an adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from gralora_fx.base.progress.console import StageProgress
from gralora_fx.base.progress.stages import quiet, timed
from gralora_fx.core.config import GraloraConfig
from gralora_fx.core.model.rewrite import rewrite
from gralora_fx.core.tracing.trace import trace
from gralora_fx.demo.news_writer import (
    ADAPTER_RATE,
    ADAPTER_STEPS,
    BASE_RATE,
    BASE_STEPS,
    TOPIC,
    bits_per_character,
    hybrid,
    read_texts,
    train,
)
from gralora_fx.errors import GraloraError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

SILENCE = 10.0  # the least seconds between two lines of a log; a step of training may come on top
Rows: TypeAlias = Sequence[tuple[str, str]]


class Stages:
    """The stages of one model, shown on a console, with the seconds of each."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show a named stage while the block runs, and time it."""
        named: AbstractContextManager[None] = timed(name)
        if not self.console.is_terminal:  # a line names it at once, and more follow if there is news
            self.console.print(f"{name} ...", markup=False)
            named = nullcontext()
        begin = time.perf_counter()
        with StageProgress(self.console, silence=SILENCE), named:
            yield
        self.seconds[name] = time.perf_counter() - begin

    def wrote(self, path: Path, what: str) -> None:
        """Print the path of a file to look at."""
        self.console.print(f"wrote {path}: {what}", markup=False)

    def rows(self) -> Rows:
        """Return table rows of each stage's seconds and the total."""
        rows = [(f"seconds: {stage}", f"{value:.1f}") for stage, value in self.seconds.items()]
        return [*rows, ("seconds: all", f"{sum(self.seconds.values()):.1f}")]


_WINDOW = 10  # steps whose mean is drawn


@dataclass(frozen=True)
class DemoPart:
    """The results of one model."""

    title: str  # what was done
    rows: Rows  # names and values of figures
    asked: str  # title of the answers
    header: Sequence[str]  # column names of the answers
    answers: Sequence[Sequence[str]]  # a row for each
    picture: Path  # a plot of its losses, beside the report or below it

    def tables(self) -> tuple[Table, Table]:
        """Return answers and figures as tables for a console."""
        answers, figures = Table(*self.header, title=self.asked), Table("what", "value", title=self.title)
        for table, rows in ((answers, self.answers), (figures, self.rows)):
            for row in rows:
                table.add_row(*row)
        return answers, figures


def write_report(parts: Sequence[DemoPart], path: Path) -> None:
    """Write figures, answers and pictures as Markdown."""
    lines: list[str] = []
    for part in parts:
        figures = _markdown(("what", "value"), part.rows)
        answers = _markdown(part.header, part.answers)
        picture = f"![loss]({part.picture.relative_to(path.parent).as_posix()})"
        lines += [f"# {part.title}", "", *figures, "", f"## {part.asked}", "", *answers, "", picture, ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def draw_losses(losses: Sequence[float], path: Path) -> None:
    """Plot the loss of every step."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    smooth = [fmean(losses[max(0, i - _WINDOW + 1) : i + 1]) for i in range(len(losses))]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(losses, alpha=0.3, label="each step")
    axes.plot(smooth, label=f"mean of {_WINDOW} steps")
    axes.set(xlabel="step", ylabel="cross entropy", title="Training loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


_TITLE = "A hybrid of Mamba2 and attention on BBC news, with GraLoRA"
_DATA, _MERGED = "onnx", "merged"
_PROMPTS = ("The government", "England")
_CLOSE = 1e-3  # bits per character, by which ONNX Runtime may differ from PyTorch


def exports_of(output: Path) -> tuple[Path, Path]:
    """Return the demo's export directories: with the adapter as data, and merged."""
    return output / _DATA, output / _MERGED


def write_news(output: Path, stages: Stages, *, steps: int, seed: int) -> DemoPart:
    """Train a base and an adapter, export them twice, verify, and compare answers of base and adapter."""
    console, stage = stages.console, stages.stage
    with stage("read news"):
        tokenizer, texts, topic = read_texts(seed)
    with stage("trace hybrid"):
        source = hybrid(tokenizer, seed)
        traced = trace(source, task="text-generation-with-past")
    with stage("score untrained"):
        untrained = bits_per_character(traced, texts)
    with stage("train base"):  # the trace's parameters are the model's own
        losses = train(traced, source.parameters(), texts, steps=steps, rate=BASE_RATE, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    draw_losses(losses, output / "loss.png")
    stages.wrote(output / "loss.png", "the loss of every step of the base")
    with stage("score base"):
        trained, before = bits_per_character(traced, texts), bits_per_character(traced, topic)
    console.print(f"bits per character of held-out text: {untrained:.2f} untrained, {trained:.2f} trained")
    _check(trained < untrained, "training makes held-out text no likelier")
    config = GraloraConfig(r=16, gralora_k=2, alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with stage("train adapter"):
        model = rewrite(traced, config, adapter_name=TOPIC)
        adapter_steps = -(-ADAPTER_STEPS * steps // BASE_STEPS)
        train(model, model.parameters(), topic, steps=adapter_steps, rate=ADAPTER_RATE, seed=seed)
    with stage("score adapter"):
        after = bits_per_character(model, topic)
    console.print(f"the same of {TOPIC}, which the base has not read: {before:.2f}, {after:.2f} with the adapter")
    _check(after < before, f"the adapter makes held-out {TOPIC} no likelier")
    with stage("save base and adapter"), quiet():
        source.save_pretrained(output / "base")
        tokenizer.save_pretrained(output / "base")
        model.save_pretrained(output / "adapter")
    stages.wrote(output / "base", "the base, as transformers writes it")
    stages.wrote(output / "adapter", "the adapter, as PEFT writes it")
    data, merged = exports_of(output)
    with stage("export with the adapter as data"):
        report = export_onnx(model, data, adapters="data", tokenizer=tokenizer, overwrite=True)
    console.print(str(report), markup=False)
    with stage("export merged"):
        report = export_onnx(model, merged, logits="all", tokenizer=tokenizer, overwrite=True)
    console.print(str(report), markup=False)
    with stage("score on ONNX Runtime"):
        served = bits_per_character(load(merged), topic)
    with stage("answer side by side"):
        answers, alone = _answers(data)
    trainable, total = model.get_nb_trainable_parameters()
    rows = [
        ("bits per character, four topics, untrained", f"{untrained:.3f}"),
        ("bits per character, four topics, base", f"{trained:.3f}"),
        (f"bits per character, {TOPIC}, base", f"{before:.3f}"),
        (f"bits per character, {TOPIC}, adapter", f"{after:.3f}"),
        (f"bits per character, {TOPIC}, merged, ONNX Runtime", f"{served:.3f}"),
        ("answers in one batch equal to those alone", f"{sum(map(str.__eq__, answers, alone))} of {len(alone)}"),
        ("trainable share", f"{100 * trainable / total:.2f} % ({trainable:,} of {total:,})"),
        *stages.rows(),
    ]
    _check(abs(served - after) < _CLOSE, "bits per character of the merged export are not PyTorch's")
    _check(answers == alone, "an answer depends on those beside it")
    return DemoPart(
        _TITLE,
        rows,
        "Base and adapter in one batch on ONNX Runtime",
        ("prompt", "base", TOPIC),
        [
            (prompt, *(" ".join(answer.split()) for answer in pair))
            for prompt, *pair in zip(_PROMPTS, answers[::2], answers[1::2], strict=True)
        ],
        output / "loss.png",
    )


def _answers(export: Path) -> tuple[list[str], list[str]]:
    """Return answers of the base and the adapter to each prompt: in one batch, and one by one."""
    served = load(export)
    cases = [(prompt, name) for prompt in _PROMPTS for name in (None, TOPIC)]
    draws: dict[str, Any] = {"max_new_tokens": 32, "do_sample": True, "temperature": 0.7}
    prompts, names = zip(*cases, strict=True)
    together = served.generate(list(prompts), adapter=list(names), seed=0, **draws)  # each row by a seed of its own
    alone = [served.generate(case[0], adapter=case[1], seed=row, **draws) for row, case in enumerate(cases)]
    return together, alone


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise GraloraError(f"the demonstration failed: {problem}")
