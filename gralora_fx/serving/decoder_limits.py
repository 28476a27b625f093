"""What a decoder can take, and the checks of what it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gralora_fx.errors import ServingError
from gralora_fx.runtime.context_length import UNLIMITED, context_length
from gralora_fx.serving.end_tokens import end_tokens
from gralora_fx.serving.sampling import Sampling

_NEW_TOKENS = 64


@dataclass(frozen=True)
class DecoderLimits:
    """What a decoder can take.

    Attributes:
        vocabulary: How many tokens there are; None if that is not known.
        context: Positions of a prompt and its answer together.
        ends: Ids of the tokens that end an answer, unless a request names others.
    """

    vocabulary: int | None
    context: int
    ends: frozenset[int]

    @classmethod
    def of(cls, directory: Path, config: Mapping[str, Any], position_offset: int) -> DecoderLimits:
        """The limits of an export.

        Args:
            directory: The export directory.
            config: Fields of the model's `config.json`.
            position_offset: By how many positions the model has fewer than that says.

        Raises:
            ServingError: Its end tokens are not ids.
        """
        text = config.get("text_config") or config
        is_pair = bool(config.get("is_encoder_decoder"))
        vocabulary = text.get("decoder_vocab_size") if is_pair else None
        context = context_length(config, "decoder_input_ids" if is_pair else "input_ids") or UNLIMITED
        ends = end_tokens(directory, config)
        return cls(text.get("vocab_size") if vocabulary is None else vocabulary, context - position_offset, ends)

    def within(self, context: int, name: str) -> DecoderLimits:
        """Limits with a shorter context.

        Args:
            context: Its tokens.
            name: The option that gives it, for the message.

        Raises:
            ServingError: It is longer than the model's.
        """
        if context > self.context:
            raise ServingError(f"{name}={context} is above the model's context of {self.context} tokens; give less")
        return replace(self, context=context)

    def new_tokens(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, defaults: Sequence[int | None] = ()
    ) -> list[int]:
        """The most tokens that the answer to each prompt has, after a check that the decoder can take them.

        Args:
            prompts: Their token ids.
            sampling: The options.
            defaults: What the model says of each, where the options do not; none, or None, for 64.

        Raises:
            ServingError: There is no prompt, one is empty, too long or holds ids out of range, or an option names
                tokens that there are not.
        """
        if not prompts:
            raise ServingError("there is no prompt; give at least one")
        for index, row in enumerate(prompts):
            if len(row) == 0:
                raise ServingError(f"prompt {index} is empty; give at least one token")
            if (wrong := self.outside(row)) is not None:
                raise ServingError(
                    f"prompt {index} holds token {wrong}, outside the vocabulary of {self.vocabulary} tokens"
                )
        self.check_options(sampling)
        longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
        length, new = len(prompts[longest]), sampling.max_new_tokens
        if length + (new or 1) > self.context:
            request = "" if new is None else f" and max_new_tokens={new}"
            room = self.context - length
            remedy = "shorten it" if new is None or room < 1 else f"give max_new_tokens={room} or less, or shorten it"
            raise ServingError(
                f"prompt {longest} has {length} tokens{request}, more than the context of {self.context}; {remedy}"
            )
        if new is not None:
            return [int(new)] * len(prompts)
        given = defaults or [None] * len(prompts)
        return [min(most or _NEW_TOKENS, self.context - len(row)) for row, most in zip(prompts, given, strict=True)]

    def check_options(self, sampling: Sampling) -> None:
        """Check the tokens that options name.

        Raises:
            ServingError: One is not in the vocabulary.
        """
        if (wrong := self.outside(sampling.tokens)) is not None:
            raise ServingError(f"an option names token {wrong}, outside the vocabulary of {self.vocabulary} tokens")

    def outside(self, tokens: Sequence[int]) -> int | None:
        """The first of some tokens that is not in the vocabulary, or None."""
        most = self.vocabulary
        return next((token for token in tokens if token < 0 or (most is not None and token >= most)), None)
