"""The form that an answer is to have: a JSON schema, a regular expression, some choices, or a grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from gralora_fx.errors import ServingError, shown
from gralora_fx.serving.json_schema import check_size, schema_text

FormKind: TypeAlias = Literal["json", "regex", "choice", "grammar", "calls"]
GivenForms: TypeAlias = Mapping[str, tuple[FormKind, Any]]  # by a name: the kind, and a value or None
_MOST_CHOICES = 1024
_MOST_RULES = 2000  # of a grammar: each rule within another takes stack while it is compiled


class FormError(ServingError):
    """The form of an answer cannot be followed."""

    def __init__(self, field: str | None, problem: str) -> None:
        """Say what is wrong.

        Args:
            field: The option or field that asks for the form; None if that is not known.
            problem: What is wrong with it.
        """
        super().__init__(problem if field is None else f"{field}: {problem}")
        self.field = field


class DeadEndError(FormError):
    """No token can go on with an answer in its form, or the form is too complex there."""


@dataclass(frozen=True)
class AnswerForm:
    """A form, checked as far as that needs no tokenizer.

    Attributes:
        kind: Of which kind it is.
        value: The schema as JSON text, the expression, the choices, or the grammar; of calls, llguidance's grammars.
        field: The option or field that asks for it; None if that is not known.
    """

    kind: FormKind
    value: str | tuple[str, ...]
    field: str | None = None

    @classmethod
    def of(cls, kind: FormKind, value: Any, field: str | None = None) -> AnswerForm:
        """A form of what a caller gives.

        Args:
            kind: Of which kind it is.
            value: A schema as an object or JSON text, a regular expression in the syntax of Rust's `regex` that the
                whole answer matches, a list of texts of which the answer is one, or a grammar in llguidance's variant
                of Lark or in GBNF.
            field: The option or field that asks for it.

        Raises:
            FormError: It is of another type, larger than 64 KiB, a schema that cannot be followed, or a grammar of more
                than 2000 rules.
        """
        try:
            return cls(kind, schema_text(value) if kind == "json" else _checked(kind, value), field)
        except ServingError as error:
            raise FormError(field, str(error)) from error


def _checked(kind: FormKind, value: Any) -> str | tuple[str, ...]:
    """An expression, choices or a grammar."""
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
    return tuple(texts) if kind == "choice" else str(texts[0])


def one_form(given: GivenForms) -> AnswerForm | None:
    """The one form among what may be given, by its name; None if there is none.

    Args:
        given: What may be given.

    Raises:
        FormError: There are several, or one is wrong.
    """
    forms = {name: pair for name, pair in given.items() if pair[1] is not None}
    if len(forms) > 1:
        first, second, *_ = forms
        raise FormError(second, f"an answer has one form, and {first} is given too; give one of them")
    return next((AnswerForm.of(kind, value, name) for name, (kind, value) in forms.items()), None)
