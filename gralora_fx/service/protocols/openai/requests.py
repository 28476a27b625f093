"""Requests as JSON: supported fields; a field that would change the answer and is not supported is refused."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from gralora_fx.errors import ServingError, shown
from gralora_fx.run.generate.answer_options import LEAST_DIVISOR, Sampling
from gralora_fx.service.protocols.openai.answer_plan import PlannedRequest
from gralora_fx.service.protocols.openai.messages import History, MessageFields, OfChat, TextPart, history_of
from gralora_fx.service.protocols.openai.strict_model import (
    CHAT,
    EVERYWHERE,
    STREAM_OPTIONS,
    TEXT,
    Idle,
    ListOf,
    StrictModel,
    with_features,
)

_COMPLETION_TOKENS = 16  # OpenAI's default
_LARGEST = 2**31 - 1
_SALT = 256  # maximum characters, which the prefix cache stores
_TOKENS = 1024  # maximum tokens of an option, since each is processed in every step
Texts: TypeAlias = str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
# temperatures below the least divisor are greedy, like 0
Temperature = Annotated[
    float,
    Field(ge=0, le=2, allow_inf_nan=False),
    AfterValidator(lambda value: value if value >= LEAST_DIVISOR else 0.0),
]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), AfterValidator(lambda seed: seed % 2**31)]
Whole = Annotated[int, Field(ge=1, le=_LARGEST)]
_Count = Annotated[int, Field(ge=0, le=_LARGEST)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def single_texts(texts: Any) -> list[str | list[int]]:
    """Return the texts of a field that holds one or several, each a string or token ids."""
    return [texts] if isinstance(texts, str) or (texts and isinstance(texts[0], int)) else texts


def _few(tokens: Any) -> Any:
    if isinstance(tokens, (dict, list)) and len(tokens) > _TOKENS:
        raise PydanticCustomError("too_long", f"there are {len(tokens)} tokens, more than {_TOKENS}; name fewer")
    return tokens


class StreamOptions(StrictModel):
    """Options of a stream."""

    without_effect: ClassVar[Idle] = STREAM_OPTIONS

    include_usage: bool = False


class SamplingFields(PlannedRequest):
    """Sampling parameters: OpenAI's fields, and vLLM's."""

    model: str
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: _Count | None = None
    min_p: _Share | None = None
    seed: Seed | None = None
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=LEAST_DIVISOR, le=2, allow_inf_nan=False)] = 1.0
    logit_bias: Annotated[dict[str, _Bias] | None, BeforeValidator(_few)] = None
    min_tokens: _Count = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[_Count] | None, BeforeValidator(_few)] = None
    stop: str | Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=_SALT)] | None = None
    stream: bool | None = None

    @property
    @abstractmethod
    def top_scores(self) -> int | None:
        """Number of likeliest tokens to score beside each token; None for no scores."""

    def sampling(self, ends: frozenset[int]) -> Sampling:
        """Return the sampling parameters; the default temperature is 1, and 0 means greedy decoding.

        `ends` end an answer by default. Raises a `ServingError` if `logit_bias` names an id that is no token.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        draws: dict[str, Any] = {}
        if temperature:
            draws = {"do_sample": True, "temperature": temperature, "top_k": self.top_k or 0, "seed": self.seed}
            draws |= {"top_p": 1.0 if self.top_p is None else self.top_p, "min_p": self.min_p or 0.0}
        return Sampling(
            **draws,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self._bias(),
            min_new_tokens=self.min_tokens,
            eos_token_id=self._ends(ends),
            logprobs=self.top_scores,
        )

    def _bias(self) -> dict[int, float] | None:
        names = self.logit_bias or {}
        if wrong := [name for name in names if not (name.isascii() and name.isdecimal() and len(name) < 11)]:
            problem = f"logit_bias names {shown(wrong[0])}, which is not the id of a token"
            raise ServingError(problem).about("logit_bias")
        return {int(name): value for name, value in names.items()} or None

    def _ends(self, ends: frozenset[int]) -> list[int] | None:
        """Return the end tokens; None for the default ones."""
        if not (self.ignore_eos or self.stop_token_ids):
            return None
        return sorted({*(() if self.ignore_eos else ends), *(self.stop_token_ids or ())})


class _TextFields(SamplingFields):
    """Fields that completions and chats share."""

    n: Annotated[int, Field(ge=1, le=128)] = 1
    stream_options: StreamOptions | None = None

    @property
    def includes_usage(self) -> bool:
        """Return whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


@with_features
class CompletionRequest(_TextFields):
    """A request of `/v1/completions`."""

    without_effect: ClassVar[Idle] = TEXT
    prompt_field: ClassVar[str] = "prompt"

    prompt: Texts
    max_tokens: _Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        return single_texts(self.prompt) or [[]]

    @property
    def top_scores(self) -> int | None:
        """Number of likeliest tokens to score beside each token; None for no scores."""
        return self.logprobs

    def most_tokens(self, left: int) -> int:
        """Return the maximum number of new tokens."""
        if self.max_tokens == 0 and not self.echo:
            problem = "max_tokens is 0, which leaves nothing to answer; give at least 1, or echo"
            raise ServingError(problem).about("max_tokens")
        return min(_COMPLETION_TOKENS, max(left, 1)) if self.max_tokens is None else self.max_tokens


class PredictedContent(StrictModel):
    """A guess of the answer, in OpenAI's form."""

    type: Literal["content"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


@with_features
class ChatMessage(MessageFields):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]


@with_features
class ChatRequest(OfChat, _TextFields):
    """A request of `/v1/chat/completions`."""

    without_effect: ClassVar[Idle] = CHAT
    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    prediction: PredictedContent | None = None

    @property
    def echo(self) -> bool:
        """Return whether the answer begins with the prompt: never."""
        return False

    @cached_property
    def history(self) -> History:
        """The request's chat."""
        return history_of(self.messages)

    @property
    def top_scores(self) -> int | None:
        """Number of likeliest tokens to score beside each token; None for no scores."""
        if self.top_logprobs and not self.logprobs:  # 0 requests none, as some clients do by default
            problem = "top_logprobs has no effect without logprobs; give logprobs too, or leave it out"
            raise ServingError(problem).about("top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def most_tokens(self, left: int) -> int:
        """Return the maximum number of new tokens: all that fit, unless the request sets fewer."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return max(left, 1) if most is None else most


class _EncoderFields(StrictModel):
    """Fields that requests to encoders share."""

    without_effect: ClassVar[Idle] = EVERYWHERE


class EmbeddingRequest(_EncoderFields):
    """A request of `/v1/embeddings`."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """The texts as a list."""
        return single_texts(self.input)


class ClassifyRequest(_EncoderFields):
    """A request of `/classify`."""

    model: str | None = None
    input: str | ListOf[str]

    @property
    def texts(self) -> list[str | list[int]]:
        """The texts as a list."""
        return single_texts(self.input)


class Document(StrictModel):
    """A document of a request of `/v1/rerank`."""

    text: str


class RerankRequest(_EncoderFields):
    """A request of `/v1/rerank`, in the form of Cohere's and Jina's services."""

    model: str | None = None
    query: str
    documents: Annotated[list[str | Document], Field(min_length=1, fail_fast=True)]
    top_n: Annotated[int | None, Field(ge=1)] = None
    return_documents: bool = False

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [document if isinstance(document, str) else document.text for document in self.documents]
