"""Forms of answers as grammars over a tokenizer's tokens, by llguidance: which tokens may come next in each row."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from gralora_fx.base.compat.packages import installation
from gralora_fx.errors import ServingError, first_line, marked, option
from gralora_fx.features.structured_outputs.answer_form import JSON_STYLE, AnswerForm, is_gbnf, one_form
from gralora_fx.features.structured_outputs.row_grammar import RowGrammar, problem_of
from gralora_fx.run.engine.limits import DecoderLimits
from gralora_fx.run.generate.constraints import Wanted
from gralora_fx.run.generate.request_errors import WrongFieldError

# a state takes 1 to 2 kB, and the units of work of a step about 10 ms in all, in which other threads wait
_LIMITS: Any = {
    "max_lexer_states": 20_000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "verbose_errors": False,
}
# virtual: rules within rules are compiled by recursion, which in a small stack ends the process
_STACK = 256 * 1024 * 1024
_stack_lock = threading.Lock()
_Result = TypeVar("_Result")


class Grammars:
    """Compiles forms for a tokenizer, each time anew, as a row may spoil what it was compiled to.

    Several threads may use it.

    Attributes:
        tokenizer: The tokenizer; None if there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, limits: DecoderLimits | None = None) -> None:
        """Begin without grammars."""
        self.tokenizer, self._limits = tokenizer, limits
        self._tokens: Any = None  # llguidance's form of the tokenizer
        self._lock = threading.Lock()

    @staticmethod
    def part(wanted: Wanted) -> AnswerForm | None:
        """Check the one form among what may be given; None if there is none."""
        return one_form(wanted)

    def of(self, wanted: Wanted) -> AnswerGrammar | None:
        """Compile the one form among what may be given; None if there is none."""
        found = one_form(wanted)
        return None if found is None else self.compiled(found)

    def compiled(self, form: AnswerForm) -> AnswerGrammar:
        """A form as a grammar."""
        return AnswerGrammar(self._read(form.field), form, None if self._limits is None else self._limits.vocabulary)

    def joined(self, rules: str, named: Mapping[str, AnswerForm], field: str) -> AnswerGrammar:
        """Compile rules in Lark in which `@name` stands for a form; an error is about the form that is wrong."""
        try:
            parts = [{**_own_rules(form), "name": name} for name, form in named.items()]
            whole = {"grammars": [{"name": "answer", "lark_grammar": rules}, *parts]}
            return self.compiled(AnswerForm("joined", json.dumps(whole), field))
        except ServingError:
            for form in named.values():
                self.compiled(form)
            raise

    def special_tokens(self, field: str | None = None) -> frozenset[int]:
        """Ids of the tokens that no text within a grammar has, and which a grammar can name; without end tokens.

        Args:
            field: The field whose error it is if the tokenizer cannot be read.
        """
        tokens = self._read(field)
        special = filter(tokens.is_special_token, range(tokens.vocab_size))
        return frozenset(special) - frozenset(tokens.eos_tokens)

    def _read(self, field: str | None) -> Any:
        """The tokenizer as llguidance takes it."""
        with self._lock:
            if self._tokens is None:
                try:
                    self._tokens = _read(self.tokenizer, frozenset() if self._limits is None else self._limits.ends)
                except ServingError as error:
                    raise WrongFieldError(field, marked(error)) from error
            return self._tokens


class AnswerGrammar:
    """A compiled form, from which each row of a request begins a state of its own.

    What one row finds out serves the others too, and if it is too complex for one, it is for all: for rows of one
    request alone.
    """

    def __init__(self, tokens: Any, form: AnswerForm, vocabulary: int | None = None) -> None:
        """Compile a form."""
        import llguidance

        limits = llguidance.LLParserLimits(**_LIMITS)
        self._start = _with_stack(
            lambda: llguidance.LLMatcher(tokens, _source(form), log_level=0, limits=limits)  # without Python's lock
        )
        if self._start.is_error():
            raise WrongFieldError(form.field, f"it cannot be compiled ({problem_of(self._start.get_error())})")
        self._field = form.field
        self._ends = frozenset(tokens.eos_tokens)
        self._vocabulary = tokens.vocab_size if vocabulary is None else min(vocabulary, tokens.vocab_size)
        if self.begin(frozenset(), 1).is_complete:
            raise WrongFieldError(form.field, "no token of the model can begin such an answer")

    def begin(self, ends: frozenset[int], most: int) -> RowGrammar:
        """The state of a row that has no token of its answer yet."""
        return RowGrammar(self._start.deep_copy(), self._ends, ends, most, self._vocabulary, self._field)


def _with_stack(work: Callable[[], _Result]) -> _Result:
    """What some work gives, in a thread with a large stack."""
    with ThreadPoolExecutor(1) as pool:
        with _stack_lock:  # the size is the process's
            before = threading.stack_size(_STACK)
            try:
                result = pool.submit(work)  # which starts the thread
            finally:
                threading.stack_size(before)
        return result.result()


def _read(tokenizer: PreTrainedTokenizerBase | None, ends: frozenset[int]) -> Any:
    """A tokenizer as llguidance takes it; large ones take about a second."""
    if tokenizer is None:
        raise ServingError(
            f"a grammar needs a tokenizer, and the export holds none; export with {option(tokenizer=...)}"
        )
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise ServingError(f"an answer in a form needs llguidance ({error}): {installation('serve')}") from error
    own = None  # the tokenizer's
    if tokenizer.eos_token_id is None:  # for which llguidance takes the token 0
        own = sorted(end for end in ends if end < len(tokenizer))
        if not own:
            raise ServingError(
                "a grammar needs an end token, and neither the model nor its tokenizer has one; set eos_token"
            )
    try:
        return from_tokenizer(tokenizer, eos_token=own)
    except Exception as error:  # errors of several types, by what the tokenizer has
        raise ServingError(
            f"no answer in a form can be written with this model's tokenizer, whose tokens are not bytes of text "
            f"({first_line(error)})"
        ) from error


def _own_rules(form: AnswerForm) -> dict[str, Any]:
    """A form as one of llguidance's grammars."""
    text = _source(form)
    if not text.startswith("{"):
        return {"lark_grammar": text}
    (own,) = json.loads(text)["grammars"]
    return dict(own)


def _source(form: AnswerForm) -> str:
    """A form as llguidance takes it."""
    import llguidance

    if form.kind == "joined":
        return str(form.value)
    text = json.dumps(form.value) if form.kind == "choice" else str(form.value)
    try:
        if form.kind == "json":
            return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_STYLE))
        kind = form.kind if form.kind != "grammar" else "gbnf" if is_gbnf(text) else "lark"
        return str(llguidance.grammar_from(kind, text))
    except ValueError as error:
        raise WrongFieldError(form.field, f"it cannot be compiled ({first_line(error)})") from error
