"""One-way flow: no module imports one of a later stage, inside `exporters/` too, and no modules import each other.

And a name leads to one place: files and public classes are named once, or their folders tell the difference.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from source_files import FILES, NAMES, ROOT, faults, module_name, nodes, parsed

pytestmark = pytest.mark.quick

# folders, and single files if a folder's own files are on both sides of its subfolders; the longest match counts
ORDER = [
    "errors",
    "base.patches",
    "base.compat",
    "base",
    "core.config",
    "format",
    "core.graph",
    "core.methods",
    "methods",
    "core.operators",
    "core.tracing.failures",
    "core.tracing.inputs",
    "core.tracing.known_code",
    "core.tracing.other_layers",
    "core.tracing.sparse_attention",
    "core.tracing.decoder_operators",
    "core.tracing.size_guards",
    "core.tracing.draft",
    "core.tracing.normalize",
    "core.tracing",
    "core.planning",
    "core.adapters",
    "picture",
    "core.model",
    "core.loading",
    "core",
    "loading",
    "peft",
    "run.sessions",
    "run.engine",
    "exporters.formats",
    "exporters.quantize",
    "exporters.options",
    "exporters.verify_report",
    "exporters.reports",
    "exporters.rules.onnx_pipeline",
    "exporters.kinds.data_sites",
    "exporters.kinds.conversion",
    "exporters.translation",
    "exporters.rules",
    "exporters.fold",
    "exporters.artifact",
    "exporters.verify",
    "exporters.quantize.calibration",
    "exporters.quantize.choice",
    "exporters.kinds",
    "exporters.onnx_verify",
    "exporters",
    "run",
    "service.adapter_store",
    "service.scheduling",
    "service",
    "service.scale",
    "serving",
    "features",
    "demo",
    "cli",
]
PUBLIC = {"errors", "loading", "methods", "serving"}  # modules of public names alone
LONGEST = 350  # lines of a file
# names of several files, of which each folder says at a glance which half or whose it is
SAME_NAMES = {
    ("cli.options", "exporters.options"): "options of a command line, and of an export",
    ("exporters.kinds.decoder", "run.engine.decoder"): "how a kind of export is run, and how it is written",
    ("exporters.kinds.encoder_decoder", "run.engine.encoder_decoder"): "the same of another kind",
    ("exporters.artifact.manifest", "format.manifest"): "how it is written, and how it is read",
}
# each folder in these is a protocol or a feature, whose files are named by the stage that they are for
NAMED_ALIKE = ("service.protocols", "features")


def stage(name: str) -> int:
    """Place of a module in the flow."""
    known = [prefix for prefix in ORDER if f"{name}.".startswith(f"{prefix}.")]
    assert known, f"{name} has no place in the flow; add its folder to ORDER"
    return ORDER.index(max(known, key=len))


@cache
def imported(file: Path) -> tuple[str, ...]:
    """Every module of the package that a file imports: inside functions, for types alone and by a text as well."""
    return tuple(_imported(file))


def _imported(file: Path) -> Iterator[str]:
    for node in nodes(file):
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


def test_no_module_imports_a_later_one() -> None:
    def later(file: Path) -> list[str]:
        own = stage(module_name(file))
        return [other for other in imported(file) if stage(other) > own]

    assert faults((file for name, file in NAMES.items() if name), later) == {}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of modules each of which imports all the others, directly or not."""
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
    assert {path.stem for path in (ROOT / "gralora_fx").glob("*.py")} == {"__init__", *PUBLIC}


def recurring(names: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Modules by the names that several of them have.

    Args:
        names: A name, and a module that has it.
    """
    modules: dict[str, list[str]] = {}
    for name, module in names:
        modules.setdefault(name, []).append(module)
    return {name: tuple(sorted(having)) for name, having in modules.items() if len(having) > 1}


def is_of_one(module: str) -> bool:
    """Return whether a module is within one of several folders whose files are named alike."""
    return any(module.startswith(f"{of}.") and module.count(".") > of.count(".") + 1 for of in NAMED_ALIKE)


def test_a_files_name_occurs_once_or_its_folder_tells_the_difference() -> None:
    files = [(name.rpartition(".")[2], name) for name, file in NAMES.items() if file.stem != "__init__"]
    same = set(recurring(file for file in files if not is_of_one(file[1])).values())
    assert sorted(same - SAME_NAMES.keys()) == [], "rename one, or say in SAME_NAMES what tells them apart"
    assert sorted(SAME_NAMES.keys() - same) == [], "these are no longer named alike; take them out of SAME_NAMES"


def test_a_public_class_is_named_once() -> None:
    classes = [
        (node.name, name)
        for name, file in NAMES.items()
        for node in parsed(file).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert recurring(classes) == {}


def test_recurring_names_are_seen() -> None:
    assert recurring([("plain", "b.plain"), ("fold", "fold"), ("plain", "a.plain")]) == {
        "plain": ("a.plain", "b.plain")
    }
    assert is_of_one("service.protocols.openai.routes")
    assert is_of_one("features.experts.operators")
    assert not is_of_one("service.app")


def test_no_file_is_long() -> None:
    lines = {name: len(file.read_text().splitlines()) for name, file in NAMES.items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_no_module_imports_peft() -> None:
    def of_peft(file: Path) -> Iterator[str]:
        for node in nodes(file):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            yield from (name for name in names if name.split(".")[0] == "peft")

    assert faults(FILES, of_peft) == {}


def test_serving_needs_no_exporter() -> None:
    """In a fresh interpreter."""
    code = (
        "import sys, gralora_fx.service.app\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] == 'onnxscript' or n.startswith("
        "('torch.onnx', 'gralora_fx.exporters', 'gralora_fx.core.model', 'transformers.exporters', "
        "'opentelemetry.sdk'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_options_are_known_before_torch_is() -> None:
    code = "import sys, gralora_fx.cli\nprint({'torch', 'transformers', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
