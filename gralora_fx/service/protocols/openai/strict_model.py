"""Base model of JSON requests: strict in its fields, and cheap to refuse.

Fields of OpenAI's protocol without effect here are accepted, and named in a response header; the tables below list
them all. A field that would change the answer elsewhere and cannot here is in no table: it is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import new_class
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar

from fastapi import Response
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from gralora_fx.base.features import parts

Idle: TypeAlias = Mapping[str, tuple[Any, ...] | None]  # values without effect; None for any

# account, caller and storage: nothing is stored here, and all requests are served alike
EVERYWHERE: Idle = {
    "user": None,
    "metadata": None,
    "safety_identifier": None,
    "store": None,
    "service_tier": None,
    "prompt_cache_key": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
}
# fields of answers, with the values that request the default
TEXT_OPTIONS: Idle = {"verbosity": ("medium",)}  # others would change the answer's length
TEXT: Idle = {**EVERYWHERE, **TEXT_OPTIONS, "modalities": (["text"],), "best_of": (1,), "suffix": ("",)}
CHAT: Idle = {**TEXT, "reasoning_effort": None, "prediction": None}  # a guess of the answer, to speed it up
RESPONSE: Idle = {**EVERYWHERE, **TEXT_OPTIONS, "background": (False,), "truncation": ("disabled",)}
# of a model that reasons the effort changes the answer, and there it is refused
OF_REASONING = ("reasoning_effort", "reasoning.effort")

REASONING: Idle = {"effort": None, "summary": None, "generate_summary": None}
STREAM_OPTIONS: Idle = {"include_obfuscation": None}

# requested details of files, searches and reasoning, which no response here has
IdleInclude: TypeAlias = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
]

# parts of a history, as answers hold them and clients send them back
TEXT_PART: Idle = {"prompt_cache_breakpoint": None}
MESSAGE: Idle = {"annotations": ([],)}
INPUT_TEXT: Idle = {"annotations": ([],), "logprobs": None, **TEXT_PART}
INPUT_ITEM: Idle = {"id": None, "status": None, "phase": None}


_Item = TypeVar("_Item")
_Model = TypeVar("_Model", bound="StrictModel")

ListOf = Annotated[list[_Item], Field(fail_fast=True)]
IGNORED = "X-Ignored-Fields"


class StrictModel(BaseModel):
    """A request, or a part of one: known fields of exact types; null fields count as missing.

    A wrong request costs no more than a right one. Pydantic describes every wrong item of a list and every unknown
    field, which takes gigabytes for a body of some megabytes: so validation of lists stops at the first wrong item
    (`fail_fast`), and at most one unknown field is reported.

    Attributes:
        without_effect: Fields accepted without effect, some with certain values only.
        added: Fields that features add.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    without_effect: ClassVar[Idle] = {}
    added: ClassVar[frozenset[str]] = frozenset()
    _ignored: tuple[str, ...] = PrivateAttr(())
    _given: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, body: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Record the fields without effect, and drop all unknown fields but the first, which is then the error."""
        if not isinstance(body, dict):
            return handler(body)
        idle, known = cls.without_effect, {field.alias or name for name, field in cls.model_fields.items()}
        given = {name: value for name, value in body.items() if value is not None}
        ignored = tuple(name for name in idle if name in given and _is_among(given[name], idle[name]))
        fields = {name: value for name, value in given.items() if name in known or name not in ignored}
        for name in [name for name in fields if name not in known][1:]:
            del fields[name]
        made = handler(fields)
        made._given, made._ignored = tuple(fields), ignored
        return made

    @property
    def given(self) -> tuple[str, ...]:
        """The fields given, in order."""
        return self._given

    def ignored(self) -> Iterator[str]:
        """Yield the fields accepted without effect, nested ones too, such as `text.verbosity`."""
        yield from self._ignored
        for name in type(self).model_fields:
            if isinstance(value := getattr(self, name), StrictModel):
                yield from (f"{name}.{inner}" for inner in value.ignored())


def with_features(model: type[_Model]) -> type[_Model]:
    """Extend a request model by the fields that features add; a decorator."""
    added = [fields[model.__name__] for fields in parts("request fields") if model.__name__ in fields]
    if not added:
        return model
    idle = {name: values for kind in (model, *added) for name, values in kind.without_effect.items()}
    names = frozenset(name for kind in added for name in kind.model_fields)
    body = {"__doc__": model.__doc__, "__module__": model.__module__, "without_effect": idle, "added": names}
    made: type[_Model] = new_class(model.__name__, (*added, model), exec_body=lambda namespace: namespace.update(body))
    return made


def with_ignored(response: Response, asked: StrictModel) -> Response:
    """List the request's fields without effect in a response header."""
    if names := ", ".join(asked.ignored()):
        response.headers[IGNORED] = names
    return response


def wrong_field(field: str, kind: str, problem: str) -> ValidationError:
    """Return an error for a validator to raise about a field that is wrong in combination with others."""
    # braces in the problem would be parsed as a template
    error = PydanticCustomError(kind, "{problem}", {"problem": problem})
    return ValidationError.from_exception_data(field, [InitErrorDetails(type=error, loc=(field,), input=None)])


def _is_among(value: Any, values: tuple[Any, ...] | None) -> bool:
    """Return whether a value is one of some values, of the same type; any value if there are none."""
    return values is None or any(type(value) is type(other) and value == other for other in values)
