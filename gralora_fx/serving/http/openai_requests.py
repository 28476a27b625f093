"""Requests of OpenAI's protocol: the fields that are supported; any other is refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gralora_fx.serving.sampling import Sampling

_COMPLETION_TOKENS = 16  # OpenAI's default
_Whole = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Request(BaseModel):
    """A request whose fields are all known, and of their own types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Request):
    """What a stream holds beside text."""

    include_usage: bool = False


class _TextFields(_Request):
    """What completions and chats share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen: temperature 1 by default, and the likeliest at temperature 0."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if not temperature:
            return Sampling()
        return Sampling(
            do_sample=True,
            temperature=temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
        )

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_TextFields):
    """A request of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: _Whole | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        given = self.prompt
        if isinstance(given, str) or not given or isinstance(given[0], int):
            return [given]  # type: ignore[list-item]
        return list(given)

    def most_tokens(self, left: int) -> int:
        """The most tokens to add to a prompt.

        Args:
            left: For how many there is room after it.
        """
        return min(_COMPLETION_TOKENS, max(left, 1)) if self.max_tokens is None else self.max_tokens


class TextPart(_Request):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Request):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_TextFields):
    """A request of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: _Whole | None = None
    max_completion_tokens: _Whole | None = None

    @property
    def prompts(self) -> list[list[dict[str, str]]]:
        """The chat, as tokenizers take it."""
        return [[{"role": message.role, "content": message.text} for message in self.messages]]

    def most_tokens(self, left: int) -> int:
        """The most tokens to add to a prompt: all that there is room for, unless the request names fewer.

        Args:
            left: For how many there is room after it.
        """
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return max(left, 1) if given is None else given
