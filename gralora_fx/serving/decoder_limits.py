"""What a decoder can take, and the checks of what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gralora_fx.errors import ServingError
from gralora_fx.serving.sampling import Sampling

_NEW_TOKENS = 64


@dataclass(frozen=True)
class DecoderLimits:
    """What a decoder can take.

    Attributes:
        vocabulary: How many tokens there are; None if that is not known.
        context: Positions of a prompt and its answer together.
        ends: Ids of the tokens that end an answer, unless a request names others.
        fixed_ends: Those at which the runtime ends a row by itself, whatever a request names.
    """

    vocabulary: int | None
    context: int
    ends: frozenset[int]
    fixed_ends: frozenset[int] = frozenset()

    def within(self, context: int) -> DecoderLimits:
        """Limits with a shorter context.

        Raises:
            ServingError: It is longer than the model's.
        """
        if context > self.context:
            raise ServingError(
                f"max_context={context} is above the model's context of {self.context} tokens; give less"
            )
        return replace(self, context=context)

    def new_tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
        """The most tokens that each prompt's answer has, after a check that the decoder can take them.

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
            raise ServingError(
                f"prompt {longest} has {length} tokens{request}, more than the context of {self.context}; shorten it"
            )
        return min(_NEW_TOKENS, self.context - length) if new is None else int(new)

    def check_options(self, sampling: Sampling) -> None:
        """Check the tokens that options name.

        Raises:
            ServingError: One is not in the vocabulary, or the runtime would end an answer at others too.
        """
        if (wrong := self.outside(sampling.tokens)) is not None:
            raise ServingError(f"an option names token {wrong}, outside the vocabulary of {self.vocabulary} tokens")
        if sampling.ends is not None and (missing := self.fixed_ends - sampling.ends):
            raise ServingError(
                f"the end tokens leave out {min(missing)}, at which onnxruntime-genai ends every answer; add it, or "
                "export the model with adapters='batched'"
            )

    def outside(self, tokens: Sequence[int]) -> int | None:
        """The first of some tokens that is not in the vocabulary, or None."""
        most = self.vocabulary
        return next((token for token in tokens if token < 0 or (most is not None and token >= most)), None)
