"""`/v1/audio/transcriptions` and `/v1/audio/translations`: a recording's text, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from gralora_fx.errors import ServingError, shown
from gralora_fx.features.speech.recordings import Audio, read_audio
from gralora_fx.features.speech.speech_inputs import TRANSCRIBE, TRANSLATE, SpeechInputs, SpeechPrompt, earlier_text
from gralora_fx.run.generate.answer_options import AnswerOptions, Sampling
from gralora_fx.run.generate.completion import TextRequest
from gralora_fx.run.generate.logit_rules import Scores
from gralora_fx.run.generate.prompts import EncoderInput
from gralora_fx.run.generate.request_errors import RunError
from gralora_fx.run.generate.token_choice import TokenScore
from gralora_fx.service.engines import TextEngine
from gralora_fx.service.protocols.openai.requests import Seed, Temperature, Whole
from gralora_fx.service.protocols.openai.strict_model import EVERYWHERE, Idle, StrictModel, with_ignored
from gralora_fx.service.replies import EventStream, TextAnswers, timeout_of
from gralora_fx.service.spans import note_model

_FORM = "multipart/form-data"
_FILE = "file"
_FIELDS = 64  # maximum number of form fields
_TIMED = ("verbose_json", "srt", "vtt", "diarized_json")  # formats with timestamps
_TRANSCRIPTIONS, _TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"


class TranslationRequest(StrictModel):
    """Form fields of `/v1/audio/translations`, beside the file.

    Attributes:
        model: The model's name.
        prompt: Text before the recording.
        response_format: `"json"` or `"text"`.
        temperature: 0 is greedy decoding.
        seed: Seed of the draws.
        max_completion_tokens: Maximum tokens of the answer.
    """

    model_config = ConfigDict(extra="forbid", strict=False)  # a form's values are texts
    without_effect: ClassVar[Idle] = EVERYWHERE

    model: str
    prompt: str | None = None
    response_format: Literal["json", "text"] = "json"
    temperature: Temperature = 0.0
    seed: Seed | None = None
    max_completion_tokens: Whole | None = None

    @property
    def sampling(self) -> Sampling:
        """The sampling parameters."""
        if not self.temperature:
            return Sampling()
        return Sampling(do_sample=True, temperature=self.temperature, top_k=0, seed=self.seed)

    @property
    def spoken(self) -> str | None:
        """The spoken language; None if not given."""
        return None

    @property
    def streams(self) -> bool:
        """Return whether the answer is streamed."""
        return False


class TranscriptionRequest(TranslationRequest):
    """Form fields of `/v1/audio/transcriptions`, beside the file.

    Attributes:
        language: The spoken language, as `en` or `English`; None to detect it.
        stream: Whether to send the answer as server-sent events.
    """

    language: str | None = None
    stream: bool | None = None

    @property
    def spoken(self) -> str | None:
        """The spoken language; None if not given."""
        return self.language

    @property
    def streams(self) -> bool:
        """Return whether the answer is streamed."""
        return bool(self.stream)


async def read_form(request: Request, kind: type[TranslationRequest]) -> tuple[TranslationRequest, bytes]:
    """Read a form: its fields, checked, and its file's content."""
    content_type = request.headers.get("content-type")
    if content_type is None or content_type.partition(";")[0].strip().lower() != _FORM:
        what = "is missing" if content_type is None else f"is {shown(content_type)}"
        raise ServingError(f"the header Content-Type {what}; send the file and the fields beside it as {_FORM}")
    async with request.form(max_files=2, max_fields=_FIELDS) as form:
        files = [value for name, value in form.multi_items() if name == _FILE]
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            if name == _FILE:
                continue
            if isinstance(value, UploadFile):
                raise ServingError(f"{shown(name)} is a file; give the recording as {_FILE}, and all others as text")
            if name in fields:
                raise ServingError(f"{shown(name)} is given twice; give it once")
            fields[name] = value
        if len(files) != 1 or not isinstance(files[0], UploadFile):
            count = "twice" if len(files) > 1 else "as a text" if files else "not at all"
            raise ServingError(f"{_FILE}, the recording, is given {count}; give it once, as a file with a name")
        content = await files[0].read()
    return _checked(fields, kind), content


def _checked(fields: dict[str, Any], kind: type[TranslationRequest]) -> TranslationRequest:
    if (form := fields.get("response_format")) in _TIMED:
        raise ServingError(f"response_format {form} needs timestamps, which are not supported; use json")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from error


def form_schema(kind: type[TranslationRequest]) -> dict[str, Any]:
    """Return a form's OpenAPI description."""
    fields = kind.model_json_schema()
    recording = {"type": "string", "format": "binary", "description": "The recording."}
    schema = {
        "type": "object",
        "properties": {_FILE: recording, **fields["properties"]},
        "required": [_FILE, *fields["required"]],
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {_FORM: {"schema": schema}}}}


def speech_routes(engine: TextEngine) -> APIRouter:
    """Return the routes of a speech model; none for others."""
    router, inputs = APIRouter(), engine.inputs
    if not isinstance(inputs, SpeechInputs):
        return router

    @router.post(_TRANSCRIPTIONS, openapi_extra=form_schema(TranscriptionRequest))
    async def transcribe(request: Request) -> Response:
        return await _answer(engine, inputs, request, TranscriptionRequest, TRANSCRIBE)

    @router.post(_TRANSLATIONS, openapi_extra=form_schema(TranslationRequest))
    async def translate(request: Request) -> Response:
        return await _answer(engine, inputs, request, TranslationRequest, TRANSLATE)

    return router


@dataclass(frozen=True)
class _LanguageOf(EncoderInput):
    """Encoder input for language detection: the answer is one of the language tokens."""

    languages: Sequence[int] = ()  # ids of the tokens

    def processors(self, sampling: Sampling, prompt: Sequence[int], new_tokens: int) -> list[Any]:
        """Return a rule that allows only these tokens."""

        def only(ids: Sequence[int], scores: Scores) -> None:
            known = scores[list(self.languages)]
            scores[:] = -np.inf
            scores[list(self.languages)] = known

        return [only]


async def _answer(
    engine: TextEngine, inputs: SpeechInputs, request: Request, kind: type[TranslationRequest], task: str
) -> Response:
    seconds, begun = timeout_of(request), time.monotonic()
    asked, content = await read_form(request, kind)
    rules, context = inputs.rules, engine.queue.limits.context
    async with engine.models.use(asked.model, seconds) as adapter:
        note_model(request.scope, asked.model, adapter)
        earlier = earlier_text(engine.tokenizer, asked.prompt, context) if asked.prompt else ()
        chosen = task if rules.config.get("task_to_id") or task == TRANSLATE else None
        speech = SpeechPrompt(rules, asked.spoken, chosen, earlier)
        audio, source = await run_in_threadpool(_source, inputs, content)
        heard = await _heard(engine, speech, source, adapter, seconds) if speech.languages else None
        prompt = tuple(speech.tokens(heard))
        room = max(context - len(prompt), 1)
        most = asked.max_completion_tokens or min(rules.new_tokens(len(prompt)) or room, room)
        question = TextRequest(prompt, most, AnswerOptions(asked.sampling), adapter, source)
        left = None if seconds is None else max(seconds - (time.monotonic() - begun), 0.0)
        answers = TextAnswers(engine.queue, [question], len(prompt), left)
    if asked.streams:
        return with_ignored(EventStream(answers, _deltas(answers, audio)), asked)
    return with_ignored(await answers.respond(request, partial(_whole, answers, asked, audio)), asked)


def _source(inputs: SpeechInputs, content: bytes) -> tuple[Audio, EncoderInput]:
    audio = read_audio(content, inputs.speech.most_seconds)
    return audio, inputs.of_recording(audio)


async def _heard(
    engine: TextEngine, speech: SpeechPrompt, source: EncoderInput, adapter: str | None, seconds: float | None
) -> int:
    """Return a recording's language, decoded as one token; the encoder's output is reused for the answer."""
    asked = _LanguageOf(source.arrays, source.rules, languages=speech.languages)
    question = TextRequest((source.rules.start,), 1, AnswerOptions(Sampling(logprobs=0)), adapter, asked)
    answers = TextAnswers(engine.queue, [question], 1, seconds)
    scores: tuple[TokenScore, ...] = ()
    try:
        async for _, piece in answers.pieces():
            scores += piece.scores
    finally:
        answers.cancel()
    if not scores:
        raise RunError("the model detects no language; give language")
    return scores[0].token


def _usage(audio: Audio) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(audio.seconds, 3)}


async def _whole(answers: TextAnswers, asked: TranslationRequest, audio: Audio) -> Response:
    text = "".join([piece.text async for _, piece in answers.pieces()]).strip()
    if asked.response_format == "text":
        return PlainTextResponse(f"{text}\n")
    return JSONResponse({"text": text, "usage": _usage(audio)})


async def _deltas(answers: TextAnswers, audio: Audio) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a stream."""
    text = ""
    async for _, piece in answers.pieces():
        new = piece.text if text else piece.text.lstrip()
        text += new
        if new:
            yield {"type": "transcript.text.delta", "delta": new}
    yield {"type": "transcript.text.done", "text": text, "usage": _usage(audio)}
