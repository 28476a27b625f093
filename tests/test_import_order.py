"""One-way flow: no module imports one of a later stage, inside `exporters/` too, and no modules import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
# folders, and single files if a folder's own files are on both sides of its subfolders; the longest match counts
ORDER = [
    "errors",
    "compat",
    "progress",
    "sources",
    "config",
    "graph",
    "methods",
    "operators",
    "tracing.failures",
    "tracing.inputs",
    "tracing.draft",
    "tracing.patches",
    "tracing.normalize",
    "tracing",
    "passes",
    "planning",
    "adapters",
    "picture",
    "model",
    "loading",
    "runtime",
    "engine",
    "exporters.options",
    "exporters.reports",
    "exporters.onnx_pipeline",
    "exporters.adapters_as_data",
    "exporters.conversion",
    "exporters.fx_passes",
    "exporters.translation",
    "exporters.onnx_passes",
    "exporters.folding",
    "exporters.artifact",
    "exporters.merged_files",
    "exporters.triton_files",
    "exporters.verification",
    "exporters.flavours",
    "exporters.verify",
    "exporters",
    "serving",
    "serving.scheduling",
    "serving.http",
    "serving.scale",
    "demo",
    "cli",
]
FILES = sorted({file.resolve() for folder in ("gralora_fx", "exporters") for file in (ROOT / folder).rglob("*.py")})


def module_name(file: Path) -> str:
    """A module's name without the package's; empty for the package itself."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "exporters" else parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(file): file for file in FILES}


def stage(name: str) -> int:
    """Place of a module in the flow."""
    known = [prefix for prefix in ORDER if f"{name}.".startswith(f"{prefix}.")]
    assert known, f"{name} has no place in the flow; add its folder to ORDER"
    return ORDER.index(max(known, key=len))


def imported(file: Path) -> Iterator[str]:
    """Every module of the package that a file imports: inside functions, for types alone and by a text as well."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            modules = [node.value]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        names = (name.removeprefix("gralora_fx.") for name in modules if name.startswith("gralora_fx."))
        yield from (name for name in names if name in NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name])
def test_no_module_imports_a_later_one(name: str) -> None:
    own = stage(name)
    later = [other for other in imported(NAMES[name]) if stage(other) > own]
    assert not later, f"{name} imports {', '.join(later)}, which comes later"


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports all the others, directly or not."""
    reached: dict[str, set[str]] = {}
    for name in imports:
        found, waiting = set(), [name]
        while waiting:
            new = imports[waiting.pop()] - found
            found |= new
            waiting += new
        reached[name] = found
    groups = {
        tuple(sorted(o for o in reached[name] if name in reached[o])) for name in imports if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def test_no_modules_import_each_other() -> None:
    assert circles({name: set(imported(file)) - {name} for name, file in NAMES.items()}) == []


def test_circles_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == [["b", "c"], ["d"]]


def test_every_stage_exists() -> None:
    assert [entry for entry in ORDER if not any(f"{name}.".startswith(f"{entry}.") for name in NAMES)] == []


def test_the_root_holds_no_other_modules() -> None:
    assert {path.stem for path in (ROOT / "gralora_fx").glob("*.py")} == {"__init__", "errors"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_imports_peft(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        assert not [name for name in names if name.split(".")[0] == "peft"]


def test_serving_needs_no_exporter() -> None:
    """In a fresh interpreter."""
    code = (
        "import sys, gralora_fx.serving\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] == 'onnxscript' or n.startswith("
        "('torch.onnx', 'gralora_fx.exporters', 'gralora_fx.model', 'transformers.exporters'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_options_are_known_before_torch_is() -> None:
    code = "import sys, gralora_fx.cli\nprint({'torch', 'transformers', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
