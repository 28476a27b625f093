"""What a request for text asks of its answers, beside how tokens are chosen: hooks that features fill."""

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
    """Make an id of a kind of objects."""
    return f"{kind}_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class AnswerPart:
    """Some text of an answer, or of an item in it."""

    text: str = ""  # text of the answer, or what the item's text goes on with
    item: int | None = None  # the number of the item; None for text of the answer
    name: str | None = None  # the name of the item, where it begins
    id: str | None = None  # its id, likewise


class AnswerReader(Protocol):
    """Reads one answer, in which items may stand beside text or instead of it.

    Attributes:
        items: How many items have begun.
        text_field: The field of an item of a response that its text is.
        event: What the events of this field are called.
    """

    items: int
    text_field: str
    event: str

    @property
    def is_whole(self) -> bool:
        """Return whether all items that have begun are complete."""

    @property
    def finish_reason(self) -> str:
        """Why an answer that has items ends a turn."""

    def step(self, text: str) -> list[AnswerPart]:
        """Read text."""

    def finish(self) -> list[AnswerPart]:
        """Return the text that was held back, once the answer has ended."""

    def in_chat(self, parts: Sequence[AnswerPart], *, streams: bool) -> dict[str, Any]:
        """Return the fields by which parts of items are told in a message, or in a piece of one."""

    def begun(self, part: AnswerPart) -> dict[str, Any] | None:
        """Return the item of a response that begins with a part; None if none does."""


@dataclass(frozen=True)
class AnswerPlan:
    """How answers are constrained and read."""

    constraint: Constraint | None = None  # what their tokens may be; None for any
    shown: frozenset[int] = frozenset()  # special tokens that are part of their text
    reader: Callable[[], AnswerReader] | None = None  # makes what reads an answer; None for text alone


class PlannedRequest(StrictModel):
    """What features may change about the answers to a request.

    Attributes:
        changing: Fields beside those that features add which may change its answers.
    """

    changing: ClassVar[frozenset[str]] = frozenset()

    @property
    def attached(self) -> Sequence[tuple[str, str]]:
        """Return the field and the URL of each attachment of its prompt, in order."""
        return ()

    @property
    def is_plain(self) -> bool:
        """Return whether no field is given that may change its answers, which then may be any text."""
        return (self.added | self.changing).isdisjoint(self.given)

    def wanted(self) -> Wanted:
        """Return what the text of an answer has to be, by the fields that say so."""
        return {}

    def plan(self, engine: TextEngine) -> AnswerPlan:
        """Plan the answers; constraints are compiled, which takes a while."""
        wanted = self.wanted()
        return AnswerPlan(engine.constraints.of(wanted) if wanted and engine.constraints is not None else None)

    def chats(
        self, chat: Sequence[Mapping[str, Any]], engine: TextEngine
    ) -> Iterable[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]]:
        """Return forms of a chat, the first of which that the tokenizer's template takes is used.

        Returns:
            Pairs of messages and what the template is to describe to the model.
        """
        return [(chat, ())]

    def echoed(self) -> Iterator[tuple[str, Any]]:
        """Return the fields of the request that its response has again."""
        yield from ()
