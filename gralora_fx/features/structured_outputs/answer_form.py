"""The required form of an answer: a JSON schema, a regular expression, choices, or a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from gralora_fx.errors import ServingError, marked, shown
from gralora_fx.features.structured_outputs.json_schema import check_size, portable, schema_text
from gralora_fx.run.generate.constraints import Wanted
from gralora_fx.run.generate.request_errors import WrongFieldError

FormKind: TypeAlias = Literal["json", "regex", "choice", "grammar", "joined"]
# as json.dumps writes it, so that much of an answer is forced, and no row writes white space for ever; without \\uXXXX,
# which could write the name of a member a second time
JSON_STYLE: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}
_MOST_CHOICES = 1024
_GBNF = re.compile(r"^\s*[^\s:]+\s*::=", re.MULTILINE)
# pieces of a Lark grammar: strings and comments, which are kept as they are; expressions; beginnings of schemas
_PIECE = re.compile(
    r"""(?s:"(?:\\.|[^"\\])*"|(?P<expression>/(?!/)(?:\\.|[^/\\])+/))|(?://|#)[^\n]*|(?P<schema>%json\s*)|(?P<idle>temperature\s*=)"""
)
_MOST_RULES = 2000  # each nested rule takes stack during compilation


@dataclass(frozen=True)
class AnswerForm:
    """A form, checked as far as possible without a tokenizer."""

    kind: FormKind  # its kind
    # the schema as JSON text, the expression, the choices, or the grammar; for rules that name others, llguidance's
    # grammars
    value: str | tuple[str, ...]
    field: str | None = None  # the option or request field that set it; None if unknown

    @property
    def size(self) -> int:
        """Number of characters in its description."""
        return len(self.value) if isinstance(self.value, str) else sum(map(len, self.value))

    @classmethod
    def of(cls, kind: FormKind, value: Any, field: str | None = None) -> AnswerForm:
        """Check a caller's value and wrap it as a form."""
        try:
            return cls(kind, schema_text(value) if kind == "json" else _checked(kind, value), field)
        except ServingError as error:
            raise WrongFieldError(field, marked(error)) from error


def _checked(kind: FormKind, value: Any) -> str | tuple[str, ...]:
    """Check an expression, choices or a grammar."""
    texts = value if kind == "choice" else [value]
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
        raise ServingError(f"{'a list of texts' if kind == 'choice' else 'a text'} is needed, but got {shown(value)}")
    if not 0 < len(texts) <= _MOST_CHOICES:
        raise ServingError(f"there are {len(texts)} choices; give 1 to {_MOST_CHOICES}")
    check_size("".join(texts))
    if kind == "grammar" and sum(":" in line for line in texts[0].splitlines()) > _MOST_RULES:
        raise ServingError(f"it has more than {_MOST_RULES} rules; ask for a simpler answer")
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise ServingError("it has a lone surrogate, which no text has")
    if kind == "choice":
        return tuple(texts)
    if kind == "regex":
        return portable(texts[0])
    return str(texts[0]) if is_gbnf(texts[0]) else with_checked_parts(texts[0])


def is_gbnf(grammar: str) -> bool:
    """Return whether a grammar is GBNF, whose rules use `::=`; otherwise it is Lark."""
    return _GBNF.search(grammar) is not None


def with_checked_parts(grammar: str) -> str:
    r"""Normalise and check the regular expressions and JSON schemas inside a Lark grammar.

    Before:  `start: /\d/ %json {"type": "string", "format": "path"}`
    After:   `start: /[0-9]/ %json {"x-guidance": {"whitespace_flexible": false, ...}, "type": "string"}`
    """
    if grammar.lstrip().startswith("{"):  # llguidance's own form, in which schemas would not be checked
        raise ServingError("it is JSON; give rules in Lark or GBNF")
    kept, begin, at = list[str](), 0, 0
    while (piece := _PIECE.search(grammar, at)) is not None:
        at = piece.end()
        if piece["idle"]:
            raise ServingError("a rule's temperature is not supported; give that of the whole answer")
        if expression := piece["expression"]:
            kept += [grammar[begin : piece.start()], portable(expression)]
            begin = at
        if piece["schema"]:
            try:
                schema, end = json.JSONDecoder().raw_decode(grammar, at)
            except (ValueError, RecursionError) as error:
                raise ServingError(f"the schema after %json is not JSON ({error})") from error
            own = schema.pop("x-guidance", {}) if isinstance(schema, dict) else {}
            checked = json.loads(schema_text(schema))
            if isinstance(own, dict):  # else the compiler refuses it
                own = {**JSON_STYLE, **own}
            kept += [grammar[begin:at], json.dumps({"x-guidance": own, **checked})]
            begin = at = end
    return "".join([*kept, grammar[begin:]])


def one_form(given: Wanted) -> AnswerForm | None:
    """Return the only form given, checked; None if there is none. Raise if there are several."""
    forms = {name: pair for name, pair in given.items() if pair[1] is not None}
    if len(forms) > 1:
        first, second, *_ = forms
        raise WrongFieldError(second, f"an answer has one form, and {first} is given too; give one of them")
    return next((AnswerForm.of(kind, value, name) for name, (kind, value) in forms.items()), None)
