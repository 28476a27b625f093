"""The texts on which a quantized decoder is measured: a user's own, or beginnings of texts that the model draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gralora_fx.errors import ExportError
from gralora_fx.exporters.verification.random_values import context_of, vocabulary_of
from gralora_fx.loading.tokenizers import prompt_ids
from gralora_fx.tracing.traced_model import TracedModel

LONGEST = 128  # tokens that are read of a given text
_COUNT, _DRAWN = 16, 24  # texts that the model draws, and tokens of each
_CONTINUED = 24  # greedy tokens after each text


@dataclass(frozen=True)
class TokenTexts:
    """Texts, each of which the float32 model continues greedily.

    Attributes:
        rows: Token ids by text, at least one each.
        drawn: Tokens that the float32 model draws after each row; they belong to the text.
        continued: Greedy tokens after each text.
        end: Tokens that end a text, which are not drawn.
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


def drawn_texts(traced: TracedModel) -> TokenTexts:
    """Sixteen texts of 24 tokens that the model draws: after the token that begins a text, or a random one without it.

    Args:
        traced: The model, traced with a cache.
    """
    vocabulary = vocabulary_of(traced) or 4
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(min(3, vocabulary - 1), vocabulary, (_COUNT,), generator=generator).tolist()
    begins = _special_tokens(traced, "bos_token_id", vocabulary)
    room = context_of(traced) or _DRAWN + _CONTINUED
    length = min(_DRAWN, max(1, room // 2))
    return TokenTexts(
        rows=tuple((begins[0] if begins else token,) for token in first),
        drawn=length - 1,
        continued=max(1, min(_CONTINUED, room - length)),
        end=_special_tokens(traced, "eos_token_id", vocabulary)[: vocabulary - 1],
    )


def given_texts(texts: Sequence[str], tokenizer: Any, traced: TracedModel) -> TokenTexts:
    """A user's texts, of each the first 128 tokens, or fewer where the context has no room for them.

    Args:
        texts: The texts.
        tokenizer: A tokenizer.
        traced: The model, traced with a cache.

    Raises:
        ExportError: The tokenizer gives no token for a text, or one outside the model's vocabulary.
    """
    vocabulary, room = vocabulary_of(traced), context_of(traced) or LONGEST + _CONTINUED
    continued = min(_CONTINUED, max(1, room // 2))
    length = min(LONGEST, max(1, room - continued))
    rows: list[tuple[int, ...]] = []
    for index, text in enumerate(texts):
        row = tuple(prompt_ids(text, tokenizer, ExportError)[:length])
        wrong = [token for token in row if vocabulary is not None and not 0 <= token < vocabulary]
        if not row or wrong:
            what = f"token {wrong[0]}, outside the vocabulary of {vocabulary} tokens," if wrong else "no token"
            raise ExportError(f"the tokenizer gives {what} for text {index + 1}; leave the text out, or check both")
        rows.append(row)
    return TokenTexts(tuple(rows), 0, continued)


def _special_tokens(traced: TracedModel, name: str, vocabulary: int) -> tuple[int, ...]:
    """The ids that a configuration gives for a special token: none, one or several."""
    config = None if traced.config is None else traced.config.get_text_config()
    found = getattr(config, name, None)
    tokens = found if isinstance(found, (list, tuple)) else [found]
    return tuple(token for token in tokens if isinstance(token, int) and 0 <= token < vocabulary)
