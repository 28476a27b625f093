"""What every request as JSON is: strict in its fields, and cheap to refuse.

Fields of OpenAI's protocol that change no answer here are accepted, and named in a header; this has the one list of
them. A field that would change the answer elsewhere and cannot here is on none of these tables: it is refused by name.
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

Idle: TypeAlias = Mapping[str, tuple[Any, ...] | None]  # the values that change nothing; None for any

# about the account, who asks, and what is kept: nothing is kept here, all requests are served alike
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
# of answers: values that ask for what is done anyway
TEXT: Idle = {**EVERYWHERE, "modalities": (["text"],), "best_of": (1,), "suffix": ("",)}
CHAT: Idle = {
    **TEXT,
    "prediction": None,  # a guess of the answer, which makes it faster
    "reasoning_effort": None,
    "verbosity": ("medium",),
}
RESPONSE: Idle = {**EVERYWHERE, "background": (False,), "truncation": ("disabled",)}
# of a model that reasons the effort changes the answer, and there it is refused
OF_REASONING = ("reasoning_effort", "reasoning.effort")

REASONING: Idle = {"effort": None, "summary": None, "generate_summary": None}
TEXT_OPTIONS: Idle = {"verbosity": ("medium",)}  # another would be a shorter or longer answer
STREAM_OPTIONS: Idle = {"include_obfuscation": None}

# what a response is asked to hold of files, searches and reasoning, which no request here has
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
    """A request, or a part of one: fields are known and of their own types, and a field that is null counts as missing.

    A wrong request costs no more than a right one. Pydantic describes every wrong item of a list and every unknown
    field, which for a body of some megabytes are gigabytes: so lists of requests end at their first wrong item
    (`fail_fast`), and of unknown fields one is looked at.

    Attributes:
        without_effect: Fields that are accepted although they change no answer; of some only these values.
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
        """Note the fields without effect, and leave out all unknown fields but the first, which is the error."""
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
        """The fields that are given, in their order."""
        return self._given

    def ignored(self) -> Iterator[str]:
        """The fields that are accepted and have no effect, those of options too, as `text.verbosity`."""
        yield from self._ignored
        for name in type(self).model_fields:
            if isinstance(value := getattr(self, name), StrictModel):
                yield from (f"{name}.{inner}" for inner in value.ignored())


def with_features(model: type[_Model]) -> type[_Model]:
    """Return a model of requests with the fields that features add to it; a decorator."""
    added = [fields[model.__name__] for fields in parts("request fields") if model.__name__ in fields]
    if not added:
        return model
    idle = {name: values for kind in (model, *added) for name, values in kind.without_effect.items()}
    names = frozenset(name for kind in added for name in kind.model_fields)
    body = {"__doc__": model.__doc__, "__module__": model.__module__, "without_effect": idle, "added": names}
    made: type[_Model] = new_class(model.__name__, (*added, model), exec_body=lambda namespace: namespace.update(body))
    return made


def with_ignored(response: Response, asked: StrictModel) -> Response:
    """Name the fields of a request that have no effect in a header of its answer."""
    if names := ", ".join(asked.ignored()):
        response.headers[IGNORED] = names
    return response


def wrong_field(field: str, kind: str, problem: str) -> ValidationError:
    """An error of a field that is wrong beside others, for a validator to raise."""
    # in braces a problem would be taken for a template
    error = PydanticCustomError(kind, "{problem}", {"problem": problem})
    return ValidationError.from_exception_data(field, [InitErrorDetails(type=error, loc=(field,), input=None)])


def _is_among(value: Any, values: tuple[Any, ...] | None) -> bool:
    """Whether a field has one of some values, of the same type; None for any."""
    return values is None or any(type(value) is type(other) and value == other for other in values)
