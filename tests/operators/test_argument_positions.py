"""Only `operators/` knows which argument of an operator stands where; others read and write them by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
OPERATORS = ROOT / "gralora_fx" / "core" / "operators"
FILES = sorted(
    file
    for folder in (ROOT / "gralora_fx", ROOT / "exporters")
    for file in folder.rglob("*.py")
    if OPERATORS not in file.parents
)
CALLS = {
    part.name
    for file in OPERATORS.glob("*.py")
    for part in ast.walk(ast.parse(file.read_text()))
    if isinstance(part, ast.ClassDef) and any("operator(" in ast.unparse(mark) for mark in part.decorator_list)
}
_POSITIONAL = {"args", "update_arg", "insert_arg"}


def names_operators(node: ast.AST) -> bool:
    """Whether some code holds `Attention.target`, or the like."""
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


def faults(tree: ast.AST) -> list[str]:
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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_file_reads_an_argument_by_its_position(file: Path) -> None:
    assert faults(ast.parse(file.read_text())) == []


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
    assert len(faults(ast.parse(code))) == 1


@pytest.mark.parametrize("file", [file for file in FILES if "onnx_passes" in file.parts])
def test_no_pass_knows_the_domain_of_the_operators_onnx_nodes(file: Path) -> None:
    """They are read by the classes of `translation/operators.py`."""
    names = {part.id for part in ast.walk(ast.parse(file.read_text())) if isinstance(part, ast.Name)}
    assert "DOMAIN" not in names
