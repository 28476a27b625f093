"""`/v1/audio/transcriptions` and `/v1/audio/translations`: what was said in a recording, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from transformers import PrefixConstrainedLogitsProcessor

from gralora_fx.errors import ServingError
from gralora_fx.serving.encoder_inputs import EncoderInput, EncoderInputs
from gralora_fx.serving.http.deadlines import DeadlineError, timeout_of
from gralora_fx.serving.http.disconnects import unless_disconnected
from gralora_fx.serving.http.engines import TextEngine
from gralora_fx.serving.http.event_stream import END, EventStream, event
from gralora_fx.serving.http.failures import error_body, status_of
from gralora_fx.serving.http.text_answers import Questions, TextAnswers
from gralora_fx.serving.http.transcription_requests import (
    TranscriptionRequest,
    TranslationRequest,
    form_schema,
    read_form,
)
from gralora_fx.serving.sampling import Sampling
from gralora_fx.serving.scheduling.queue import RunError
from gralora_fx.serving.scheduling.text_jobs import TextRequest
from gralora_fx.serving.speech.audio_files import Audio, read_audio
from gralora_fx.serving.speech.speech_prompt import TRANSCRIBE, TRANSLATE, SpeechPrompt, earlier_text
from gralora_fx.serving.token_scores import TokenScore

_TRANSCRIPTIONS, _TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"


def speech_routes(engine: TextEngine) -> APIRouter:
    """The routes of a model of speech.

    Raises:
        ServingError: What reads forms is not installed.
    """
    if find_spec("python_multipart") is None:  # starlette's parser of forms, which asks for it at the first request
        raise ServingError("forms need the package python-multipart; pip install 'gralora-fx[serve]'")
    router, inputs = APIRouter(), engine.inputs
    assert inputs is not None

    @router.post(_TRANSCRIPTIONS, openapi_extra=form_schema(TranscriptionRequest))
    async def transcribe(request: Request) -> Response:
        return await _answer(engine, inputs, request, TranscriptionRequest, TRANSCRIBE)

    @router.post(_TRANSLATIONS, openapi_extra=form_schema(TranslationRequest))
    async def translate(request: Request) -> Response:
        return await _answer(engine, inputs, request, TranslationRequest, TRANSLATE)

    return router


@dataclass(frozen=True)
class _LanguageOf(EncoderInput):
    """What an encoder reads to hear a language: the answer is one of its tokens.

    Attributes:
        languages: Ids of the tokens.
    """

    languages: Sequence[int] = ()

    def processors(self, sampling: Sampling, prompt: Sequence[int], new_tokens: int) -> list[Any]:
        """What leaves these tokens alone."""
        return [PrefixConstrainedLogitsProcessor(lambda batch, ids: list(self.languages), 1)]


async def _answer(
    engine: TextEngine, inputs: EncoderInputs, request: Request, kind: type[TranslationRequest], task: str
) -> Response:
    seconds, begun = timeout_of(request), time.monotonic()
    asked, content = await read_form(request, kind)
    with engine.names.held(asked.model) as adapter:
        audio, question = await _read(engine, inputs, asked, content, task, adapter, seconds)
        left = None if seconds is None else max(seconds - (time.monotonic() - begun), 0.0)
        answers = TextAnswers(engine, Questions([question], [""], len(question.prompt)), left)
    if asked.streams:
        return EventStream(answers, _events(answers, audio))
    try:
        return await unless_disconnected(request, _whole(answers, asked, audio))
    finally:
        answers.cancel()


async def _read(
    engine: TextEngine,
    inputs: EncoderInputs,
    asked: TranslationRequest,
    content: bytes,
    task: str,
    adapter: str | None,
    seconds: float | None,
) -> tuple[Audio, TextRequest]:
    """The recording, and what is asked about it."""
    rules, context = inputs.rules, engine.queue.limits.context
    earlier = earlier_text(engine.tokenizer, asked.prompt, context) if asked.prompt else ()
    chosen = task if getattr(rules.config, "task_to_id", None) or task == TRANSLATE else None
    speech = SpeechPrompt(rules, asked.spoken, chosen, earlier)
    audio, source = await run_in_threadpool(_source, inputs, content)
    heard = await _heard(engine, speech, source, adapter, seconds) if speech.languages else None
    prompt = tuple(speech.tokens(heard))
    room = max(context - len(prompt), 1)
    most = asked.max_completion_tokens or min(rules.new_tokens(len(prompt)) or room, room)
    return audio, TextRequest(prompt, most, asked.sampling, (), adapter, source=source)


def _source(inputs: EncoderInputs, content: bytes) -> tuple[Audio, EncoderInput]:
    audio = read_audio(content, inputs.speech.most_seconds)
    return audio, inputs.of_recording(audio)


async def _heard(
    engine: TextEngine, speech: SpeechPrompt, source: EncoderInput, adapter: str | None, seconds: float | None
) -> int:
    """The language of a recording, as the first token of its own answer; the encoder's output is kept for the next."""
    asked = _LanguageOf(source.arrays, source.rules, languages=speech.languages)
    question = TextRequest((source.rules.start,), 1, Sampling(logprobs=0), (), adapter, source=asked)
    answers = TextAnswers(engine, Questions([question], [""], 1), seconds)
    scores: tuple[TokenScore, ...] = ()
    try:
        async for _, piece in answers.pieces():
            scores += piece.scores
    finally:
        answers.cancel()
    if not scores:
        raise RunError("the model hears no language; give language")
    return scores[0].token


def _usage(audio: Audio) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(audio.seconds, 3)}


async def _whole(answers: TextAnswers, asked: TranslationRequest, audio: Audio) -> Response:
    text = "".join([piece.text async for _, piece in answers.pieces()]).strip()
    if asked.response_format == "text":
        return PlainTextResponse(f"{text}\n")
    return JSONResponse({"text": text, "usage": _usage(audio)})


async def _events(answers: TextAnswers, audio: Audio) -> AsyncIterator[bytes]:
    """Server-sent events; a stream that failed midway, or took too long, ends with an error."""
    text = ""
    try:
        async for _, piece in answers.pieces():
            new = piece.text if text else piece.text.lstrip()
            text += new
            if new:
                yield event({"type": "transcript.text.delta", "delta": new})
        yield event({"type": "transcript.text.done", "text": text, "usage": _usage(audio)})
    except (RunError, DeadlineError) as error:
        answers.cancel()
        yield event(error_body(status_of(error), str(error)))
    yield END
