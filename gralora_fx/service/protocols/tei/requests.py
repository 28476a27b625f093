"""Requests of Text Embeddings Inference's routes, with a field for the adapter."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag

from gralora_fx.errors import ServingError
from gralora_fx.service.protocols.openai.requests import RerankRequest, Texts, Whole, single_texts
from gralora_fx.service.protocols.openai.strict_model import Idle, ListOf, StrictModel


def _lowered(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class _Fields(StrictModel):
    """Fields of every request; `model` names an adapter, or the base, as it does by default."""

    model: str | None = None
    truncate: bool = False
    truncation_direction: Annotated[Literal["right"], BeforeValidator(_lowered)] = "right"


class EmbedRequest(_Fields):
    """A request of `/embed`."""

    without_effect: ClassVar[Idle] = {"encoding_format": ("float",)}

    inputs: Texts
    normalize: bool = True
    prompt_name: str | None = None
    dimensions: Whole | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """The texts as a list."""
        return single_texts(self.inputs)


class PredictRequest(_Fields):
    """A request of `/predict`: a text, a pair, or a batch of lists of one or two."""

    # an empty object is what huggingface_hub's client sends
    without_effect: ClassVar[Idle] = {"parameters": ({},)}

    inputs: str | ListOf[str] | ListOf[ListOf[str]]
    raw_scores: bool = False

    @property
    def is_batch(self) -> bool:
        """Return whether the answer is a list for each text."""
        return isinstance(self.inputs, list) and not any(isinstance(text, str) for text in self.inputs)

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The texts and pairs."""
        texts: Any = self.inputs if self.is_batch else [self.inputs]
        rows = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        if wrong := [row for row in rows if len(row) not in (1, 2)]:
            problem = f"inputs has a list of {len(wrong[0])} texts; a list is a text or a pair, a batch a list of lists"
            raise ServingError(problem).about("inputs")
        return rows


class RankRequest(_Fields):
    """A request of `/rerank` with `texts`."""

    query: str
    texts: Annotated[list[str], Field(min_length=1, fail_fast=True)]
    raw_scores: bool = False
    return_text: bool = False


def _kind(body: Any) -> str:
    named = "texts" in body if isinstance(body, dict) else isinstance(body, RankRequest)
    return RankRequest.__name__ if named else RerankRequest.__name__


# a request of `/rerank`: that of Text Embeddings Inference if it has `texts`, else Cohere's and Jina's
AnyRank: TypeAlias = Annotated[
    Annotated[RankRequest, Tag(RankRequest.__name__)] | Annotated[RerankRequest, Tag(RerankRequest.__name__)],
    Discriminator(_kind),
]
