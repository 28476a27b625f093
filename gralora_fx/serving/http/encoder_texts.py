"""`/v1/embeddings` and `/classify`: texts through an encoder."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool

from gralora_fx.errors import ServingError
from gralora_fx.serving.http.disconnects import unless_disconnected
from gralora_fx.serving.http.encoder import SENTENCE, Encoder
from gralora_fx.serving.http.engines import EncoderEngine
from gralora_fx.serving.http.openai_requests import ClassifyRequest, EmbeddingRequest

_CLASSIFICATION = "text-classification"


def encoder_text_routes(engine: EncoderEngine) -> APIRouter:
    """The routes that an encoder has for texts: by its outputs and its task."""
    router, encoder = APIRouter(), engine.encoder
    if not encoder.takes_texts:
        return router
    if SENTENCE in encoder.outputs:

        @router.post("/v1/embeddings")
        async def embed(asked: EmbeddingRequest, request: Request) -> Response:
            with engine.names.held(asked.model) as adapter:
                rows = await run_in_threadpool(_read, encoder, asked.input)
                return await unless_disconnected(request, _embeddings(encoder, rows, adapter, asked))

    if encoder.model.task == _CLASSIFICATION and "logits" in encoder.outputs:

        @router.post("/classify")
        async def classify(asked: ClassifyRequest, request: Request) -> Response:
            model = engine.names.base if asked.model is None else asked.model
            with engine.names.held(model) as adapter:
                rows = await run_in_threadpool(_read, encoder, asked.input)
                return await unless_disconnected(request, _classes(encoder, rows, adapter, model))

    return router


def _read(encoder: Encoder, given: str | Sequence[Any]) -> list[list[int]]:
    """Token ids of the texts of a request.

    Raises:
        ServingError: There are none, or one is not a text that the model takes.
    """
    is_single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    texts: Sequence[Any] = [given] if is_single else given
    if not texts:
        raise ServingError("input has no texts; give at least one")
    return [encoder.read(text) for text in texts]


async def _embeddings(
    encoder: Encoder, rows: list[list[int]], adapter: str | None, asked: EmbeddingRequest
) -> Response:
    results = await encoder.texts(rows, adapter)
    in_base64 = asked.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(result[SENTENCE], in_base64=in_base64)}
        for index, result in enumerate(results)
    ]
    return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": _usage(rows)})


def _vector(values: NDArray[Any], *, in_base64: bool) -> list[float] | str:
    floats = values.astype("<f4")
    return base64.b64encode(floats.tobytes()).decode() if in_base64 else floats.tolist()


async def _classes(encoder: Encoder, rows: list[list[int]], adapter: str | None, model: str) -> Response:
    results = await encoder.texts(rows, adapter)
    config = encoder.model.config
    data = []
    for index, result in enumerate(results):
        scores = scores_of(result["logits"], config)
        labels = _labels(config, len(scores))
        label = labels[int(scores.argmax())]
        fields = {"label": label, "probs": scores.tolist(), "num_classes": len(labels), "labels": labels}
        data.append({"index": index, **fields})
    body = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model}
    return JSONResponse({**body, "data": data, "usage": _usage(rows)})


def scores_of(logits: NDArray[Any], config: Mapping[str, Any]) -> NDArray[Any]:
    """Scores of a text's classes, by the function that transformers' pipeline applies.

    Args:
        logits: `[classes]`.
        config: Fields of the model's `config.json`.
    """
    values = logits.astype(np.float64)
    kind = config.get("problem_type")
    if kind == "regression":
        return values
    if kind == "multi_label_classification" or len(values) == 1:
        return np.asarray(1 / (1 + np.exp(-values)))
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum())


def _labels(config: Mapping[str, Any], count: int) -> list[str]:
    """The names of the classes; transformers' defaults where the configuration has none."""
    names = config.get("id2label") or {}
    return [str(names.get(str(index), f"LABEL_{index}")) for index in range(count)]


def _usage(rows: Sequence[Sequence[int]]) -> dict[str, int]:
    tokens = sum(map(len, rows))
    return {"prompt_tokens": tokens, "total_tokens": tokens}
