"""Forms with a recording: what is read of them, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from gralora_fx.errors import ServingError
from gralora_fx.features.speech.speech_routes import TranscriptionRequest, TranslationRequest, read_form

RECORDING = ("file", b"RIFF and more", "a.wav")


def request_of(parts: list[tuple[str, bytes, str | None]], kind: str = "multipart/form-data; boundary=xxx") -> Request:
    body = b""
    for name, content, file in parts:
        head = f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{file}"' if file else "")
        body += b"--xxx\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n"
    body += b"--xxx--\r\n"

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", kind.encode())] if kind else []
    return Request(
        {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b"", "app": None}, receive
    )


def read(*fields: tuple[str, str], parts: Any = (RECORDING,), kind: Any = TranscriptionRequest, **more: Any) -> Any:
    texts = [(name, value.encode(), None) for name, value in fields]
    return asyncio.run(read_form(request_of([*texts, *parts], **more), kind))


@pytest.mark.quick
def test_fields_are_read_as_their_own_types() -> None:
    fields = {
        "model": "whisper",
        "language": "de",
        "temperature": "0.5",
        "stream": "true",
        "seed": "7",
        "prompt": "",
        "response_format": "text",
        "max_completion_tokens": "9",
    }
    asked, content = read(*fields.items())
    assert content == RECORDING[1]
    assert (asked.spoken, asked.streams, asked.response_format) == ("de", True, "text")
    assert (asked.temperature, asked.seed, asked.max_completion_tokens) == (0.5, 7, 9)
    assert asked.sampling.do_sample
    assert asked.sampling.seed == 7


def test_what_is_not_given_is_the_likeliest_as_json() -> None:
    asked, _ = read(("model", "whisper"), ("temperature", "0"))
    assert not asked.sampling.do_sample
    assert (asked.spoken, asked.streams, asked.response_format) == (None, False, "json")


@pytest.mark.parametrize(
    ("fields", "more", "message"),
    [
        (
            [],
            {"kind": "application/json"},
            "Content-Type is 'application/json'; send the file .* as multipart",
        ),
        ([], {"kind": ""}, "Content-Type is missing"),
        ([("model", "m")], {"parts": ()}, "file, the recording, is given not at all"),
        ([("model", "m")], {"parts": [("file", b"text", None)]}, "file, the recording, is given as a text"),
        ([("model", "m")], {"parts": [RECORDING, RECORDING]}, "file, the recording, is given twice"),
        ([("model", "m")], {"parts": [RECORDING, ("prompt", b"x", "p.txt")]}, "'prompt' is a file; give the recording"),
        ([("model", "m"), ("model", "n")], {}, "'model' is given twice"),
        (
            [("model", "m"), ("response_format", "srt")],
            {},
            "response_format srt needs timestamps, which are not supported; use json",
        ),
        ([("model", "m"), ("response_format", "verbose_json")], {}, "response_format verbose_json"),
    ],
)
def test_what_is_not_such_a_form_is_said(fields: Any, more: dict[str, Any], message: str) -> None:
    if "kind" in more:
        asked = request_of([RECORDING], more["kind"])
        with pytest.raises(ServingError, match=message):
            asyncio.run(read_form(asked, TranscriptionRequest))
        return
    with pytest.raises(ServingError, match=message):
        read(*fields, **more)


@pytest.mark.parametrize(
    ("fields", "kind", "place"),
    [
        ([], TranscriptionRequest, "model"),
        ([("model", "m"), ("temperature", "warm")], TranscriptionRequest, "temperature"),
        ([("model", "m"), ("temperature", "nan")], TranscriptionRequest, "temperature"),
        ([("model", "m"), ("stream", "perhaps")], TranscriptionRequest, "stream"),
        ([("model", "m"), ("response_format", "xml")], TranscriptionRequest, "response_format"),
        ([("model", "m"), ("timestamp_granularities[]", "word")], TranscriptionRequest, "timestamp_granularities[]"),
        ([("model", "m"), ("language", "de")], TranslationRequest, "language"),
        ([("model", "m"), ("stream", "true")], TranslationRequest, "stream"),
    ],
)
def test_a_wrong_field_is_named(fields: Any, kind: Any, place: str) -> None:
    with pytest.raises(RequestValidationError) as caught:
        read(*fields, kind=kind)
    assert caught.value.errors()[0]["loc"] == ("body", place)


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=other"])
def test_a_form_that_cannot_be_taken_apart_is_refused(kind: str) -> None:
    with pytest.raises(HTTPException, match="400"):
        asyncio.run(read_form(request_of([RECORDING], kind), TranscriptionRequest))
