"""Functions that a trace takes for copies of each other."""

from __future__ import annotations

import itertools
from types import CellType, SimpleNamespace
from typing import Any

import pytest

from gralora_fx.base.patches import patched_here
from gralora_fx.core.tracing.known_code import same_code

pytestmark = pytest.mark.quick

PLAIN = "def f(x, mode='nearest', *, size=1):\n    return g(x, 0.0, 'nearest', size)\ndef g(*x):\n    return x, 1\n"


def defined(text: str, **names: Any) -> Any:
    scope: dict[str, Any] = dict(names)
    exec(text, scope)
    return scope["f"]


def test_copies_with_another_docstring_and_other_lines_are_the_same() -> None:
    copied = "\n\n" + PLAIN.replace("size=1):\n", "size=1):\n    'Documented.'\n")
    assert same_code(defined(PLAIN), defined(copied))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.0, 'nearest'", "0.0, 'bilinear'"),
        ("return x, 1", "return x, 2"),
        ("0.0", "-0.0"),
        ("size=1", "size=True"),
        ("size=1", "size=2"),
        ("mode='nearest'", "mode='bilinear'"),
        ("return x, ", "return len(x), "),
        ("*, size", "size"),
    ],
)
def test_another_constant_default_or_global_makes_another_function(old: str, new: str) -> None:
    assert not same_code(defined(PLAIN), defined(PLAIN.replace(old, new)))


def test_constants_of_equal_value_and_other_types_differ() -> None:
    values = ["1", "True", "1.0", "0.0", "-0.0", "'1'", "b'1'", "(1,)", "(True,)", "None"]
    functions = [defined(f"def f():\n    return {value}") for value in values]
    assert not [pair for pair in itertools.combinations(functions, 2) if same_code(*pair)]


def test_what_a_closure_or_a_decorator_holds_counts() -> None:
    def made(value: object) -> Any:
        return lambda: value

    assert same_code(made(3), made(3))
    assert not same_code(made(3), made(4))
    assert not same_code(made([]), made([1]))
    assert not same_code(made(made(1)), made(made(2)))
    assert not same_code(made(object()), made(object()))


def test_functions_that_call_themselves_and_empty_closures_are_compared() -> None:
    text = "def f(n):\n    return n and f(n - 1)"
    assert same_code(defined(text), defined(text))
    waiting = (lambda value: lambda: value)(1)
    empty = type(waiting)(waiting.__code__, {}, closure=(CellType(),))
    assert not same_code(waiting, empty)
    assert not same_code(waiting, 3)


def test_what_is_replaced_while_a_model_is_traced_counts_as_it_was() -> None:
    """Rows of the table are compared after others have been replaced, in functions that call these."""
    one, other = defined(PLAIN), defined(PLAIN)
    owner = SimpleNamespace(g=one.__globals__["g"])
    with patched_here(owner, "g", print), patched_here(owner, "g", repr):
        one.__globals__["g"] = owner.g
        assert same_code(one, other)
    one.__globals__["g"] = lambda *x: (x, 2)
    assert not same_code(one, other)
