"""Limits on sizes: conditions on the axes of inputs under which a graph computes what its model does."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# a condition or a term of one: a number, `("size", path, axis)`, or an operator and its terms
Term = Any

OPERATORS: dict[str, Callable[..., Any]] = (
    {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "/": operator.truediv}
    | {"%": operator.mod, "==": operator.eq, "!=": operator.ne, "<=": operator.le, "<": operator.lt}
    | {">=": operator.ge, ">": operator.gt, "or": lambda *terms: any(terms), "and": lambda *terms: all(terms)}
    | {"not": operator.not_, "min": min, "max": max, "abs": abs, "round": round, "int": int, "float": float}
    | {"trunc": math.trunc, "floor": math.floor, "ceil": math.ceil, "sqrt": math.sqrt}
)
_AXES = {2: ("batch", "length"), 3: ("batch", "length"), 4: ("batch", "channels", "height", "width")}
_PARITY = {("==", 0): "even", ("!=", 0): "odd", ("==", 1): "odd", ("!=", 1): "even"}
_DEEPEST = 40  # levels of terms in a condition


@dataclass(frozen=True)
class SizeLimit:
    """A condition on the sizes of inputs.

    Attributes:
        input: The path of the input whose size an error names first.
        axis: The axis of that size.
        condition: The condition in words: `length <= 16`, `even length`, `x length == y length`.
        test: The condition as a term, which `value_of` computes.
    """

    input: str
    axis: int
    condition: str
    test: Term

    def __post_init__(self) -> None:
        """Turn the lists of a file into tuples."""
        object.__setattr__(self, "test", _as_tuples(self.test))

    @classmethod
    def of(cls, test: Term, ranks: Mapping[str, int]) -> SizeLimit:
        """Return the limit of a condition on inputs with so many axes."""
        path, axis = next(sizes_in(test))
        return cls(path, axis, _words(test, ranks, is_named=len({path for path, _ in sizes_in(test)}) > 1), test)

    def __str__(self) -> str:
        """Return the condition, beside the input that it is on if it names none."""
        return (
            self.condition if len({path for path, _ in sizes_in(self.test)}) > 1 else f"{self.input} {self.condition}"
        )

    @property
    def is_valid(self) -> bool:
        """True if its test is a condition that an export writes."""
        return isinstance(self.test, tuple) and _is_term(self.test) and any(True for _ in sizes_in(self.test))

    def problem(self, shapes: Mapping[str, Sequence[int]]) -> str | None:
        """Return which size breaks the limit; None if none does, or a size that it reads is not given."""
        axes = dict.fromkeys(sizes_in(self.test))
        if any(axis >= len(shapes.get(path, ())) for path, axis in axes) or holds(self.test, shapes):
            return None
        given = {path: [f"{_axis(a, len(shapes[p]))} {shapes[p][a]}" for p, a in axes if p == path] for path, _ in axes}
        found = " and ".join(f"input {path!r} has {' and '.join(sizes)}" for path, sizes in given.items())
        return f"{found}, but the model takes {self.condition}"


def first_problem(limits: Iterable[SizeLimit], shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Return which size of inputs, given by path, breaks a limit; None if none does."""
    return next((problem for limit in limits if (problem := limit.problem(shapes)) is not None), None)


def holds(test: Term, shapes: Mapping[str, Any]) -> bool:
    """Return whether a condition holds for shapes by path; a division by zero breaks it."""
    try:
        return bool(value_of(test, shapes))
    except (ArithmeticError, ValueError):
        return False


def value_of(term: Term, shapes: Mapping[str, Any]) -> Any:
    """Return the value of a term for shapes by path."""
    if not isinstance(term, tuple):
        return term
    if term[0] == "size":
        return shapes[term[1]][term[2]]
    return OPERATORS[term[0]](*[value_of(part, shapes) for part in term[1:]])


def sizes_in(term: Term) -> Iterator[tuple[str, int]]:
    """Yield every size that a term reads, as path and axis."""
    if isinstance(term, tuple) and term[0] == "size":
        yield term[1], term[2]
    elif isinstance(term, tuple):
        for part in term[1:]:
            yield from sizes_in(part)


def _as_tuples(term: Any) -> Any:
    return tuple(map(_as_tuples, term)) if isinstance(term, (list, tuple)) else term


def _is_term(term: Any, level: int = 0) -> bool:
    if not isinstance(term, tuple):
        return type(term) in (int, float) and abs(term) < 2**63
    if len(term) < 2 or level > _DEEPEST:
        return False
    if term[0] == "size":
        return len(term) == 3 and isinstance(term[1], str) and type(term[2]) is int and 0 <= term[2] < 64
    return term[0] in OPERATORS and all(_is_term(part, level + 1) for part in term[1:])


def _axis(axis: int, rank: int) -> str:
    names = _AXES.get(rank, ("batch",))
    return names[axis] if axis < len(names) else f"axis {axis}"


def _words(term: Term, ranks: Mapping[str, int], *, is_named: bool) -> str:
    """Return a term in words; with the names of inputs if there are several."""
    if not isinstance(term, tuple):
        return str(term)
    name, *parts = term
    if name == "size":
        return (f"{parts[0]} " if is_named else "") + _axis(parts[1], ranks[parts[0]])
    if name in ("==", "!=") and isinstance(parts[0], tuple) and parts[0][0] == "%" and parts[0][2] == 2:
        if parity := _PARITY.get((name, parts[1])):
            return f"{parity} {_words(parts[0][1], ranks, is_named=is_named)}"
    texts = [_words(part, ranks, is_named=is_named) for part in parts]
    if len(texts) == 1 or name in ("min", "max"):
        return f"{name}({', '.join(texts)})"
    if name in ("or", "and"):
        return f" {name} ".join(texts)
    inner = [isinstance(part, tuple) and len(part) > 2 and part[0] not in ("size", "min", "max") for part in parts]
    if name in ("+", "-", "*", "//", "/", "%"):
        inner[0] = inner[0] and parts[0][0] != name  # from left to right
        texts = [f"({text})" if is_inner else text for text, is_inner in zip(texts, inner, strict=True)]
    return f" {name} ".join(texts)
