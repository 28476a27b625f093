"""`/v1/embeddings`, `/classify` and `/v1/rerank`: texts through an encoder."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool

from gralora_fx.errors import ServingError
from gralora_fx.serving.http.disconnects import unless_disconnected
from gralora_fx.serving.http.encoder import SENTENCE, Encoder
from gralora_fx.serving.http.encoder_requests import (
    ClassifyRequest,
    ClassifyResponse,
    Document,
    EmbeddingRequest,
    EmbeddingResponse,
    RerankRequest,
    RerankResponse,
)
from gralora_fx.serving.http.engines import EncoderEngine
from gralora_fx.serving.http.scores import finite, labels_of, relevance_of, scores_of
from gralora_fx.serving.http.text_reader import Tokens

_CLASSIFICATION = "text-classification"
_SHORT = 2048  # letters, or token ids, that are read sooner than another thread begins


def encoder_text_routes(engine: EncoderEngine) -> APIRouter:
    """The routes that an encoder has for texts: by its outputs and its task.

    Raises:
        ServingError: A cross-encoder's configuration names a function of scores that is not known.
    """
    router, encoder = APIRouter(), engine.encoder
    if not encoder.takes_texts:
        return router
    if SENTENCE in encoder.outputs:
        _add_embeddings(router, engine)
    if encoder.model.task == _CLASSIFICATION and "logits" in encoder.outputs:
        _add_classes(router, engine)
        if encoder.outputs["logits"].shape[-1] == 1:
            _add_rerank(router, engine)
    return router


def _add_embeddings(router: APIRouter, engine: EncoderEngine) -> None:
    encoder = engine.encoder

    @router.post("/v1/embeddings", response_model=EmbeddingResponse)
    async def embed(asked: EmbeddingRequest, request: Request) -> Response:
        with engine.names.held(asked.model) as adapter:
            rows = await _read(encoder, asked.input)
            return await unless_disconnected(request, _embeddings(encoder, rows, adapter, asked))


def _add_classes(router: APIRouter, engine: EncoderEngine) -> None:
    encoder = engine.encoder

    @router.post("/classify", response_model=ClassifyResponse)
    async def classify(asked: ClassifyRequest, request: Request) -> Response:
        model = engine.names.base if asked.model is None else asked.model
        with engine.names.held(model) as adapter:
            rows = await _read(encoder, asked.input)
            return await unless_disconnected(request, _classes(encoder, rows, adapter, model))


def _add_rerank(router: APIRouter, engine: EncoderEngine) -> None:
    encoder, relevance = engine.encoder, relevance_of(engine.encoder.model.config)

    async def rerank(asked: RerankRequest, request: Request) -> Response:
        model = engine.names.base if asked.model is None else asked.model
        with engine.names.held(model) as adapter:
            rows = await _reading(encoder, partial(encoder.reader.pairs, asked.query, asked.texts), asked.texts)
            return await unless_disconnected(request, _ranks(encoder, rows, adapter, model, asked, relevance))

    for path in ("/v1/rerank", "/rerank"):
        router.post(path, response_model=RerankResponse, response_model_exclude_none=True)(rerank)


async def _read(encoder: Encoder, given: str | Sequence[Any]) -> list[Tokens]:
    """The tokens of the texts of a request.

    Raises:
        ServingError: There are none, or one is not a text that the model takes.
    """
    is_single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    texts: Sequence[Any] = [given] if is_single else given
    if not texts:
        raise ServingError("input has no texts; give at least one")
    return await _reading(encoder, partial(encoder.reader.texts, texts), texts)


async def _reading(encoder: Encoder, read: Callable[[], list[Tokens]], texts: Sequence[Any]) -> list[Tokens]:
    """Read texts, in another thread where there is so much that other requests would wait for it.

    Raises:
        ServingError: They are more than there is ever room for, or the reader does not take one.
    """
    encoder.batches.check_count(len(texts))
    return read() if sum(map(len, texts)) <= _SHORT else await run_in_threadpool(read)


async def _embeddings(encoder: Encoder, rows: list[Tokens], adapter: str | None, asked: EmbeddingRequest) -> Response:
    results = await encoder.texts(rows, adapter)
    in_base64 = asked.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(finite(result[SENTENCE]), in_base64=in_base64)}
        for index, result in enumerate(results)
    ]
    return _json({"object": "list", "data": data, "model": asked.model, "usage": _usage(rows)})


def _vector(values: NDArray[Any], *, in_base64: bool) -> NDArray[Any] | str:
    floats = values.astype("<f4")
    return base64.b64encode(floats.tobytes()).decode() if in_base64 else floats


async def _classes(encoder: Encoder, rows: list[Tokens], adapter: str | None, model: str) -> Response:
    results = await encoder.texts(rows, adapter)
    config = encoder.model.config
    data = []
    for index, result in enumerate(results):
        scores = scores_of(finite(result["logits"]), config)
        labels = labels_of(config, len(scores))
        label = labels[int(scores.argmax())]
        data.append({"index": index, "label": label, "probs": scores, "num_classes": len(labels), "labels": labels})
    body = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model}
    return _json({**body, "data": data, "usage": _usage(rows)})


async def _ranks(
    encoder: Encoder,
    rows: list[Tokens],
    adapter: str | None,
    model: str,
    asked: RerankRequest,
    relevance: Callable[[float], float],
) -> Response:
    outputs = await encoder.texts(rows, adapter)
    scores = [relevance(float(finite(output["logits"])[0])) for output in outputs]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: asked.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if asked.return_documents:
        for result in results:
            result["document"] = Document(text=asked.texts[result["index"]]).model_dump()
    return _json({"id": f"rerank-{uuid.uuid4().hex}", "model": model, "results": results, "usage": _usage(rows)})


def _json(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _usage(rows: Sequence[Tokens]) -> dict[str, int]:
    tokens = sum(len(row.ids) for row in rows)
    return {"prompt_tokens": tokens, "total_tokens": tokens}
