"""Requests for texts through an encoder, and what is answered; an unknown field is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from gralora_fx.serving.http.strict_model import ListOf, StrictModel


class _TextRequest(StrictModel):
    """A request for texts through an encoder; a field that is null is as if it were left out.

    Attributes:
        user: Taken, and not used.
    """

    user: str | None = None

    @classmethod
    def _effective(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The fields that are not null."""
        return {name: value for name, value in given.items() if value is not None}


class EmbeddingRequest(_TextRequest):
    """A request of `/v1/embeddings`."""

    model: str
    input: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
    encoding_format: Literal["float", "base64"] | None = None


class ClassifyRequest(_TextRequest):
    """A request of `/classify`."""

    model: str | None = None
    input: str | ListOf[str]


class Document(StrictModel):
    """A document of a request of `/v1/rerank`."""

    text: str


class RerankRequest(_TextRequest):
    """A request of `/v1/rerank`, in the form of Cohere's and Jina's services."""

    model: str | None = None
    query: str
    documents: Annotated[list[str | Document], Field(min_length=1, fail_fast=True)]
    top_n: Annotated[int | None, Field(ge=1)] = None
    return_documents: bool = False

    @property
    def texts(self) -> list[str]:
        """The texts of the documents."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class Usage(BaseModel):
    """How many tokens were read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """The embedding of a text: numbers, or in base64 the bytes of little-endian 32-bit floats."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """The embeddings of texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Classes(BaseModel):
    """The classes of a text."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    labels: list[str]


class ClassifyResponse(BaseModel):
    """The classes of texts."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classes]
    usage: Usage


class Rank(BaseModel):
    """A document's place in a ranking, by its number in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """Documents, the most relevant first."""

    id: str
    model: str
    results: list[Rank]
    usage: Usage
