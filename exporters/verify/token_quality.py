"""What quantization changes in a decoder's tokens: the export as it is run, step by step, and the float32 model.

Both read a user's texts, or beginnings of texts that the model draws.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.base.progress.stages import counted
from gralora_fx.core.loading.tokenizers import prompt_ids
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError
from gralora_fx.exporters.quantize.draws import draw
from gralora_fx.exporters.verify.cases import context_of, vocabulary_of
from gralora_fx.exporters.verify.compared_tensors import check_finite
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps, ModelSteps, Step
from gralora_fx.format.quantized_weights import TokenQuality

_LONGEST = 128  # tokens that are read of a given text
_COUNT, _DRAWN = 16, 24  # texts that the model draws, and tokens of each
_CONTINUED = 24  # greedy tokens after each text
_BATCH = 16  # texts at a time


@dataclass(frozen=True)
class MeasuredTexts:
    """Texts, each of which the float32 model continues greedily.

    Attributes:
        rows: Token ids by text, at least one each.
        drawn: Tokens that the float32 model draws after each row; they belong to the text.
        continued: Greedy tokens after each text.
        end: Tokens that end a text or pad it, which are not drawn.
    """

    rows: tuple[tuple[int, ...], ...]
    drawn: int
    continued: int
    end: tuple[int, ...] = ()

    def __str__(self) -> str:
        """How many there are, and where they are from."""
        plural = "s" if len(self.rows) > 1 else ""
        if self.drawn:
            return f"{len(self.rows)} text{plural} of {self.drawn + 1} tokens that it drew"
        return f"{len(self.rows)} given text{plural}"


def drawn_texts(traced: TracedModel, seed: int = 0, length: int = _DRAWN, count: int = _COUNT) -> MeasuredTexts:
    """Texts that the model draws: after the token that begins a text, or a random one without it."""
    vocabulary = vocabulary_of(traced) or 4
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(min(3, vocabulary - 1), vocabulary, (count,), generator=generator).tolist()
    begins, ends, pads = (_special_tokens(traced, f"{name}_token_id", vocabulary) for name in ("bos", "eos", "pad"))
    room = context_of(traced) or _DRAWN + _CONTINUED
    length = min(length, max(1, room // 2))
    return MeasuredTexts(
        rows=tuple((begins[0] if begins else token,) for token in first),
        drawn=length - 1,
        continued=max(1, min(_CONTINUED, room - length)),
        end=tuple(dict.fromkeys((*ends, *pads)))[: vocabulary - 1],
    )


def user_texts(texts: Sequence[str], tokenizer: Any, traced: TracedModel) -> MeasuredTexts:
    """A user's texts, of each the first 128 tokens, or fewer where the context has no room for them."""
    vocabulary, room = vocabulary_of(traced), context_of(traced) or _LONGEST + _CONTINUED
    continued = min(_CONTINUED, max(1, room // 2))
    length = min(_LONGEST, max(1, room - continued))
    rows: list[tuple[int, ...]] = []
    for index, text in enumerate(texts):
        row = tuple(prompt_ids(text, tokenizer, ExportError)[:length])
        wrong = [token for token in row if vocabulary is not None and not 0 <= token < vocabulary]
        if not row or wrong:
            what = f"token {wrong[0]}, outside the vocabulary of {vocabulary} tokens," if wrong else "no token"
            raise ExportError(f"the tokenizer gives {what} for text {index + 1}; leave the text out, or check both")
        rows.append(row)
    return MeasuredTexts(tuple(rows), 0, continued)


def _special_tokens(traced: TracedModel, name: str, vocabulary: int) -> tuple[int, ...]:
    """The ids that a configuration gives for a special token: none, one or several."""
    config = None if traced.config is None else traced.config.get_text_config()
    value = getattr(config, name, None)
    tokens = value if isinstance(value, (list, tuple)) else [value]
    return tuple(token for token in tokens if isinstance(token, int) and 0 <= token < vocabulary)


def token_quality(
    session: Any, model: TracedModel | GraloraModel, texts: MeasuredTexts, adapter: str | None = None
) -> TokenQuality:
    """Compare the probabilities of the next token at every position; both read the same tokens.

    Every text is followed by tokens that are the float32 model's likeliest. As long as the export's are the same, they
    are what it would generate.
    """
    tally = _Tally(texts.continued)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(texts.rows), _BATCH):
        rows = texts.rows[start : start + _BATCH]
        where = f"texts {start + 1} to {start + len(rows)}"
        own, export = ModelSteps(model, len(rows), where), DecoderSteps(session, len(rows), where)
        equal = torch.full((len(rows),), texts.continued)
        for step in _steps(own, export, rows, texts, generator):
            check_finite("logits", where, step.expected, step.actual)
            tally.add(step, equal)
        tally.equal_tokens += equal.tolist()
    return tally.result(adapter)


class _Step(NamedTuple):
    """What both give at a position of every row.

    Attributes:
        after: How many tokens of the continuation were read, `[batch]`: negative before the last token of the text.
        expected: Logits of the model, `[batch, vocabulary]`.
        actual: Those of the export.
    """

    after: Tensor
    expected: Tensor
    actual: Tensor


def _steps(
    own: Step, export: Step, rows: Sequence[Sequence[int]], texts: MeasuredTexts, generator: torch.Generator
) -> Iterator[_Step]:
    """Read texts and their continuations token by token, so that every logit is one that the export serves."""
    lengths = torch.tensor([len(row) + texts.drawn for row in rows])
    ids = torch.tensor([[row[0]] for row in rows])
    positions = range(int(lengths.max()) + texts.continued - 1)
    for position in counted(positions, "comparing with float32", "tokens"):
        mask = torch.ones(len(rows), position + 1, dtype=torch.long)
        expected, actual = (read(ids, mask)[:, -1].float() for read in (own, export))
        yield _Step(position + 1 - lengths, expected, actual)
        drawn = draw_tokens(expected, texts.end, generator) if position + 1 < int(lengths.max()) else None
        greedy = expected.argmax(-1)
        for index, row in enumerate(rows):
            if position + 1 < len(row):
                greedy[index] = row[position + 1]
            elif drawn is not None and position + 1 < lengths[index]:
                greedy[index] = drawn[index]
        ids = greedy.unsqueeze(1)


def draw_tokens(logits: Tensor, end: Sequence[int], generator: torch.Generator) -> Tensor:
    """A token of every row by its probability, but none that is left out.

    Args:
        logits: `[batch, vocabulary]`.
        end: Tokens that are left out.
        generator: Draws them.
    """
    kept = logits.clone()
    kept[:, list(end)] = float("-inf")
    return draw(kept, generator)


class _Tally:
    """Figures of all steps, accumulated."""

    def __init__(self, continued: int) -> None:
        self.equal_tokens: list[int] = []
        self._continued, self._positions, self._equal, self._divergence = continued, 0, 0, 0.0

    def add(self, step: _Step, equal: Tensor) -> None:
        """Count one step of every row."""
        is_same = step.expected.argmax(-1) == step.actual.argmax(-1)
        in_text = step.after <= 0
        self._positions += int(in_text.sum())
        self._equal += int(is_same[in_text].sum())
        self._divergence += float(kl_divergence(step.expected[in_text], step.actual[in_text]).sum())
        parts = (step.after >= 0) & (step.after < equal) & ~is_same
        equal[parts] = step.after[parts]

    def result(self, adapter: str | None) -> TokenQuality:
        return TokenQuality(
            adapter,
            len(self.equal_tokens),
            self._positions,
            self._equal / self._positions,
            self._divergence / self._positions,
            self._continued,
            float(statistics.median(self.equal_tokens)),
        )


def kl_divergence(expected: Tensor, actual: Tensor) -> Tensor:
    """KL(p || q) of the distributions of two sets of logits, in nats.

    Rows are worked on as in `draw`: one at a time and by numpy.

    Args:
        expected: Logits of p, `[rows, vocabulary]`.
        actual: Those of q.

    Returns:
        `[rows]`, float64.
    """
    found = []
    with np.errstate(invalid="ignore"):
        for pair in zip(expected.numpy(), actual.numpy(), strict=True):
            log_p, log_q = (_log_softmax(row.astype(np.float64)) for row in pair)
            p = np.exp(log_p)
            found.append(np.where(p > 0, p * (log_p - log_q), 0.0).sum())
    return torch.tensor(found, dtype=torch.double)


def _log_softmax(row: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = row - row.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
