"""Only `operators/` knows which argument of an operator stands where; others read and write them by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_files import FILES, ROOT, faults, nodes, parsed

OPERATORS = ROOT / "gralora_fx" / "core" / "operators"
CALLS = {
    part.name
    for file in OPERATORS.glob("*.py")
    for part in ast.walk(ast.parse(file.read_text()))
    if isinstance(part, ast.ClassDef) and any("operator(" in ast.unparse(mark) for mark in part.decorator_list)
}
_POSITIONAL = {"args", "update_arg", "insert_arg"}


def names_operators(node: ast.AST) -> bool:
    """Return whether some code holds `Attention.target`, or the like."""
    return any(
        isinstance(part, ast.Attribute)
        and part.attr == "target"
        and isinstance(part.value, ast.Name)
        and part.value.id in CALLS
        for part in ast.walk(node)
    )


def nodes_of_operators(function: ast.AST) -> Iterator[str]:
    """Variables of a function that hold nodes which call an operator, as the code itself says.

    Those of a loop over `Attention.all_in(graph)` or over `find_nodes(target=Attention.target)`, and those asked by
    `is_call(node, Attention.target)` or `node.target is Attention.target`.
    """
    for part in ast.walk(function):
        if isinstance(part, (ast.For, ast.comprehension)):
            source, target = part.iter, part.target
            is_all = any(isinstance(at, ast.Attribute) and at.attr == "all_in" for at in ast.walk(source))
            if is_all and isinstance(target, ast.Tuple):
                target = target.elts[0]
            if (is_all or names_operators(source)) and isinstance(target, ast.Name):
                yield target.id
        elif isinstance(part, ast.Call) and names_operators(part):
            yield from (argument.id for argument in part.args if isinstance(argument, ast.Name))
        elif isinstance(part, ast.Compare) and names_operators(part):
            yield from (name.value.id for name in ast.walk(part.left) if is_target(name))  # type: ignore[attr-defined]


def is_target(part: ast.AST) -> bool:
    return isinstance(part, ast.Attribute) and part.attr == "target" and isinstance(part.value, ast.Name)


def read_by_position(tree: ast.AST) -> list[str]:
    found = [
        f"line {part.lineno} names {ast.unparse(part)}"
        for part in ast.walk(tree)
        if isinstance(part, ast.Attribute) and part.attr in ("gralora", "gralora_shapes")
    ]
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            nodes = set(nodes_of_operators(function))
            found += [
                f"line {part.lineno} reads {ast.unparse(part)}"
                for part in ast.walk(function)
                if isinstance(part, ast.Attribute)
                and part.attr in _POSITIONAL
                and isinstance(part.value, ast.Name)
                and part.value.id in nodes
            ]
    return found


def test_no_other_file_reads_an_argument_by_its_position() -> None:
    others = (file for file in FILES if OPERATORS not in file.parents)
    assert faults(others, lambda file: read_by_position(parsed(file))) == {}


@pytest.mark.parametrize(
    "code",
    [
        "x = torch.ops.gralora.attention.default",
        "def f(graph):\n    for node, attention in Attention.all_in(graph):\n        node.update_arg(3, None)",
        "def f(graph):\n    for node in graph.find_nodes(target=Attention.target):\n        node.args[3]",
        "def f(node):\n    return node.args[3] if is_call(node, Rotate.target) else None",
        "def f(node):\n    if node.target is Attention.target:\n        (query, *rest) = node.args",
    ],
)
def test_positions_are_found(code: str) -> None:
    assert len(read_by_position(ast.parse(code))) == 1


def test_no_rule_knows_the_domain_of_the_operators_onnx_nodes() -> None:
    """They are read by the classes of `translation/operators.py`."""

    def domains(file: Path) -> list[int]:
        return [part.lineno for part in nodes(file) if isinstance(part, ast.Name) and part.id == "DOMAIN"]

    rules = [file for file in FILES if ROOT / "exporters" / "rules" in file.parents]
    assert rules
    assert faults(rules, domains) == {}
