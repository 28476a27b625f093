"""Forms compiled by llguidance to grammars over a tokenizer's tokens: which tokens may come next in each row."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.compat.packages import installation
from gralora_fx.core.loading.text_tokenizer import TextTokenizer
from gralora_fx.errors import ServingError, first_line, marked, option
from gralora_fx.features.structured_outputs.answer_form import JSON_STYLE, AnswerForm, is_gbnf, one_form
from gralora_fx.run.engine.limits import DecoderLimits
from gralora_fx.run.generate.constraints import Wanted
from gralora_fx.run.generate.request_errors import DeadEndError, WrongFieldError

_foreseeing = ThreadPoolExecutor(1, "gralora-fx masks")  # one thread, since the model's step needs the other cores


class RowGrammar:
    """Constrains the tokens of one answer.

    An end token is allowed only where the answer is complete; an answer that nothing can follow ends without one. An
    end token that is also text, such as a brace, is allowed wherever the grammar allows it.

    The mask of allowed tokens is computed on demand, since testing a single token costs a hundredth of it; `foresee`
    computes it in another thread while the model's step runs.

    Attributes:
        forced: Next tokens that the grammar alone determines; none of them needs to be chosen.
    """

    def __init__(
        self,
        matcher: Any,
        own_ends: frozenset[int],
        ends: frozenset[int],
        most: int,
        vocabulary: int,
        field: str | None = None,
    ) -> None:
        """Start an answer; see `AnswerGrammar.begin`."""
        self._vocabulary, self._field = vocabulary, field
        self._matcher, self._own_ends, self._ends, self._left = matcher, own_ends, ends, most
        self.forced: deque[int] = deque()
        self._allowed: NDArray[np.bool_] | None = None
        self._foreseen: Future[NDArray[np.bool_]] | None = None
        self._last: int | None = None  # the last token taken
        self._goes_on = True
        self._advance()

    @property
    def is_complete(self) -> bool:
        """Return whether the answer is over: it meets the grammar, and nothing can follow it."""
        return not self.forced and not self._goes_on

    def foresee(self) -> None:
        """Compute the mask of next tokens in another thread; later calls wait for it."""
        if self._allowed is None and self._foreseen is None and self._goes_on and self._left > 0:
            self._foreseen = _foreseeing.submit(self._find_allowed)

    def permits(self, token: int) -> bool:
        """Return whether a token may come next."""
        self._settle()
        if self._allowed is not None:
            return token < self._vocabulary and bool(self._allowed[token])
        if token in self._ends and self._matcher.is_accepting():
            return True
        return token < self._vocabulary and token not in self._own_ends and self._matcher.validate_tokens([token]) == 1

    def allowed(self, size: int) -> NDArray[np.bool_]:
        """Return a mask of the tokens that may come next, `[size]`."""
        self._settle()
        if self._allowed is None:
            self._allowed = self._find_allowed()
        allowed = self._allowed[:size]
        return allowed if len(allowed) == size else np.pad(allowed, (0, size - len(allowed)))

    def prefix(self, tokens: Sequence[int]) -> int:
        """Return how many of the given tokens the grammar accepts in sequence."""
        self._settle()
        return int(self._matcher.validate_tokens(list(tokens[: self._left]))) if self._goes_on else 0

    def take(self, token: int) -> None:
        """Advance past a token chosen among the allowed ones."""
        self._settle()
        self._left -= 1
        if token in self._ends:
            return
        self._matcher.consume_token(token)
        self._last = token
        self._advance()

    def _advance(self) -> None:
        """Compute the forced tokens, and whether others may follow them."""
        matcher, self._allowed = self._matcher, None
        forced = list(takewhile(self._is_taken, matcher.compute_ff_tokens()[: self._left]))
        forced = forced[: matcher.validate_tokens(forced)]  # a tokenizer may lack bytes of the forced text
        if forced:
            matcher.consume_tokens(forced)
            self.forced.extend(forced)
            self._left -= len(forced)
        self._goes_on = not matcher.is_stopped()
        self._check()
        if self._goes_on and self._left > 0 and not self._surely_goes_on():
            self._allowed = self._find_allowed()

    def _surely_goes_on(self) -> bool:
        """Return whether cheap tests show that the answer continues; a dead end then shows when a token is chosen."""
        if self._last is None:
            return False
        return not self._matcher.is_accepting() or self._matcher.validate_tokens([self._last]) == 1

    def _settle(self) -> None:
        """Wait for the other thread; an error is left for `allowed` to raise, where callers expect it."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen.exception() is None:
            self._allowed = foreseen.result()

    def _is_taken(self, token: int) -> bool:
        """Return whether a forced token is taken without a choice: it is in the vocabulary and no end token."""
        return token not in self._ends and token < self._vocabulary

    def _find_allowed(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed: NDArray[np.bool_] = np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_)
        allowed[[end for end in self._own_ends if end < len(allowed)]] = False
        self._goes_on = bool(allowed.any())
        self._check()
        if self._matcher.is_accepting():
            allowed[[end for end in self._ends if end < len(allowed)]] = True
        return allowed

    def _check(self) -> None:
        """Raise unless the answer is complete or something can follow."""
        if self._matcher.is_error() or not (self._goes_on or self._matcher.is_accepting()):
            reason = problem_of(self._matcher.get_error()) or "the model has no token for what comes next"
            raise DeadEndError(self._field, f"no token continues the answer's grammar ({reason})")


def problem_of(message: str) -> str:
    """Describe an llguidance error in one line."""
    if message.startswith("NoExtension"):
        return ""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines()]
    return " ".join(filter(None, lines))[:300]


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
    """Compiles forms for a tokenizer, again for each call, since a row may exhaust a form's limits; thread-safe."""

    def __init__(self, tokenizer: TextTokenizer | None, limits: DecoderLimits | None = None) -> None:
        """Start without a tokenizer loaded into llguidance."""
        self.tokenizer, self._limits = tokenizer, limits
        self._tokens: Any = None  # llguidance's form of the tokenizer
        self._lock = threading.Lock()

    @staticmethod
    def part(wanted: Wanted) -> AnswerForm | None:
        """Check the only form given; None if there is none."""
        return one_form(wanted)

    def of(self, wanted: Wanted) -> AnswerGrammar | None:
        """Compile the only form given; None if there is none."""
        found = one_form(wanted)
        return None if found is None else self.compiled(found)

    def compiled(self, form: AnswerForm) -> AnswerGrammar:
        """Compile a form."""
        return AnswerGrammar(self._read(form.field), form, None if self._limits is None else self._limits.vocabulary)

    def joined(self, rules: str, named: Mapping[str, AnswerForm], field: str) -> AnswerGrammar:
        """Compile Lark rules in which `@name` stands for a form; errors name the field of the invalid form."""
        try:
            parts = [{**_own_rules(form), "name": name} for name, form in named.items()]
            whole = {"grammars": [{"name": "answer", "lark_grammar": rules}, *parts]}
            return self.compiled(AnswerForm("joined", json.dumps(whole), field))
        except ServingError:
            for form in named.values():
                self.compiled(form)
            raise

    def special_tokens(self, field: str | None = None) -> frozenset[int]:
        """Return ids of special tokens, except end tokens; a grammar can name them, but no text contains them."""
        tokens = self._read(field)
        special = filter(tokens.is_special_token, range(tokens.vocab_size))
        return frozenset(special) - frozenset(tokens.eos_tokens)

    def _read(self, field: str | None) -> Any:
        """Return the tokenizer in llguidance's form, read once."""
        with self._lock:
            if self._tokens is None:
                try:
                    self._tokens = _read(self.tokenizer, frozenset() if self._limits is None else self._limits.ends)
                except ServingError as error:
                    raise WrongFieldError(field, marked(error)) from error
            return self._tokens


class AnswerGrammar:
    """A compiled form, from which each row of a request starts its own state.

    Rows share its caches, and if it is too complex for one row it is for all: so only rows of one request share it.
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
        """Return the state of a row whose answer is empty."""
        return RowGrammar(self._start.deep_copy(), self._ends, ends, most, self._vocabulary, self._field)


def _with_stack(work: Callable[[], _Result]) -> _Result:
    """Call a function in a thread with a large stack, and return its result."""
    with ThreadPoolExecutor(1) as pool:
        with _stack_lock:  # the stack size is process-wide
            before = threading.stack_size(_STACK)
            try:
                result = pool.submit(work)  # which starts the thread
            finally:
                threading.stack_size(before)
        return result.result()


def _read(tokenizer: TextTokenizer | None, ends: frozenset[int]) -> Any:
    """Convert a tokenizer for llguidance; large ones take about a second."""
    if tokenizer is None:
        raise ServingError(
            f"a grammar needs a tokenizer, and the export holds none; export with {option(tokenizer=...)}"
        )
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise ServingError(f"an answer in a form needs llguidance ({error}): {installation('serve')}") from error
    own: int | list[int] | None = tokenizer.eos_token_id
    if own is None:  # llguidance would use token 0
        own = sorted(end for end in ends if end < len(tokenizer))
        if not own:
            raise ServingError(
                "a grammar needs an end token, and neither the model nor its tokenizer has one; set eos_token"
            )
    try:
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        return LLTokenizer(backend.to_str(), eos_token=own)
    except Exception as error:  # errors of several types, by what the tokenizer has
        raise ServingError(
            f"this model's tokenizer does not support structured outputs: its tokens are not bytes of text "
            f"({first_line(error)})"
        ) from error


def _own_rules(form: AnswerForm) -> dict[str, Any]:
    """Return a form as the object of one llguidance grammar."""
    text = _source(form)
    if not text.startswith("{"):
        return {"lark_grammar": text}
    (own,) = json.loads(text)["grammars"]
    return dict(own)


def _source(form: AnswerForm) -> str:
    """Return a form as llguidance's grammar text."""
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
