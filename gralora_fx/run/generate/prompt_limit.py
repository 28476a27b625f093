"""The most tokens of a prompt: a text that is surely longer is refused before it is tokenized."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gralora_fx.core.loading.token_bounds import surely_exceeds
from gralora_fx.run.engine.limits import DecoderLimits, TooLargeError


@dataclass(frozen=True)
class PromptLimit:
    """The most tokens of a prompt.

    Attributes:
        most: How many; None for any.
        what: What a prompt is called in messages.
        excess: What is said of more tokens.
    """

    most: int | None
    what: str
    excess: str

    @classmethod
    def of_context(cls, limits: DecoderLimits) -> PromptLimit:
        """That of a decoder."""
        return cls(limits.context, "the prompt", f"beyond the context of {limits.context} tokens{limits.note}")

    @classmethod
    def of_source(cls, positions: int | None) -> PromptLimit:
        """That of an encoder-decoder, whose encoder has so many positions; None for any."""
        return cls(positions, "the source", f"more than the encoder's {positions} positions")

    def check_text(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that a text may fit."""
        if self.most is not None and surely_exceeds(text, self.most, tokenizer):
            raise TooLargeError(f"{self.what} has {len(text)} characters, which are {self.excess}; shorten it")

    def check_tokens(self, tokens: Sized) -> None:
        """Check that tokens fit."""
        if self.most is not None and len(tokens) > self.most:
            raise TooLargeError(f"{self.what} has {len(tokens)} tokens, {self.excess}; shorten it")
