"""Formats in which model families write tool calls, one table row each, and an incremental parser of answers."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from gralora_fx.core.loading.text_tokenizer import TextTokenizer
from gralora_fx.service.protocols.openai.answer_plan import AnswerPart, new_id

_NINE = string.ascii_letters + string.digits


@dataclass(frozen=True)
class CallFormat:
    """A format of calls: `start`, then for each call `head`, name, `middle`, arguments and `tail`, then `end`."""

    name: str
    marks: tuple[str, ...] = ()  # strings that a template of the family contains, all of them
    lacks: tuple[str, ...] = ()  # strings that such a template does not contain
    # the prefix of `start` with which a call begins within text; for a format without a mark of its own, the prefix of
    # the whole answer
    trigger: str = ""
    start: str = ""  # text before the first call
    head: str = '{"name": "'  # text before a name
    middle: str = '", "arguments": '  # text between the name and the arguments, a JSON object
    tail: str = "}"  # text after the arguments
    between: str | None = ", "  # text between two calls; None if an answer has one call
    end: str = ""  # text after the last call
    tag: str = ""  # an optional token before `start`
    short_ids: bool = False  # whether the template requires ids of nine letters and digits

    @property
    def begins_answer(self) -> bool:
        """Return whether calls have no mark of their own: an answer begins with calls, or has none."""
        return self.trigger.endswith('"name"')

    def fits(self, template: str) -> bool:
        """Return whether a chat template is of the family."""
        return all(mark in template for mark in self.marks) and not any(mark in template for mark in self.lacks)

    def new_id(self) -> str:
        """Return a new id for a call."""
        if self.short_ids:
            return "".join(secrets.choice(_NINE) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Format calls as the model would write them."""
        texts = [f"{self.head}{call['name']}{self.middle}{json.dumps(call['arguments'])}{self.tail}" for call in calls]
        return self.start + (self.between or "\n").join(texts) + self.end

    def special_tokens(self, tokenizer: TextTokenizer) -> dict[str, int]:
        """Return the tokenizer's added tokens that occur in the format, with their ids."""
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
        texts = (self.start, self.head, self.middle, self.tail, self.between or "", self.end, self.tag)
        return {token: index for token, index in added.items() if token and any(token in text for text in texts)}


def _deepseek(name: str) -> str:
    """Return a DeepSeek token, whose bars and gaps are letters of their own."""
    return "<\uff5c{}\uff5c>".format(name.replace(" ", "\u2581"))


_HERMES = CallFormat(
    "hermes",
    marks=("<tool_call>", "arguments"),
    lacks=("<function=", "<arg_key>"),  # Qwen's and GLM's forms without JSON
    trigger="<tool_call>",
    start="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    end="\n</tool_call>",
)
GENERAL = CallFormat("json", trigger='[{"name"', start="[", end="]")
FORMATS = (
    CallFormat(
        "mistral-args",
        marks=("[TOOL_CALLS]", "[ARGS]"),
        trigger="[TOOL_CALLS]",
        start="[TOOL_CALLS]",
        head="",
        middle="[ARGS]",
        tail="",
        between="[TOOL_CALLS]",
        short_ids=True,
    ),
    CallFormat("mistral", ("[TOOL_CALLS]",), trigger="[TOOL_CALLS]", start="[TOOL_CALLS][", end="]", short_ids=True),
    CallFormat("granite", ("<|tool_call|>",), trigger="<|tool_call|>", start="<|tool_call|>[", end="]"),
    CallFormat(
        "deepseek",
        marks=(_deepseek("tool calls begin"), _deepseek("tool sep")),
        lacks=("```json",),  # DeepSeek's earlier form
        trigger=_deepseek("tool calls begin"),
        start=_deepseek("tool calls begin") + _deepseek("tool call begin"),
        head="",
        middle=_deepseek("tool sep"),
        tail=_deepseek("tool call end"),
        between=_deepseek("tool call begin"),
        end=_deepseek("tool calls end"),
    ),
    _HERMES,
    CallFormat(
        "llama3",
        marks=("ipython", '"parameters"'),
        trigger='{"name"',
        middle='", "parameters": ',
        between=None,
        tag="<|python_tag|>",
    ),
)


class _At(Enum):
    """State of a reader."""

    BEGIN = auto()
    TEXT = auto()
    TEXT_ALONE = auto()
    HEAD = auto()
    NAME = auto()
    ARGUMENTS = auto()
    AFTER = auto()
    END = auto()


class CallReader:
    """Parses one answer with calls in a format.

    Text that may begin a call is held back until that is certain. A call cut off within its name is dropped; one cut
    off within its arguments keeps their beginning.
    """

    text_field, event, finish_reason = "arguments", "function_call_arguments", "tool_calls"

    def __init__(self, form: CallFormat) -> None:
        """Start an answer."""
        self._form = form
        self._at = _At.BEGIN if form.begins_answer else _At.TEXT
        self._held = ""
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self.items = 0

    @property
    def is_whole(self) -> bool:
        """Return whether every call that has begun is complete."""
        return self._at not in (_At.HEAD, _At.NAME, _At.ARGUMENTS)

    def step(self, text: str) -> list[AnswerPart]:
        """Parse more text."""
        self._held += text
        parts: list[AnswerPart] = []
        steps = {
            _At.BEGIN: self._begin,
            _At.TEXT: self._text,
            _At.TEXT_ALONE: lambda: AnswerPart(self._take(len(self._held))),
            _At.HEAD: self._head,
            _At.NAME: self._name,
            _At.ARGUMENTS: self._arguments,
            _At.AFTER: self._after,
            _At.END: self._drop,
        }
        before = None
        while self._held and (self._at, self._held) != before:
            before = self._at, self._held
            if (part := steps[self._at]()) is not None:
                parts.append(part)
        return parts

    def finish(self) -> list[AnswerPart]:
        """Return the text held back, once the answer has ended."""
        text, self._held = self._held, ""
        return [AnswerPart(text)] if text and self._at in (_At.BEGIN, _At.TEXT) else []

    def in_chat(self, parts: Sequence[AnswerPart], *, streams: bool) -> dict[str, Any]:
        """Return a message's calls, or a delta's additions to them."""
        calls: dict[int | None, dict[str, Any]] = {}
        for part in parts:
            call = calls.setdefault(part.item, {"index": part.item} if streams else {})
            if part.name is not None:
                call |= {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
            function = call.setdefault("function", {"arguments": ""})
            function["arguments"] += part.text
        return {"tool_calls": list(calls.values())}

    @staticmethod
    def begun(part: AnswerPart) -> dict[str, Any] | None:
        """Return the response item that a part begins; None if it begins none."""
        if part.name is None:
            return None
        return {"id": new_id("fc"), "type": "function_call", "call_id": part.id, "name": part.name, "arguments": ""}

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _begin(self) -> None:
        """Decide by an answer's first letters whether it is calls."""
        form = self._form
        if form.tag and self._held.startswith(form.tag):
            self._take(len(form.tag))
            self._at = _At.HEAD
        elif self._held.startswith(form.trigger):
            self._at = _At.HEAD
        elif not (form.trigger.startswith(self._held) or form.tag.startswith(self._held)):
            self._at = _At.TEXT_ALONE

    def _text(self) -> AnswerPart | None:
        trigger = self._form.trigger
        found = self._held.find(trigger)
        if found >= 0:
            self._at = _At.HEAD
        else:
            found = len(self._held) - _overlap(self._held, trigger)
        text = self._take(found)
        return AnswerPart(text) if text else None

    def _head(self) -> None:
        """Skip the text before a name."""
        form = self._form
        before = form.start if not self.items else form.tail + (form.between or "")
        self._pass(before + form.head, _At.NAME)

    def _name(self) -> AnswerPart | None:
        found = self._held.find(self._form.middle)
        if found < 0:
            return None
        name = self._take(found)
        self._take(len(self._form.middle))
        self._at = _At.ARGUMENTS
        self.items += 1
        return AnswerPart(item=self.items - 1, name=name, id=self._form.new_id())

    def _arguments(self) -> AnswerPart:
        """Read JSON until its outermost object ends."""
        end = len(self._held)
        for index, letter in enumerate(self._held):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped, self._in_string = letter == "\\", letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if not self._depth:
                    end, self._at = index + 1, _At.AFTER
                    break
        return AnswerPart(self._take(end), item=self.items - 1)

    def _after(self) -> None:
        """Decide whether another call follows."""
        form = self._form
        ahead = form.tail + (form.between or "") + form.head
        if form.between is not None and self._held.startswith(ahead):
            self._at = _At.HEAD
        elif form.between is None or not ahead.startswith(self._held):
            self._at = _At.END

    def _drop(self) -> None:
        self._held = ""

    def _pass(self, text: str, then: _At) -> None:
        """Skip expected text once all of it is there."""
        if len(self._held) >= len(text):
            self._take(len(text))
            self._at = then


def _overlap(text: str, start: str) -> int:
    """Return the length of the longest suffix of a text that is a prefix of another."""
    return next((size for size in range(min(len(start) - 1, len(text)), 0, -1) if text.endswith(start[:size])), 0)
