"""Requests of OpenAI's protocol for speech: a file and fields, as a form of several parts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from gralora_fx.errors import ServingError, shown
from gralora_fx.serving.http.openai_requests import Idle, OpenAIRequest
from gralora_fx.serving.sampling import Sampling

FORM = "multipart/form-data"
_FILE = "file"
_FIELDS = 64  # the most of a form
_TIMED = ("verbose_json", "srt", "vtt", "diarized_json")  # forms that say when something was said


class TranslationRequest(OpenAIRequest):
    """The fields of a request of `/v1/audio/translations`, beside the file.

    Attributes:
        model: The model's name.
        prompt: Text before the recording.
        response_format: `"json"` or `"text"`.
        temperature: 0 takes the likeliest token.
        seed: Seed of the draws.
        max_completion_tokens: The most tokens of the answer.
    """

    model_config = ConfigDict(extra="forbid", strict=False)  # a form's values are texts
    without_effect: ClassVar[Idle] = {"user": None}

    model: str
    prompt: str | None = None
    response_format: Literal["json", "text"] = "json"
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        if not self.temperature:
            return Sampling()
        seed = None if self.seed is None else self.seed % 2**31
        return Sampling(do_sample=True, temperature=self.temperature, top_k=0, seed=seed)

    @property
    def spoken(self) -> str | None:
        """The language that is spoken; None if it is not said."""
        return None

    @property
    def streams(self) -> bool:
        """Whether the answer is sent piece by piece."""
        return False


class TranscriptionRequest(TranslationRequest):
    """The fields of a request of `/v1/audio/transcriptions`, beside the file.

    Attributes:
        language: The language that is spoken, as `en` or `English`; None for that which the model hears.
        stream: Whether the answer is sent as server-sent events.
    """

    language: str | None = None
    stream: bool | None = None

    @property
    def spoken(self) -> str | None:
        """The language that is spoken; None if it is not said."""
        return self.language

    @property
    def streams(self) -> bool:
        """Whether the answer is sent piece by piece."""
        return bool(self.stream)


async def read_form(request: Request, kind: type[TranslationRequest]) -> tuple[TranslationRequest, bytes]:
    """The fields of a form, checked, and the content of its file.

    Args:
        request: The request.
        kind: The fields that it may have.

    Raises:
        ServingError: It is not such a form, has no file, or gives a field twice.
        RequestValidationError: A field is unknown, missing or wrong.
    """
    given = request.headers.get("content-type")
    if given is None or given.partition(";")[0].strip().lower() != FORM:
        what = "is missing" if given is None else f"is {shown(given)}"
        raise ServingError(f"the header Content-Type {what}; send the file and the fields beside it as {FORM}")
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
        raise ServingError(f"response_format {form} says when something was said, which is not done here; take json")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from error


def form_schema(kind: type[TranslationRequest]) -> dict[str, Any]:
    """A form as OpenAPI describes it.

    Args:
        kind: The fields that it may have, beside the file.
    """
    fields = kind.model_json_schema()
    recording = {"type": "string", "format": "binary", "description": "The recording."}
    schema = {
        "type": "object",
        "properties": {_FILE: recording, **fields["properties"]},
        "required": [_FILE, *fields["required"]],
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {FORM: {"schema": schema}}}}
