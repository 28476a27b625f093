"""Texts and pairs of texts as token ids, checked, and as the padded inputs of an encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gralora_fx.core.loading.tokenizers import is_ids
from gralora_fx.errors import ServingError, first_line, shown
from gralora_fx.run.engine.limits import PromptLimit, context_length

_IDS, _TYPES, _MASK = "input_ids", "token_type_ids", "attention_mask"


@dataclass(frozen=True)
class Tokens:
    """A text or a pair.

    Attributes:
        ids: Its token ids.
        types: The type of each, as the tokenizer gives them; None if all are 0.
    """

    ids: Sequence[int]
    types: Sequence[int] | None = None


class TextReader:
    """Reads texts with the tokenizer of an encoder.

    Attributes:
        limit: The most tokens of a text: the model's limit, or the tokenizer's if that is less.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: Mapping[str, Any],
        position_offset: int,
        inputs: Collection[str],
    ) -> None:
        """Note the limits."""
        self._tokenizer, self._inputs = tokenizer, inputs
        context = context_length(config)
        most = tokenizer.model_max_length
        self.limit = most if context is None else min(most, context - position_offset)
        self._lengths = PromptLimit(self.limit, "a text", f"more than the model's {self.limit}")
        self._vocabulary = config.get("vocab_size")

    @property
    def pads(self) -> bool:
        """Whether the tokenizer has a token for padding."""
        return self._tokenizer.pad_token_id is not None

    def texts(self, texts: Sequence[str | Sequence[int]]) -> list[Tokens]:
        """Token ids of texts; ids that are given stay as they are."""
        if all(isinstance(text, str) for text in texts):
            return self._encoded(texts, None)
        return [self._one(text) for text in texts]

    def pairs(self, first: str, seconds: Sequence[str]) -> list[Tokens]:
        """Token ids of pairs of texts, as the tokenizer joins them.

        Args:
            first: The first text of every pair.
            seconds: The second text of each.
        """
        return self._encoded([first] * len(seconds), seconds)

    def padded(self, rows: Sequence[Tokens]) -> dict[str, NDArray[Any]]:
        """The model's inputs for rows, padded to the longest on the tokenizer's side."""
        lengths = [len(row.ids) for row in rows]
        width = max(lengths)
        padding = self._tokenizer.pad_token_id if self.pads else 0
        ids = np.full((len(rows), width), padding, np.int64)
        types = np.full((len(rows), width), self._tokenizer.pad_token_type_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        is_left = self._tokenizer.padding_side == "left"
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            columns = slice(width - length, width) if is_left else slice(length)
            ids[index, columns], mask[index, columns] = row.ids, 1
            types[index, columns] = 0 if row.types is None else row.types
        arrays = {_IDS: ids, _TYPES: types, _MASK: mask}
        return {name: array for name, array in arrays.items() if name in self._inputs}

    def _one(self, text: str | Sequence[int]) -> Tokens:
        if not isinstance(text, str) and is_ids(text):
            return self._checked(Tokens(text))
        return self._encoded([text], None)[0]

    def _encoded(self, firsts: Sequence[Any], seconds: Sequence[str] | None) -> list[Tokens]:
        for text in (*firsts[:1], *(seconds or firsts)):
            _check_text(text)
            self._lengths.check_text(text, self._tokenizer)
        try:
            encoding = self._tokenizer(list(firsts), None if seconds is None else list(seconds))
        except Exception as error:  # tokenizers raise types of their own
            raise ServingError(f"the tokenizer does not take the texts ({first_line(error)})") from error
        types = encoding.get(_TYPES) or [None] * len(firsts)
        return [self._checked(Tokens(*row)) for row in zip(encoding[_IDS], types, strict=True)]

    def _checked(self, tokens: Tokens) -> Tokens:
        ids = tokens.ids
        if not ids:
            raise ServingError("a text has no tokens; give at least one")
        self._lengths.check_tokens(ids)
        if min(ids) < 0 or (self._vocabulary is not None and max(ids) >= self._vocabulary):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ServingError(f"a text holds token {wrong}, outside the vocabulary of {self._vocabulary} tokens")
        return tokens


def _check_text(text: Any) -> None:
    """Check that a text can be encoded; a lone surrogate cannot, which the tokenizers' own error does not say."""
    if not isinstance(text, str):
        raise ServingError(f"a text is a string or a list of token ids, but got {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ServingError(f"the text {shown(text)} is not Unicode ({first_line(error)})") from error
