"""One-way flow: no module imports one of a later stage, and only one touches transformers.exporters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "collection",
    "errors",
    "stages",
    "progress",
    "sources",
    "model_files",
    "tasks",
    "export_options",
    "deferred",
    "atomic_save",
    "config",
    "adapter_tasks",
    "module_tree",
    "weight_views",
    "shared_memory",
    "subgraph_calls",
    "sites",
    "layer_forwards",
    "out_of_reach",
    "losses",
    "tracing",
    "adapter",
    "adapter_forms",
    "store",
    "overlay",
    "planning",
    "passes",
    "adapters",
    "reweighted",
    "queries",
    "switching",
    "peft_attributes",
    "picture",
    "checkpoint",
    "folded_adapters",
    "model_class",
    "model",
    "rewriting",
    "merging",
    "tokenizers",
    "load_report",
    "shards",
    "model_classes",
    "loading",
    "exporters",
    "serving",
    "demo",
    "cli",
]
FILES = sorted((ROOT / "gralora_fx").rglob("*.py")) + sorted((ROOT / "exporters").rglob("*.py"))


def stage(parts: list[str]) -> int | None:
    """Place of a module in the flow; None for the package itself and what comes after it."""
    name = parts[1] if len(parts) > 1 else ""
    return ORDER.index(name) if name in ORDER else None


def module_name(file: Path) -> list[str]:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = ["gralora_fx", *parts] if parts[0] == "exporters" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield node.module or ""
            if node.module == "gralora_fx":
                yield from (f"gralora_fx.{alias.name}" for alias in node.names)


IN_THE_FLOW = [file for file in FILES if stage(module_name(file)) is not None]


@pytest.mark.parametrize("file", IN_THE_FLOW, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_imports_a_later_one(file: Path) -> None:
    own = stage(module_name(file))
    assert own is not None
    for name in imported(file):
        other = stage(name.split(".")) if name.startswith("gralora_fx.") else None
        assert other is None or other <= own, f"{file.relative_to(ROOT)} imports {name}, which comes later"


def test_every_stage_exists() -> None:
    present = {name[1] for file in FILES if len(name := module_name(file)) > 1}
    later = {"exporters", "serving", "cli"}
    assert set(ORDER) - later <= present


def test_one_file_touches_the_experimental_exporters() -> None:
    found = [
        file.relative_to(ROOT).as_posix()
        for file in FILES
        if any(name.startswith("transformers.exporters") for name in imported(file))
    ]
    assert found == ["gralora_fx/tracing/transformers_export.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_imports_peft(file: Path) -> None:
    assert not [name for name in imported(file) if name.split(".")[0] == "peft"]
