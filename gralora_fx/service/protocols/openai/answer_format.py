"""The form of an answer in a request: OpenAI's `response_format`, and vLLM's names for the same and for other forms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from gralora_fx.run.generate.answer_form import FormError, FormKind, GivenForms
from gralora_fx.service.protocols.openai.strict_model import ListOf, StrictModel

_ANY_OBJECT = {"type": "object"}


class JsonSchemaFormat(StrictModel):
    """A JSON schema with a name. The name and the description are not used, and the schema is followed in any case."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """OpenAI's form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def named(self, name: str) -> GivenForms:
        """The form by the field that says it."""
        if (self.type == "json_schema") is not (self.json_schema is not None):
            is_missing = self.json_schema is None
            problem = (
                "it is missing; give it" if is_missing else f"it has no effect with type {self.type}; leave it out"
            )
            raise FormError(f"{name}.json_schema", problem)
        if self.json_schema is not None:
            return {f"{name}.json_schema.schema": ("json", self.json_schema.schema_)}
        return {name: ("json", _ANY_OBJECT)} if self.type == "json_object" else {}


class StructuredOutputs(StrictModel):
    """vLLM's form of an answer, of which one field is given."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: ListOf[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def named(self, name: str) -> GivenForms:
        """The forms by the fields that say them."""
        whole = _ANY_OBJECT if self.json_object else None
        given: GivenForms = {
            f"{name}.json": ("json", self.json_),
            f"{name}.regex": ("regex", self.regex),
            f"{name}.choice": ("choice", self.choice),
            f"{name}.grammar": ("grammar", self.grammar),
            f"{name}.json_object": ("json", whole),
        }
        if all(value is None for _, value in given.values()):
            raise FormError(name, "it has no form; give json, regex, choice, grammar or json_object")
        return given


class AnswerFormat(StrictModel):
    """The fields that say the form of an answer; `guided_` is how vLLM called those of `structured_outputs` before."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: ListOf[str] | None = None
    guided_grammar: str | None = None

    def forms(self) -> GivenForms:
        """What the fields ask for, by their names."""
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
