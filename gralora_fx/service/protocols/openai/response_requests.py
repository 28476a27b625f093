"""Requests of `/v1/responses` as JSON: text in and out; responses are not stored."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from gralora_fx.errors import ServingError
from gralora_fx.service.protocols.openai.messages import History, ItemFields, OfChat
from gralora_fx.service.protocols.openai.requests import SamplingFields, StreamOptions, Whole
from gralora_fx.service.protocols.openai.strict_model import (
    REASONING,
    RESPONSE,
    TEXT_OPTIONS,
    Idle,
    IdleInclude,
    ListOf,
    StrictModel,
    with_features,
)

_LOGPROBS = "message.output_text.logprobs"


@with_features
class InputItem(ItemFields):
    """A message, or a reference to an item."""

    type: Literal["message", "item_reference"] = "message"


@with_features
class TextConfig(StrictModel):
    """Options of the answer's text."""

    without_effect: ClassVar[Idle] = TEXT_OPTIONS


class Reasoning(StrictModel):
    """Options of reasoning."""

    without_effect: ClassVar[Idle] = REASONING


@with_features
class ResponseRequest(OfChat, SamplingFields):
    """A request of `/v1/responses`; nothing is stored after it is answered, whatever `store` says."""

    without_effect: ClassVar[Idle] = RESPONSE
    prompt_field: ClassVar[str] = "input"

    input: str | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Whole | None = None
    text: TextConfig | None = None
    include: ListOf[Literal["message.output_text.logprobs"] | IdleInclude] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning: Reasoning | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @cached_property
    def history(self) -> History:
        """The request's chat."""
        history = History()
        if self.instructions is not None:
            history.say("system", self.instructions)
        if isinstance(self.input, str):
            history.say("user", self.input)
        else:
            for index, item in enumerate(self.input):
                item.add_to(history, f"input.{index}")
        return history

    @property
    def echo(self) -> bool:
        """Return whether the answer begins with the prompt: never."""
        return False

    @property
    def n(self) -> int:
        """Number of answers: one."""
        return 1

    @property
    def top_scores(self) -> int | None:
        """Number of likeliest tokens to score beside each token; None for no scores."""
        if _LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        if self.top_logprobs:
            problem = f"top_logprobs has no effect unless include has {_LOGPROBS!r}; give it too"
            raise ServingError(problem).about("top_logprobs")
        return None

    def ignored(self) -> Iterator[str]:
        """Yield the fields that are accepted without effect."""
        yield from super().ignored()
        if {*(self.include or ())} - {_LOGPROBS}:
            yield "include"

    def most_tokens(self, left: int) -> int:
        """Return the maximum number of new tokens: all that fit (at least 1), unless the request sets a limit."""
        return max(left, 1) if self.max_output_tokens is None else self.max_output_tokens

    def echoed(self) -> Iterator[tuple[str, Any]]:
        """Return the request's fields that its response repeats."""
        yield "instructions", self.instructions
        yield "max_output_tokens", self.max_output_tokens
        yield "temperature", 1.0 if self.temperature is None else self.temperature
        yield "top_p", 1.0 if self.top_p is None else self.top_p
        yield "presence_penalty", self.presence_penalty
        yield "frequency_penalty", self.frequency_penalty
        yield "top_logprobs", self.top_logprobs or 0
        yield "metadata", self.metadata or {}
        yield "prompt_cache_key", self.prompt_cache_key
        yield "safety_identifier", self.safety_identifier
