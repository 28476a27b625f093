"""A user's own texts, which an export is measured on, and prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_fx.core.loading.tokenizers import load_tokenizer, prompt_ids
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.artifact.tokenizer_files import loaded_tokenizer
from gralora_fx.exporters.verify.cases import Case, PromptBatch, context_of, longest_text, pad_prompts, vocabulary_of

_BATCH = 16  # texts of a user compared at once
_USER_STEPS = 16  # tokens compared after a user's prompts
_LONGEST = 128  # tokens of a given text used to measure quality
CONTINUED = 24  # greedy tokens after each text


@dataclass(frozen=True)
class MeasuredTexts:
    """Texts, each continued greedily."""

    rows: tuple[tuple[int, ...], ...]  # token ids by text, at least one each
    continued: int  # greedy tokens after each text
    is_drawn: bool = False  # whether they were drawn from the float32 model, all of one length

    def __str__(self) -> str:
        """Describe how many there are, and their origin."""
        plural = "s" if len(self.rows) > 1 else ""
        if self.is_drawn:
            return f"{len(self.rows)} text{plural} of {len(self.rows[0])} tokens that it drew"
        return f"{len(self.rows)} given text{plural}"


def user_texts(texts: Sequence[str], tokenizer: Any, traced: TracedModel) -> MeasuredTexts:
    """Tokenize a user's texts: the first 128 tokens of each, or fewer if the context is too short."""
    vocabulary, room = vocabulary_of(traced), context_of(traced) or _LONGEST + CONTINUED
    continued = min(CONTINUED, max(1, room // 2))
    length = min(_LONGEST, max(1, room - continued))
    rows: list[tuple[int, ...]] = []
    for index, text in enumerate(texts):
        row = tuple(prompt_ids(text, tokenizer, ExportError)[:length])
        wrong = [token for token in row if vocabulary is not None and not 0 <= token < vocabulary]
        if not row or wrong:
            what = f"token {wrong[0]}, outside the vocabulary of {vocabulary} tokens," if wrong else "no token"
            raise ExportError(f"the tokenizer gives {what} for text {index + 1}; leave the text out, or check both")
        rows.append(row)
    return MeasuredTexts(tuple(rows), continued)


def text_cases(
    texts: Sequence[str], tokenizer: Any, traced: TracedModel, *, batch: int = _BATCH, longest: int | None = None
) -> Iterator[Case]:
    """Batch texts, each batch padded to its longest, cut at the model's context."""
    loaded = loaded_tokenizer(tokenizer)
    names = [name for name, value in traced.graph_inputs.items() if isinstance(value, Tensor)]
    room = longest_text(traced)
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        where = f"texts {start + 1} to {start + len(part)}" if batch > 1 else f"text {start + 1}"
        encoded = _encoded(loaded, part, room if longest is None else min(room, longest), where)
        if "input_ids" in encoded:  # a tokenizer may leave token types out, and they are zeros in a single text
            encoded.setdefault("token_type_ids", torch.zeros_like(encoded["input_ids"]))
        if missing := [name for name in names if name not in encoded]:
            raise ExportError(
                f"the model takes {', '.join(names)}, but the tokenizer gives no {', '.join(missing)} for a text; "
                "leave texts out"
            )
        yield where, {**traced.constants, **{name: encoded[name] for name in names}}


def _encoded(tokenizer: Any, texts: list[str], length: int, where: str) -> dict[str, Tensor]:
    try:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt"))
    except Exception as error:  # tokenizers raise their own types
        raise ExportError(f"the tokenizer does not take {where} ({first_line(error)})") from error


def user_prompts(prompts: Sequence[Any], output_dir: str | Path, traced: TracedModel) -> PromptBatch:
    """Tokenize a user's prompts as one batch, left-padded."""
    if isinstance(prompts, str) or not prompts:
        raise ExportError("prompts are a list of texts, chats or token ids, with at least one; give such a list")
    tokenizer = load_tokenizer(output_dir, ExportError)
    rows = [prompt_ids(prompt, tokenizer, ExportError) for prompt in prompts]
    vocabulary, context = vocabulary_of(traced), context_of(traced)
    for index, row in enumerate(rows):
        wrong = [token for token in row if token < 0 or (vocabulary is not None and token >= vocabulary)]
        if not row or wrong:
            what = f"holds token {wrong[0]}, outside the vocabulary of {vocabulary} tokens" if wrong else "is empty"
            raise ExportError(f"prompt {index} {what}; give other ids")
        if context is not None and len(row) > context - _USER_STEPS:
            raise ExportError(
                f"prompt {index} has {len(row)} tokens, and {_USER_STEPS} are added, more than the context of "
                f"{context}; shorten it"
            )
    return pad_prompts(rows, steps=_USER_STEPS, label="given prompt")
