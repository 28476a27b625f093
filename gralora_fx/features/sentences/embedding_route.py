"""`/v1/embeddings` and `/embed`: texts through a sentence encoder."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import BaseModel

from gralora_fx.errors import ServingError
from gralora_fx.features.sentences.stored_modules import SENTENCE, stored_prompts
from gralora_fx.service.engines import EncoderEngine
from gralora_fx.service.protocols.openai.encoders import Outputs, Usage, answer_texts, finite
from gralora_fx.service.protocols.openai.requests import EmbeddingRequest
from gralora_fx.service.protocols.openai.strict_model import with_ignored
from gralora_fx.service.protocols.tei.routes import embed_routes


class Embedding(BaseModel):
    """The embedding of a text: numbers, or little-endian float32 bytes in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """The embeddings of texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


def embedding_routes(engine: EncoderEngine) -> APIRouter:
    """Return the routes of a sentence encoder; none for a model that takes no texts."""
    router = APIRouter()
    if not engine.encoder.takes_texts:
        return router
    size = engine.encoder.outputs[SENTENCE].shape[-1]

    @router.post("/v1/embeddings", response_model=EmbeddingResponse)
    async def embed(asked: EmbeddingRequest, request: Request) -> Response:
        if asked.dimensions not in (None, size):
            problem = f"dimensions={asked.dimensions}: the model's embeddings have {size}; give that, or leave it out"
            raise ServingError(problem).about("dimensions")

        def embedding(index: int, output: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
            vector: Any = finite(output[SENTENCE]).astype("<f4")
            if asked.encoding_format == "base64":
                vector = base64.b64encode(vector.tobytes()).decode()
            return {"object": "embedding", "index": index, "embedding": vector}

        def body(outputs: Outputs) -> dict[str, Any]:
            return {"object": "list", "data": [embedding(*pair) for pair in enumerate(outputs)], "model": asked.model}

        answer = await answer_texts(engine, request, asked.model, engine.encoder.reader.texts, asked.texts, body)
        return with_ignored(answer, asked)

    router.include_router(embed_routes(engine, SENTENCE, stored_prompts(engine.encoder.model.directory)))
    return router
