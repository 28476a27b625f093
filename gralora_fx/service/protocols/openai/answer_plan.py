"""Constraints and parsing of a request's answers, apart from sampling: hooks for features."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from gralora_fx.run.generate.constraints import Constraint, Wanted
from gralora_fx.service.protocols.openai.strict_model import StrictModel

if TYPE_CHECKING:
    from gralora_fx.service.engines import TextEngine


def new_id(kind: str) -> str:
    """Return a new id with a prefix."""
    return f"{kind}_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class AnswerPart:
    """A piece of an answer's text, or of an item in it, such as a call."""

    text: str = ""  # text of the answer, or a continuation of the item's text
    item: int | None = None  # the index of the item; None for text of the answer
    name: str | None = None  # the name of the item, in its first piece
    id: str | None = None  # the id of the item, in its first piece


class AnswerReader(Protocol):
    """Parses one answer, in which items may stand beside text or replace it.

    Attributes:
        items: Number of items that have begun.
        text_field: The field of a response's item that holds its text.
        event: The name of the events of this field.
    """

    items: int
    text_field: str
    event: str

    @property
    def is_whole(self) -> bool:
        """Return whether every item that has begun is complete."""

    @property
    def finish_reason(self) -> str:
        """Finish reason of an answer that has items."""

    def step(self, text: str) -> list[AnswerPart]:
        """Parse more text."""

    def finish(self) -> list[AnswerPart]:
        """Return the text held back, once the answer has ended."""

    def in_chat(self, parts: Sequence[AnswerPart], *, streams: bool) -> dict[str, Any]:
        """Return the message or delta fields that describe parts of items."""

    def begun(self, part: AnswerPart) -> dict[str, Any] | None:
        """Return the response item that a part begins; None if it begins none."""


@dataclass(frozen=True)
class AnswerPlan:
    """Constraint and parser of answers."""

    constraint: Constraint | None = None  # constrains their tokens; None for no constraint
    shown: frozenset[int] = frozenset()  # special tokens kept in their text
    reader: Callable[[], AnswerReader] | None = None  # creates a parser of one answer; None for plain text


class PlannedRequest(StrictModel):
    """A request whose answers features may constrain and parse.

    Attributes:
        changing: Fields that may change the answers, in addition to those that features add.
    """

    changing: ClassVar[frozenset[str]] = frozenset()

    @property
    def attached(self) -> Sequence[tuple[str, str]]:
        """Return the field and the URL of each attachment of its prompt, in order."""
        return ()

    @property
    def is_plain(self) -> bool:
        """Return whether no field is given that may change the answers: plain text then."""
        return (self.added | self.changing).isdisjoint(self.given)

    def wanted(self) -> Wanted:
        """Return the format required of an answer's text, by the fields that say so."""
        return {}

    def plan(self, engine: TextEngine) -> AnswerPlan:
        """Plan the answers; this compiles constraints, which takes a while."""
        wanted = self.wanted()
        return AnswerPlan(engine.constraints.of(wanted) if wanted and engine.constraints is not None else None)

    def chats(
        self, chat: Sequence[Mapping[str, Any]], engine: TextEngine
    ) -> Iterable[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]]:
        """Return forms of a chat to try in order, until the tokenizer's template accepts one.

        Each is a pair of messages and of definitions that the template describes to the model.
        """
        return [(chat, ())]

    def echoed(self) -> Iterator[tuple[str, Any]]:
        """Return the request's fields that its response repeats."""
        yield from ()
