"""A remedy is worded for who reads it: as an argument from Python, as an option on the command line."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_import_order import FILES, NAMES, module_name
from typer.main import get_command

from gralora_fx import GraloraConfig, LoraConfig
from gralora_fx.base.progress.report import Report, Summary
from gralora_fx.cli import app
from gralora_fx.cli.wording import Wording, show
from gralora_fx.format.export_usage import comparison_of

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
ANY = "x"  # in place of what a message holds
REMEDY = re.compile(
    r"(?<![\w.\-/=])(?<!\w\()([a-z][a-z_]*)=(?:'[^']*'|\"|True|False|None|\.{3}|-?\d|\(|\[)|(?<![.\w])([a-z_]+)\((?=\)|[a-z_=.*]+[,)])"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# remedies for what no command does, by what they say
UNREACHABLE = (
    "call unmerge_adapter()",  # no command merges into a model in memory
    "give what it or rewrite() returned",  # the type of a model that a command loads is right
    "give them to trace()",  # a command makes example inputs
    "trace the model with dynamic=True",  # a command always does
    "it was traced with dynamic=False",
    "from Python with dynamic=False",
    "truncation=True and max_length",  # a command tokenizes itself
    "model(input_ids=...), or model(**tokenizer(...))",
    "generate(**tokenizer(...))",
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)",  # of PEFT
    "; dequantize_model(",  # in commands of other programs, which convert a checkpoint
    "dequantize=True",
    'map_location="cpu"',
    "weights_only=True",
    "an if, a while, int(), range() or a size",  # no remedy: what a model may not do
)
FIELDS = {field.name for config in (GraloraConfig, LoraConfig) for field in dataclasses.fields(config)}
# reached from Python alone: what a user does with a model in hand, and what a trace is given by hand
PYTHON = (
    "core.adapters.adapter_graph",
    "core.adapters.current_graph",
    "core.adapters.state_graph",
    "demo",
    "core.graph",
    "core.model",
    "picture.facts",
    "format.export_usage",  # calls, beside the command of each
    "core.tracing.as_transformers",
    "core.tracing.inputs.arguments",
    "core.tracing.inputs.input_trees",
    "core.tracing.inputs.signature",
    "core.tracing.traced_model",
)
# about the service itself, which the command line alone starts
SERVICE = ("cli", "demo", "service")


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """The texts of a file, with a placeholder for each value; docstrings and parts of other texts left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    skipped |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            text = "".join(map(placed, node.values))
        else:
            continue
        if " " in text:
            yield node.lineno, text


def placed(part: ast.expr) -> str:
    """A part of an f-string."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    is_shown = part.conversion == ord("r") or ast.unparse(part.value).startswith("shown(")
    return f"'{ANY}'" if is_shown else ANY


def reachable(text: str) -> str:
    for phrase in UNREACHABLE:
        text = text.replace(phrase, "")
    return text


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("name", [name for name in NAMES if not within(name, PYTHON)])
def test_every_remedy_has_a_form_on_the_command_line(name: str) -> None:
    wording = Wording(COMMANDS, None)
    left = [
        f"{line}: {text}"
        for line, text in texts(NAMES[name])
        if any((found[1] or found[2]) not in FIELDS | {ANY} for found in REMEDY.finditer(reachable(wording(text))))
    ]
    assert left == []


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_the_library_names_no_option(file: Path) -> None:
    if within(module_name(file), SERVICE):
        return
    assert [f"{line}: {text}" for line, text in texts(file) if OPTION.search(text)] == []


class _Compared(Report):
    """A report of an export that was not compared."""

    @property
    def summary(self) -> Summary:
        """With what compares it."""
        return Summary("exported", "wrote onnx", comparison=comparison_of("onnx"))

    @property
    def details(self) -> str:
        """None."""
        return ""


@pytest.mark.parametrize(("base", "words"), [(None, "--model BASE --adapter"), ("llama", "--onnx onnx --adapter")])
def test_a_comparison_names_a_base_that_its_adapter_does_not(
    base: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"peft_type": "GRALORA", "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    show(_Compared(), verbose=False, model=None, adapter=str(tmp_path))
    assert words in capsys.readouterr().out
