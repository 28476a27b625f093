"""Benchmarks, which no other test runs, import what there is."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_names_that_a_benchmark_imports_exist(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and module.partition(".")[0] == "gralora_fx":
            for alias in node.names:
                if not hasattr(importlib.import_module(module), alias.name):
                    importlib.import_module(f"{module}.{alias.name}")  # which raises where there is no such file


def test_stages_whose_time_a_benchmark_takes_exist() -> None:
    from benchmarks.int4_export import STAGES

    assert [name for owner, name, _ in STAGES if not hasattr(owner, name)] == []
