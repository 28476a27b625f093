"""How model families write calls of tools in an answer: a table with an entry for each family."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_NINE = string.ascii_letters + string.digits


@dataclass(frozen=True)
class CallFormat:
    """The form of calls: `start`, then of each call `head`, name, `middle`, arguments and `tail`, and at last `end`.

    Attributes:
        name: What the form is called.
        marks: What a template of the family holds, all of it.
        lacks: What such a template does not hold.
        trigger: The beginning of `start` with which a call begins within a text; of a form that has no mark of its
            own, what the whole answer then begins with.
        start: What is before the first call.
        head: What is before a name.
        middle: What is between the name and the arguments, a JSON object.
        tail: What is behind the arguments.
        between: What is between two calls; None if an answer has one.
        end: What is behind the last call.
        tag: A token that a model may write before `start`, and need not.
        short_ids: Whether the template wants ids of nine letters and digits.
    """

    name: str
    marks: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    trigger: str = ""
    start: str = ""
    head: str = '{"name": "'
    middle: str = '", "arguments": '
    tail: str = "}"
    between: str | None = ", "
    end: str = ""
    tag: str = ""
    short_ids: bool = False

    @property
    def begins_answer(self) -> bool:
        """Whether calls have no mark of their own: an answer is calls from its first letter, or has none."""
        return self.trigger.endswith('"name"')

    def fits(self, template: str) -> bool:
        """Whether a template of chats is of the family."""
        return all(mark in template for mark in self.marks) and not any(mark in template for mark in self.lacks)

    def new_id(self) -> str:
        """An id for a call."""
        if self.short_ids:
            return "".join(secrets.choice(_NINE) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls as an answer has them."""
        texts = [f"{self.head}{call['name']}{self.middle}{json.dumps(call['arguments'])}{self.tail}" for call in calls]
        return self.start + (self.between or "\n").join(texts) + self.end

    def special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        """The added tokens of a tokenizer that are part of the form, with their ids."""
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
        texts = (self.start, self.head, self.middle, self.tail, self.between or "", self.end, self.tag)
        return {token: index for token, index in added.items() if token and any(token in text for text in texts)}


def _deepseek(name: str) -> str:
    """A token of DeepSeek, whose bars and gaps are letters of their own."""
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
