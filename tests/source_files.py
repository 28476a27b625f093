"""The files of the source, each parsed once: tests of rules read all of them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted({file.resolve() for folder in ("gralora_fx", "exporters") for file in (ROOT / folder).rglob("*.py")})


@cache
def parsed(file: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file."""
    return tuple(ast.walk(parsed(file)))


def module_name(file: Path) -> str:
    """Return a module's name without the package's; empty for the package itself."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "exporters" else parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(file): file for file in FILES}


def faults(files: Iterable[Path], find: Callable[[Path], Iterable[object]]) -> dict[str, list[object]]:
    """Apply a rule; return the faults that it finds, by module."""
    found = {module_name(file): list(find(file)) for file in files}
    return {name: faulty for name, faulty in found.items() if faulty}
