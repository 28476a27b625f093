"""`/classify` and `/v1/rerank`: texts through an encoder."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from gralora_fx.errors import ServingError, shown
from gralora_fx.service.encoder import Tokens
from gralora_fx.service.engines import EncoderEngine
from gralora_fx.service.protocols.openai.requests import ClassifyRequest, Document, RerankRequest
from gralora_fx.service.protocols.openai.strict_model import with_ignored
from gralora_fx.service.replies import timeout_of, unless_disconnected
from gralora_fx.service.spans import note_model

_CLASSIFICATION = "text-classification"
Outputs: TypeAlias = Sequence[Mapping[str, NDArray[Any]]]
_SHORT = 2048  # characters or token ids below which a thread costs more than it saves


class Usage(BaseModel):
    """Number of tokens read."""

    prompt_tokens: int
    total_tokens: int


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
    """A document's score, by its index in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """Documents, most relevant first."""

    id: str
    model: str
    results: list[Rank]
    usage: Usage


def encoder_routes(engine: EncoderEngine) -> APIRouter:
    """Return the encoder's routes for texts, as its outputs and task allow."""
    router, encoder = APIRouter(), engine.encoder
    if not encoder.takes_texts:
        return router
    if classifies(engine):
        _add_classes(router, engine)
        if ranks(engine):
            router.post("/v1/rerank", response_model=RerankResponse, response_model_exclude_none=True)(reranks(engine))
    return router


def classifies(engine: EncoderEngine) -> bool:
    """Return whether a model classifies texts."""
    encoder = engine.encoder
    return encoder.takes_texts and encoder.model.task == _CLASSIFICATION and "logits" in encoder.outputs


def ranks(engine: EncoderEngine) -> bool:
    """Return whether a model that classifies texts is a cross-encoder, with one label."""
    return bool(engine.encoder.outputs["logits"].shape[-1] == 1)


def _add_classes(router: APIRouter, engine: EncoderEngine) -> None:
    config = engine.encoder.model.config

    def classes(index: int, output: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        scores = scores_of(finite(output["logits"]), config)
        labels = labels_of(config, len(scores))
        label = labels[int(scores.argmax())]
        return {"index": index, "label": label, "probs": scores, "num_classes": len(labels), "labels": labels}

    @router.post("/classify", response_model=ClassifyResponse)
    async def classify(asked: ClassifyRequest, request: Request) -> Response:
        def body(outputs: Outputs) -> dict[str, Any]:
            head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model}
            return {**head, "data": [classes(*pair) for pair in enumerate(outputs)]}

        model = engine.models.base if asked.model is None else asked.model
        answer = await answer_texts(engine, request, model, engine.encoder.reader.texts, asked.texts, body)
        return with_ignored(answer, asked)


def reranks(engine: EncoderEngine) -> Callable[[RerankRequest, Request], Awaitable[Response]]:
    """Return the endpoint that ranks documents."""
    encoder, relevance = engine.encoder, relevance_of(engine.encoder.model.config)

    async def rerank(asked: RerankRequest, request: Request) -> Response:
        def body(outputs: Outputs) -> dict[str, Any]:
            scores = [relevance(float(finite(output["logits"])[0])) for output in outputs]
            order = sorted(range(len(scores)), key=lambda index: -scores[index])[: asked.top_n]
            results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
            if asked.return_documents:
                results = [{**result, "document": {"text": texts[result["index"]]}} for result in results]
            return {"id": f"rerank-{uuid.uuid4().hex}", "model": model, "results": results}

        model, texts = engine.models.base if asked.model is None else asked.model, asked.texts
        answer = await answer_texts(engine, request, model, partial(encoder.reader.pairs, asked.query), texts, body)
        return with_ignored(answer, asked)

    return rerank


async def answer_texts(
    engine: EncoderEngine,
    request: Request,
    model: str,
    read: Callable[[Sequence[Any]], list[Tokens]],
    texts: Sequence[Any],
    body: Callable[[Outputs], dict[str, Any] | list[Any]],
) -> Response:
    """Run texts, each a string, token ids or a tuple of strings, and build a response; an object gets the usage."""
    encoder, begun = engine.encoder, time.monotonic()
    async with engine.models.use(model, timeout_of(request)) as adapter:
        note_model(request.scope, model, adapter)
        if not texts:
            raise ServingError("input has no texts; give at least one")
        encoder.batches.check_count(len(texts))
        size = sum(sum(map(len, text)) if isinstance(text, tuple) else len(text) for text in texts)
        rows = read(texts) if size <= _SHORT else await run_in_threadpool(read, texts)
        tokens = sum(len(row.ids) for row in rows)

        async def respond() -> Response:
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            answer = body(await encoder.texts(rows, adapter))
            answer = {**answer, "usage": usage} if isinstance(answer, dict) else answer
            return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

        return await unless_disconnected(request, respond, begun)


def finite(output: NDArray[Any]) -> NDArray[Any]:
    """Return an output; raise if it is not finite, since JSON cannot represent that."""
    if not np.isfinite(output).all():
        raise ServingError("the model's output for a text is not finite")
    return output


def scores_of(logits: NDArray[Any], config: Mapping[str, Any]) -> NDArray[Any]:
    """Return class scores from logits `[classes]`, activated as transformers' pipeline does for the model's config."""
    values = logits.astype(np.float64)
    kind = config.get("problem_type")
    if kind == "regression":
        return values
    if kind == "multi_label_classification" or len(values) == 1:
        return np.asarray(1 / (1 + np.exp(-values)))
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum())


def labels_of(config: Mapping[str, Any], count: int) -> list[str]:
    """Return the class names; transformers' defaults if the configuration has none."""
    names = config.get("id2label") or {}
    return [str(names.get(str(index), f"LABEL_{index}")) for index in range(count)]


def relevance_of(config: Mapping[str, Any]) -> Callable[[float], float]:
    """Return the function from a cross-encoder's logit to its score, as sentence-transformers configures it."""
    noted = config.get("sentence_transformers")
    name = noted.get("activation_fn") if isinstance(noted, Mapping) else None
    name = name or config.get("sbert_ce_default_activation_function") or "torch.nn.modules.activation.Sigmoid"
    functions: dict[str, Callable[[float], float]] = {"Sigmoid": _sigmoid, "Identity": float}
    kind = str(name).rpartition(".")[2]
    if kind not in functions:
        raise ServingError(
            f"config.json names {shown(name)} for the scores of a cross-encoder; there are Sigmoid and Identity"
        )
    return functions[kind]


def _sigmoid(value: float) -> float:
    if value < 0:
        return 1 - _sigmoid(-value)
    return 1 / (1 + math.exp(-value))
