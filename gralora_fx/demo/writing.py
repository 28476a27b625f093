"""The demonstration's second model: a hybrid learns to write news from nothing, and with an adapter a topic more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.config import GraloraConfig
from gralora_fx.core.model.rewrite import rewrite
from gralora_fx.core.tracing.trace import trace
from gralora_fx.demo.figures import DemoPart, Stages, draw_losses
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

_TITLE = "A hybrid of Mamba2 and attention on BBC news, with GraLoRA"
_DATA, _MERGED = "onnx", "merged"
_PROMPTS = ("The government", "England")
_CLOSE = 1e-3  # bits per character, by which ONNX Runtime may differ from PyTorch


def exports_of(output: Path) -> tuple[Path, Path]:
    """The directories of a demo's exports: with the adapter as data, and merged."""
    return output / _DATA, output / _MERGED


def write_news(output: Path, stages: Stages, *, steps: int, seed: int) -> DemoPart:
    """Train a base and an adapter, export them twice, verify, and let base and adapter answer side by side."""
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
    """Answers by the base and the adapter to each prompt: all in one batch, and each alone."""
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
