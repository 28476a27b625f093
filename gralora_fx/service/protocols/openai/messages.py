"""Chat messages and response input items, as OpenAI's clients send them."""

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
    """A text part of a message."""

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
        """Text content with its parts joined."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def said(self, history: History, field: str) -> Said:
        """Return the content in the form that chat templates take."""
        return self.text

    def add_to(self, history: History, field: str) -> None:
        """Append it to a chat; `field` names it in errors."""
        history.say(self.role, self.said(history, field), self.name)


class InputText(StrictModel):
    """A text part of an input message."""

    without_effect: ClassVar[Idle] = INPUT_TEXT

    type: Literal["input_text", "output_text"]
    text: str


class ItemFields(StrictModel):
    """A message, or a reference to an item; `needed` are the required fields by type."""

    without_effect: ClassVar[Idle] = INPUT_ITEM
    needed: ClassVar[Mapping[str, tuple[str, ...]]] = {"message": ("role", "content")}

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | ListOf[InputText] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ItemFields:
        if self.type == "item_reference":
            problem = (
                "it refers to an item of an earlier response, which was not stored; send the item itself, with store "
                "false"
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
        """Return the content in the form that chat templates take."""
        return joined(self.content)

    def add_to(self, history: History, field: str) -> None:
        """Append it to a chat; `field` names it in errors."""
        history.say(str(self.role), self.said(history, field))


class History:
    """A chat in the form that templates take; the role `developer` becomes `system`.

    Attributes:
        messages: The messages so far.
        names: Names by id, for later messages that refer to them.
        attached: The field and URL of each attachment, in order.
    """

    def __init__(self) -> None:
        """Start an empty chat."""
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}
        self.attached: list[tuple[str, str]] = []

    def say(self, role: str, said: Said, name: str | None = None) -> None:
        """Append a message."""
        message = {"role": "system" if role == "developer" else role, "content": said}
        self.messages.append(message if name is None else {**message, "name": name})


class OfChat(ABC):
    """A request that holds a chat."""

    @property
    @abstractmethod
    def history(self) -> History:
        """The request's chat."""

    @property
    def prompts(self) -> list[list[dict[str, Any]]]:
        """The chat, as the only prompt."""
        return [self.history.messages]

    @property
    def attached(self) -> Sequence[tuple[str, str]]:
        """The field and URL of each attachment of the chat, in order."""
        return self.history.attached


def history_of(messages: Sequence[MessageFields]) -> History:
    """Build a chat from messages."""
    history = History()
    for number, message in enumerate(messages):
        message.add_to(history, f"messages.{number}")
    return history


def with_text(said: Said, before: str = "", after: str = "") -> Said:
    """Return content with text before and after it."""
    if isinstance(said, str):
        return f"{before}{said}{after}"
    return [*_text_parts(before), *said, *_text_parts(after)]


def _text_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text else []


def joined(content: str | list[InputText] | None) -> str:
    """Return a message's text with its parts joined."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())
