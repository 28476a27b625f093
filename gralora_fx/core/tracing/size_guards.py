"""Guards on sizes that an export recorded, as conditions on the axes of its inputs."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import fx

import gralora_fx
from gralora_fx.base.compat.torch_graphs import size_guards, size_range
from gralora_fx.core.tracing.inputs.input_trees import placeholder_values
from gralora_fx.errors import TraceError
from gralora_fx.format.size_limits import OPERATORS, SizeLimit, Term, sizes_in

_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Div: "/", ast.Mod: "%"}
_RELATIONS = {ast.Eq: "==", ast.NotEq: "!=", ast.LtE: "<=", ast.Lt: "<", ast.GtE: ">=", ast.Gt: ">"}
_MIRRORED = {"==": "==", "!=": "!=", "<=": ">=", "<": ">", ">=": "<=", ">": "<"}
_TORCH, _OWN = Path(torch.__file__).parent, Path(gralora_fx.__file__).parent
_OPERATORS_CODE = (_OWN / "core" / "operators", _OWN / "core" / "tracing" / "decoder_operators.py", _OWN / "features")
_PYTHON_CODE = ("__init__.py", "_tensor.py")  # of torch, which decides by sizes as a model's own code does


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that an export recorded, and whether an operator set it, not the model's own code."""

    test: Term
    is_of_operator: bool


def guards_of(graph: fx.Graph) -> tuple[Guard, ...]:
    """Return the guards of a fresh export's graph that read sizes of inputs."""
    found: dict[Term, Guard] = {}
    for text, file in size_guards(graph):
        guard = Guard(_tidy(term_of(ast.parse(text, mode="eval").body)), _is_of_operator(file))
        if wrong := _unknown(guard.test):
            if guard.is_of_operator:  # which checks its arguments itself
                continue
            raise TraceError(f"the forward branches on a size by {wrong} ({text}); use arithmetic")
        if any(True for _ in sizes_in(guard.test)):
            found.setdefault(guard.test, guard)
    return tuple(found.values())


def varying_axes(graph: fx.Graph, inputs: Mapping[str, Any]) -> dict[tuple[str, int], Term]:
    """Return the axes of input tensors that may vary, each as a term over the export's symbols."""
    axes = {}
    for path, value in placeholder_values(graph, inputs):
        for axis, size in enumerate(value.shape):
            term = term_of(ast.parse(size_range(size)[0], mode="eval").body)
            if not isinstance(term, int):
                axes[path, axis] = term
    return axes


def recorded_limits(graph: fx.Graph, inputs: Mapping[str, Any], texts: Iterable[str]) -> tuple[SizeLimit, ...]:
    """Return the limits of a graph that was exported by others: its guards, its ranges and sizes that depend on others.

    `texts` are guards of a program that was read from a file, which has lost their places.
    """
    tests = [guard.test for guard in guards_of(graph) if not guard.is_of_operator]
    ranks: dict[str, int] = {}
    sizes: dict[Term, Term] = {}
    for path, value in placeholder_values(graph, inputs):
        ranks[path] = value.ndim
        for axis, size in enumerate(value.shape):
            text, least, most = size_range(size)
            term, own = term_of(ast.parse(text, mode="eval").body), ("size", path, axis)
            if isinstance(term, int):
                continue
            tests += [("<=", own, most)] if most is not None else []
            tests += [(">=", own, least)] if least is not None and least > 2 else []  # torch assumes 2
            tests += [("==", own, sizes[term])] if term in sizes else []
            tests += [("==", ("%", own, term[1]), 0)] if term[0] == "*" and isinstance(term[1], int) else []
            sizes.setdefault(term, own)
    tests += [_tidy(term_of(ast.parse(text, mode="eval").body)) for text in texts]
    read = [test for test in dict.fromkeys(tests) if {path for path, _ in sizes_in(test)} <= ranks.keys()]
    return tuple(SizeLimit.of(test, ranks) for test in read if not _unknown(test) and next(sizes_in(test), None))


def _is_of_operator(file: str) -> bool:
    place = Path(file)
    if not place.is_relative_to(_TORCH):
        return any(place.is_relative_to(code) for code in _OPERATORS_CODE)
    first = place.relative_to(_TORCH).parts[0]
    return first.startswith("_") and first not in _PYTHON_CODE


def term_of(node: ast.expr) -> Term:
    """Convert torch's text of a condition, where `L['x'].size()[1]` is a size, to a term."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return "size", node.id, 0
        case ast.Subscript(value=ast.Call(func=ast.Attribute(value=of, attr="size")), slice=ast.Constant(value=axis)):
            return "size", _path(of), axis
        case ast.Compare(left=left, ops=[relation], comparators=[right]):
            return _RELATIONS[type(relation)], term_of(left), term_of(right)
        case ast.BoolOp(op=op, values=values):
            return "and" if isinstance(op, ast.And) else "or", *map(term_of, values)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))) if 0 < power < 9:
            return reduce(lambda product, factor: ("*", product, factor), [term_of(left)] * power)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)], term_of(left), term_of(right)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number) | float(number))):
            return -number
        case ast.UnaryOp(op=op, operand=operand):
            return ("not", term_of(operand)) if isinstance(op, ast.Not) else ("*", -1, term_of(operand))
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args):
            return name, *map(term_of, args)
    return ast.unparse(node), None


def _unknown(term: Term) -> str | None:
    """Return the first operator of a term that limits do not have."""
    if not isinstance(term, tuple) or term[0] == "size":
        return None
    return str(term[0]) if term[0] not in OPERATORS else next(filter(None, map(_unknown, term[1:])), None)


def _tidy(test: Term) -> Term:
    """Return a comparison with its number alone on the right: `length >= 3` for `0 <= -3 + length`."""
    match test:
        case (str(relation), int(number), tuple(term)) if relation in _MIRRORED:
            return _tidy((_MIRRORED[relation], term, number))
        case (str(relation), ("+", int(shift), term), int(number)) if relation in _MIRRORED:
            return _tidy((relation, term, number - shift))
        case (str(relation), ("-", term, int(shift)), int(number)) if relation in _MIRRORED:
            return _tidy((relation, term, number + shift))
        case (str(relation), ("*", -1, term), int(number)) if relation in _MIRRORED:
            return _tidy((_MIRRORED[relation], term, -number))
    return test


def _path(node: ast.expr) -> str:
    """Return the path of an input: `opts.a.0` for `L['opts']['a'][0]`."""
    match node:
        case ast.Subscript(value=ast.Name(), slice=ast.Constant(value=name)):
            return str(name)
        case ast.Subscript(value=value, slice=ast.Constant(value=key)):
            return f"{_path(value)}.{key!s}"
        case ast.Attribute(value=value, attr=key):
            return f"{_path(value)}.{key}"
    return ast.unparse(node)
