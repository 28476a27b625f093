"""How prompts are answered: one record, from the caller to the row that answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gralora_fx.run.engine.limits import DecoderLimits
from gralora_fx.run.generate.sampling import Sampling

if TYPE_CHECKING:
    from gralora_fx.run.generate.constraints import Constraint
    from gralora_fx.run.generate.encoder_inputs import AnswerStart


@dataclass(frozen=True)
class AnswerOptions:
    """Options of answers; each part belongs to the feature that reads it, and nobody else looks into it.

    Attributes:
        sampling: How tokens are chosen and scored, how many there are, and which end an answer.
        stop: Strings that end an answer, checked.
        constraint: What the tokens of an answer may be; None for any.
        shown: Special tokens that are part of an answer's text.
        start: What an encoder-decoder's answer begins with; None for what the model says.
        proposed: The most tokens that are proposed for a step of the answer alone; None for as many as pay.
        scores_prompt: Whether to score the prompt's tokens too, as many of the likeliest beside each as
            `sampling.logprobs` says; the answer may then have no tokens.
        salt: The prompt is taken over from requests with the same one alone, and left to them; None is one too.
    """

    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    shown: frozenset[int] = frozenset()
    start: AnswerStart | None = None
    proposed: int | None = None
    scores_prompt: bool = False
    salt: str | None = None

    def of_answer(self, index: int) -> AnswerOptions:
        """Return the options of one of several answers, which draws by a seed of its own."""
        seed = self.sampling.seed
        if seed is None:
            return self
        return replace(self, sampling=replace(self.sampling, seed=(seed + index) % 2**31))

    def ends(self, limits: DecoderLimits) -> frozenset[int]:
        """Return the ids of the tokens that end an answer: those that are asked for, or the model's."""
        return limits.ends if self.sampling.ends is None else self.sampling.ends
