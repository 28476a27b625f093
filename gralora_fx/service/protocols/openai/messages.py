"""The messages of a chat, and the items of a response's input, as OpenAI's clients send them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import model_validator

from gralora_fx.service.protocols.openai.strict_model import (
    INPUT_ITEM,
    INPUT_TEXT,
    MESSAGE,
    TEXT_PART,
    Idle,
    ListOf,
    StrictModel,
    wrong_field,
)

Said: TypeAlias = str | list[dict[str, str]]  # the content of a message, as templates take it: a text, or parts


class TextPart(StrictModel):
    """A part of a message."""

    without_effect: ClassVar[Idle] = TEXT_PART

    type: Literal["text"]
    text: str


class MessageFields(StrictModel):
    """A message of a chat."""

    without_effect: ClassVar[Idle] = MESSAGE

    role: str
    content: str | ListOf[TextPart] | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> MessageFields:
        if self.content is None:
            raise wrong_field("content", "missing", "it is missing")
        return self

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def said(self, history: History, field: str) -> Said:
        """Return the content as templates take it."""
        return self.text

    def add_to(self, history: History, field: str) -> None:
        """Add it to a chat, as that field of the request."""
        history.say(self.role, self.said(history, field), self.name)


class InputText(StrictModel):
    """A part of a message."""

    without_effect: ClassVar[Idle] = INPUT_TEXT

    type: Literal["input_text", "output_text"]
    text: str


class ItemFields(StrictModel):
    """A message, or a reference to an item.

    Attributes:
        needed: The fields that an item of a type has, all of them.
    """

    without_effect: ClassVar[Idle] = INPUT_ITEM
    needed: ClassVar[Mapping[str, tuple[str, ...]]] = {"message": ("role", "content")}

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | ListOf[InputText] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ItemFields:
        if self.type == "item_reference":
            problem = (
                "it names an item of an earlier response, and none is kept; send the item itself, with store false"
            )
            raise wrong_field("type", "reference", problem)
        for name in dict.fromkeys(name for names in self.needed.values() for name in names):
            is_needed, is_given = name in self.needed[self.type], getattr(self, name) is not None
            if is_needed and not is_given:
                raise wrong_field(name, "missing", "it is missing")
            if is_given and not is_needed:
                raise wrong_field(name, "type", f"an item of the type {self.type} has none; leave it out")
        return self

    def said(self, history: History, field: str) -> Said:
        """Return the content as templates take it."""
        return joined(self.content)

    def add_to(self, history: History, field: str) -> None:
        """Add it to a chat, as that field of the request."""
        history.say(str(self.role), self.said(history, field))


class History:
    """A chat as templates take it, which know a developer as the system.

    Attributes:
        messages: What was said so far.
        names: What later messages refer to: names by ids.
        attached: What parts of messages stand for beside text, in their order: the field of each and its URL.
    """

    def __init__(self) -> None:
        """Begin a chat."""
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}
        self.attached: list[tuple[str, str]] = []

    def say(self, role: str, said: Said, name: str | None = None) -> None:
        """Add a message."""
        message = {"role": "system" if role == "developer" else role, "content": said}
        self.messages.append(message if name is None else {**message, "name": name})


class OfChat(ABC):
    """A request that is a chat."""

    @property
    @abstractmethod
    def history(self) -> History:
        """The chat."""

    @property
    def prompts(self) -> list[list[dict[str, Any]]]:
        """The chat, as tokenizers take it."""
        return [self.history.messages]

    @property
    def attached(self) -> Sequence[tuple[str, str]]:
        """The field and the URL of each attachment of the chat, in order."""
        return self.history.attached


def history_of(messages: Sequence[MessageFields]) -> History:
    """Messages as a chat."""
    history = History()
    for number, message in enumerate(messages):
        message.add_to(history, f"messages.{number}")
    return history


def with_text(said: Said, before: str = "", after: str = "") -> Said:
    """Content with text before or after what it says."""
    if isinstance(said, str):
        return f"{before}{said}{after}"
    return [*_text_parts(before), *said, *_text_parts(after)]


def _text_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text else []


def joined(content: str | list[InputText] | None) -> str:
    """The text of a message, its parts joined."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())
