"""Request fields for an answer's form: OpenAI's `response_format`, and vLLM's equivalents and extensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from gralora_fx.features.structured_outputs.answer_form import FormKind
from gralora_fx.run.generate.constraints import Wanted
from gralora_fx.run.generate.request_errors import WrongFieldError
from gralora_fx.service.protocols.openai.answer_plan import PlannedRequest
from gralora_fx.service.protocols.openai.strict_model import ListOf, StrictModel, wrong_field

_ANY_OBJECT = {"type": "object"}


class JsonSchemaFormat(StrictModel):
    """A named JSON schema. The name and the description are not used; the schema is always followed."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def named(self, name: str) -> Wanted:
        """Return the form by the name of the field that holds it."""
        if (self.type == "json_schema") is not (self.json_schema is not None):
            is_missing = self.json_schema is None
            problem = (
                "it is missing; give it" if is_missing else f"it has no effect with type {self.type}; leave it out"
            )
            raise WrongFieldError(f"{name}.json_schema", problem)
        if self.json_schema is not None:
            return {f"{name}.json_schema.schema": ("json", self.json_schema.schema_)}
        return {name: ("json", _ANY_OBJECT)} if self.type == "json_object" else {}


class StructuredOutputs(StrictModel):
    """vLLM's `structured_outputs`; one field is given."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: ListOf[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def named(self, name: str) -> Wanted:
        """Return the forms by the names of the fields that hold them."""
        whole = _ANY_OBJECT if self.json_object else None
        given: Wanted = {
            f"{name}.json": ("json", self.json_),
            f"{name}.regex": ("regex", self.regex),
            f"{name}.choice": ("choice", self.choice),
            f"{name}.grammar": ("grammar", self.grammar),
            f"{name}.json_object": ("json", whole),
        }
        if all(value is None for _, value in given.values()):
            raise WrongFieldError(name, "it has no form; give json, regex, choice, grammar or json_object")
        return given


class AnswerFormat(PlannedRequest):
    """Fields for an answer's form; `guided_` are vLLM's older names of those in `structured_outputs`."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: ListOf[str] | None = None
    guided_grammar: str | None = None

    def wanted(self) -> Wanted:
        """Return the requested forms by field."""
        given: dict[str, tuple[FormKind, Any]] = {
            "guided_json": ("json", self.guided_json),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("choice", self.guided_choice),
            "guided_grammar": ("grammar", self.guided_grammar),
        }
        if self.response_format is not None:
            given |= self.response_format.named("response_format")
        if self.structured_outputs is not None:
            given |= self.structured_outputs.named("structured_outputs")
        return given


class TextFormat(StrictModel):
    """The form of a response's text. A schema is followed whether it is `strict` or not."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> TextFormat:
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if self.type == "json_schema" and value is None:
                raise wrong_field(name, "missing", "it is missing")
            if self.type != "json_schema" and value is not None:
                raise wrong_field(name, "type", f"it has no effect with type {self.type}; leave it out")
        return self


class FormattedText(StrictModel):
    """Options of a response's text, including its form."""

    format: TextFormat | None = None


class ResponseFormats(PlannedRequest):
    """A response request whose text may have a form."""

    changing: ClassVar[frozenset[str]] = frozenset({"text"})

    if TYPE_CHECKING:  # the field itself is the request's
        text: FormattedText | None

    def wanted(self) -> Wanted:
        """Return the requested form of the text, by field."""
        given = None if self.text is None else self.text.format
        if given is None or given.type == "text":
            return {}
        if given.schema_ is None:
            return {"text.format": ("json", _ANY_OBJECT)}
        return {"text.format.schema": ("json", given.schema_)}

    def echoed(self) -> Iterator[tuple[str, Any]]:
        """Return the request's fields that its response repeats."""
        yield from super().echoed()
        text = self.text.format if self.text is not None and self.text.format is not None else TextFormat(type="text")
        yield "text", {"format": text.model_dump(by_alias=True, exclude_none=True)}


FIELDS = {
    "CompletionRequest": AnswerFormat,
    "ChatRequest": AnswerFormat,
    "TextConfig": FormattedText,
    "ResponseRequest": ResponseFormats,
}
