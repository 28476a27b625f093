"""Options of answers, sampling included: one record from the caller to the row that answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gralora_fx.errors import ServingError, option
from gralora_fx.run.engine.limits import DecoderLimits

if TYPE_CHECKING:
    from gralora_fx.core.loading.text_tokenizer import TextTokenizer
    from gralora_fx.run.generate.constraints import Constraint

_SURROGATE = re.compile("[\ud800-\udfff]")
_NEW_TOKENS = 64
_LARGEST = 2**31 - 1  # ids and seeds that runtimes accept
LEAST_DIVISOR = 1e-6  # smaller divisors make logits infinite in float32
_DRAWS = ("top_k", "top_p", "min_p", "temperature", "seed")  # without effect in greedy decoding


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters."""

    max_new_tokens: int | None = None  # maximum tokens to add; None for 64, or fewer if the context ends before
    do_sample: bool = False  # whether to draw; False is greedy decoding
    top_k: int = 50  # number of likeliest tokens to draw from; 0 for all
    top_p: float = 1.0  # share of the probability to draw from, in `(0, 1]`
    min_p: float = 0.0  # minimum probability of a drawn token relative to the likeliest token's, in `[0, 1]`
    temperature: float = 1.0  # divisor of the logits, above 0
    # seed of the draws, one more for each further prompt; None for a different one in every call
    seed: int | None = None
    repetition_penalty: float = 1.0  # divisor of the logits of tokens in the prompt or the answer, as in transformers
    presence_penalty: float = 0.0  # subtracted once from logits of tokens in the answer, as in OpenAI's protocol
    frequency_penalty: float = 0.0  # subtracted for each occurrence of a token in the answer, as in OpenAI's protocol
    logit_bias: Mapping[int, float] | None = None  # added to the logits of tokens, by id
    min_new_tokens: int = 0  # minimum tokens to add before an end token may be chosen
    # id of the token that ends an answer, or several, or an empty list for none; None for the model's
    eos_token_id: int | Sequence[int] | None = None
    # number of likeliest tokens whose log-probabilities to return beside each new token's own; None for no
    # log-probabilities. They are the model's own, before any other option
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every field, and that no field is without effect."""
        if not isinstance(self.do_sample, (bool, np.bool_)):
            raise ServingError(f"do_sample must be True or False, but got {self.do_sample!r:.80}")
        for name, least in (("max_new_tokens", 1), ("seed", 0), ("logprobs", 0)):
            if getattr(self, name) is not None:
                _check_whole(option(name), getattr(self, name), least)
        for name in ("top_k", "min_new_tokens"):
            _check_whole(name, getattr(self, name), 0)
        self._check_numbers()
        self._check_tokens()
        self._check_effects()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Sampling:
        """Build the sampling parameters from a call's options."""
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in names]:
            raise ServingError(
                f"unknown option {', '.join(unknown)}; there are stop, stream, adapter, {', '.join(names)}"
            )
        return cls(**options)

    @property
    def ends(self) -> frozenset[int] | None:
        """Ids of the tokens that end an answer; None for the model's."""
        given = self.eos_token_id
        return None if given is None else frozenset(given if isinstance(given, Sequence) else [given])

    def new_tokens(
        self, prompts: Sequence[Sequence[int]], limits: DecoderLimits, defaults: Sequence[int | None] = ()
    ) -> list[int]:
        """Return the maximum new tokens for each prompt, after checking that a decoder can run them."""
        if not prompts:
            raise ServingError("there is no prompt; give at least one")
        for index, row in enumerate(prompts):
            if len(row) == 0:
                raise ServingError(f"prompt {index} is empty; give at least one token")
            if (wrong := limits.outside(row)) is not None:
                raise ServingError(
                    f"prompt {index} holds token {wrong}, outside the vocabulary of {limits.vocabulary} tokens"
                )
        self.check_tokens(limits)
        longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
        length, new = len(prompts[longest]), self.max_new_tokens
        if length + (new or 1) > limits.context:
            request = "" if new is None else f" and {option(max_new_tokens=new)}"
            room = limits.context - length
            less = "" if new is None or room < 1 else f"give {option(max_new_tokens=room)} or less, or "
            raise ServingError(
                f"prompt {longest} has {length} tokens{request}, more than the context of "
                f"{limits.context}{limits.note}; {less}shorten it"
            )
        if new is not None:
            return [int(new)] * len(prompts)
        named = defaults or [None] * len(prompts)
        return [min(most or _NEW_TOKENS, limits.context - len(row)) for row, most in zip(prompts, named, strict=True)]

    def check_tokens(self, limits: DecoderLimits) -> None:
        """Check the tokens that options name."""
        outside = f"outside the vocabulary of {limits.vocabulary} tokens"
        if (wrong := limits.outside([*(self.logit_bias or ())])) is not None:
            raise ServingError(f"logit_bias names token {wrong}, {outside}").about("logit_bias")
        if (wrong := limits.outside([*(self.ends or ())])) is not None:
            raise ServingError(f"the tokens that end the answer hold {wrong}, {outside}").about("stop_token_ids")

    def _check_numbers(self) -> None:
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ServingError(f"{option('top_p')} must be in (0, 1], but got {self.top_p!r:.80}; take 1 for no limit")
        if not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ServingError(f"min_p must be in [0, 1], but got {self.min_p!r:.80}; take 0 for no limit")
        greedy = f"take {option(do_sample=False)}"
        for name, value, remedy in (
            (option("temperature"), self.temperature, greedy),
            ("repetition_penalty", self.repetition_penalty, "take 1 for none"),
        ):
            if not (_is_number(value) and value > 0):
                raise ServingError(f"{name} must be above 0, but got {value!r:.80}; {remedy}")
            if value < LEAST_DIVISOR:
                raise ServingError(f"{name} must be {LEAST_DIVISOR:g} or more, but got {value!r:.80}; {remedy}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not _is_number(getattr(self, name)):
                raise ServingError(f"{name} must be a number, but got {getattr(self, name)!r:.80}; take 0 for none")

    def _check_tokens(self) -> None:
        bias, ends = self.logit_bias, self.eos_token_id
        if not (bias is None or isinstance(bias, Mapping)):
            raise ServingError(f"logit_bias must be a number for each token id, but got {bias!r:.80}")
        if wrong := [value for value in (bias or {}).values() if not _is_number(value)]:
            raise ServingError(f"logit_bias must hold numbers, but got {wrong[0]!r:.80}")
        if isinstance(ends, (str, bytes)):
            raise ServingError(f"eos_token_id must be a token id or a list of them, but got {ends!r:.80}")
        for token in bias or ():
            _check_whole("a token id of logit_bias", token, 0)
        for token in self.ends or ():
            _check_whole("eos_token_id", token, 0)

    def _check_effects(self) -> None:
        if not self.do_sample:
            idle = [f.name for f in fields(self) if f.name in _DRAWS and getattr(self, f.name) != f.default]
            if idle:
                raise ServingError(
                    f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect where the likeliest token is "
                    f"taken; give {option(do_sample=True)}, or leave {'it' if len(idle) == 1 else 'them'} out"
                )
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ServingError(
                f"min_new_tokens={self.min_new_tokens} is above {option(max_new_tokens=self.max_new_tokens)}; give less"
            )


@dataclass(frozen=True)
class AnswerStart:
    """Options for the beginning of an encoder-decoder's answers."""

    language: str | None = None  # the language of the encoder's input; None for the model's default, or to detect it
    task: str | None = None  # the task, such as `translate`; None for the model's default
    forced_bos_token_id: int | None = None  # the first token of the answer to a text; None for the model's

    def check_unused(self, reason: str, *names: str) -> None:
        """Raise a `ServingError` with the reason if an option without effect is given."""
        if unused := [name for name in names if getattr(self, name) is not None]:
            raise ServingError(f"{unused[0]} has no effect: {reason}; leave it out")


@dataclass(frozen=True)
class AnswerOptions:
    """Options of answers; each part is read by one feature only."""

    # how tokens are chosen and scored, how many there are, and which end an answer
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # strings that end an answer, checked
    constraint: Constraint | None = None  # constrains the tokens of an answer; None for no constraint
    shown: frozenset[int] = frozenset()  # special tokens kept in an answer's text
    start: AnswerStart | None = None  # the beginning of an encoder-decoder's answer; None for the model's
    proposed: int | None = None  # maximum tokens proposed per step of the answer; None for as many as pay
    # whether to score the prompt's tokens too, with `sampling.logprobs` likeliest tokens beside each; the answer may
    # then be empty
    scores_prompt: bool = False
    salt: str | None = None  # the prefix cache is shared only between requests of the same salt, None included

    def of_answer(self, index: int) -> AnswerOptions:
        """Return the options of one of several answers, with its own seed."""
        seed = self.sampling.seed
        if seed is None:
            return self
        return replace(self, sampling=replace(self.sampling, seed=(seed + index) % 2**31))

    def ends(self, limits: DecoderLimits) -> frozenset[int]:
        """Return the ids of the tokens that end an answer: those requested, or the model's."""
        return limits.ends if self.sampling.ends is None else self.sampling.ends


def stop_strings(stop: Any, tokenizer: TextTokenizer | None) -> tuple[str, ...]:
    """Return the strings that end an answer, checked."""
    if not isinstance(stop, (str, list, tuple)) or not all(isinstance(string, str) for string in stop):
        raise ServingError(f"stop must be a string or a list of strings, but got {stop!r:.80}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if stops and tokenizer is None:
        raise ServingError(
            f"stop strings need a tokenizer, and the export holds none; export with {option(tokenizer=...)}"
        )
    if wrong := next(filter(_SURROGATE.search, stops), None):
        raise ServingError(f"the stop string {wrong!r:.80} has a lone surrogate, which no text has")
    if "" in stops:
        raise ServingError("a stop string is empty, and would end every answer at once; leave it out")
    return stops


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ServingError(f"{name} must be a whole number from {least} on, but got {value!r:.80}")
    if value > _LARGEST:
        raise ServingError(f"{name} must be {_LARGEST} at most, but is larger")


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)
