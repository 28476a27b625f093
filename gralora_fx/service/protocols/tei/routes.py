"""`/embed`, `/predict` and `/rerank`: answers of an encoder in the form of Text Embeddings Inference's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import BaseModel

from gralora_fx.errors import ServingError, shown
from gralora_fx.service.encoder import TextReader, Tokens
from gralora_fx.service.engines import EncoderEngine
from gralora_fx.service.error_responses import note_embeddings_form
from gralora_fx.service.protocols.openai.encoders import (
    Outputs,
    RerankResponse,
    answer_texts,
    classifies,
    finite,
    labels_of,
    ranks,
    relevance_of,
    reranks,
    scores_of,
)
from gralora_fx.service.protocols.openai.requests import RerankRequest
from gralora_fx.service.protocols.openai.strict_model import with_ignored
from gralora_fx.service.protocols.tei.requests import AnyRank, EmbedRequest, PredictRequest, RankRequest

_SMALLEST_NORM = 1e-12


class Prediction(BaseModel):
    """The score of a class."""

    label: str
    score: float


class TextScore(BaseModel):
    """A text's score, by its index in the request."""

    index: int
    score: float
    text: str | None = None


def embed_routes(engine: EncoderEngine, output: str, prompts: Mapping[str, str]) -> APIRouter:
    """Return the route of embeddings.

    Args:
        engine: An encoder of texts.
        output: The name of its embeddings `[batch, size]`.
        prompts: Texts to put before those of a request that names them.
    """
    router, size = APIRouter(), engine.encoder.outputs[output].shape[-1]

    @router.post("/embed", response_model=list[list[float]])
    async def embed(asked: EmbedRequest, request: Request, model: str | None = None) -> Response:
        if isinstance(size, int) and (asked.dimensions or 0) > size:
            problem = f"dimensions={asked.dimensions}: the model's embeddings have {size}; give at most that"
            raise ServingError(problem).about("dimensions")

        def body(outputs: Outputs) -> list[NDArray[Any]]:
            vectors = [finite(each[output]).astype(np.float32)[: asked.dimensions] for each in outputs]
            if asked.normalize:
                vectors = [vector / max(float(np.linalg.norm(vector)), _SMALLEST_NORM) for vector in vectors]
            return vectors

        read, texts = partial(engine.encoder.reader.texts, truncate=asked.truncate), _prompted(asked, prompts)
        answer = await answer_texts(engine, request, _model(engine, asked.model, model), read, texts, body)
        return with_ignored(answer, asked)

    return router


def classifier_routes(engine: EncoderEngine) -> APIRouter:
    """Return the routes of classes and, for a cross-encoder, of ranks; none for other models."""
    router = APIRouter()
    if classifies(engine):
        _add_predict(router, engine)
        if ranks(engine):
            _add_rank(router, engine)
    return router


def _add_predict(router: APIRouter, engine: EncoderEngine) -> None:
    reader, config = engine.encoder.reader, engine.encoder.model.config

    @router.post("/predict", response_model=list[Prediction] | list[list[Prediction]])
    async def predict(asked: PredictRequest, request: Request, model: str | None = None) -> Response:
        def classes(logits: NDArray[Any]) -> list[dict[str, Any]]:
            scores = finite(logits) if asked.raw_scores else scores_of(finite(logits), config)
            labels = labels_of(config, len(scores))
            return [{"label": labels[index], "score": scores[index]} for index in np.argsort(-scores, kind="stable")]

        def body(outputs: Outputs) -> list[Any]:
            found = [classes(output["logits"]) for output in outputs]
            return found if asked.is_batch else found[0]

        read = partial(_read_each, reader, asked.truncate)
        answer = await answer_texts(engine, request, _model(engine, asked.model, model), read, asked.texts, body)
        return with_ignored(answer, asked)


def _add_rank(router: APIRouter, engine: EncoderEngine) -> None:
    reader, relevance, rerank = engine.encoder.reader, relevance_of(engine.encoder.model.config), reranks(engine)

    async def rank(asked: RankRequest, request: Request, model: str | None) -> Response:
        def body(outputs: Outputs) -> list[dict[str, Any]]:
            logits = [float(finite(output["logits"])[0]) for output in outputs]
            scores = logits if asked.raw_scores else [relevance(logit) for logit in logits]
            order = sorted(range(len(scores)), key=lambda index: -scores[index])
            texts = [{"text": text} if asked.return_text else {} for text in asked.texts]
            return [{"index": index, **texts[index], "score": scores[index]} for index in order]

        read = partial(reader.pairs, asked.query, truncate=asked.truncate)
        return await answer_texts(engine, request, _model(engine, asked.model, model), read, asked.texts, body)

    @router.post("/rerank", response_model=list[TextScore] | RerankResponse, response_model_exclude_none=True)
    async def either(asked: AnyRank, request: Request, model: str | None = None) -> Response:
        if isinstance(asked, RerankRequest):
            return await rerank(asked.model_copy(update={"model": _model(engine, asked.model, model)}), request)
        note_embeddings_form(request.scope)
        return await rank(asked, request, model)


def _model(engine: EncoderEngine, named: str | None, in_url: str | None) -> str:
    """Return the model named in the body or, for clients whose bodies have no field for it, in the URL."""
    if named is not None and in_url is not None and named != in_url:
        raise ServingError(f"model is {shown(named)} in the body and {shown(in_url)} in the URL; name one").about(
            "model"
        )
    return named or in_url or engine.models.base


def _prompted(asked: EmbedRequest, prompts: Mapping[str, str]) -> list[Any]:
    """Return the texts, each after the prompt that a request names."""
    if asked.prompt_name is None:
        return asked.texts
    if asked.prompt_name not in prompts:
        there = f"there is {', '.join(map(shown, prompts))}" if prompts else "the export has none"
        raise ServingError(f"no prompt {shown(asked.prompt_name)}; {there}").about("prompt_name")
    if not all(isinstance(text, str) for text in asked.texts):
        raise ServingError("prompt_name has no effect on token ids; put the prompt's before them").about("prompt_name")
    return [f"{prompts[asked.prompt_name]}{text}" for text in asked.texts]


def _read_each(reader: TextReader, truncate: bool, texts: Any) -> list[Tokens]:
    """Tokenize texts and pairs."""
    rows = [
        reader.pairs(text[0], text[1:], truncate=truncate) if text[1:] else reader.texts(text, truncate=truncate)
        for text in texts
    ]
    return [row for (row,) in rows]
