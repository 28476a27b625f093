"""A remedy is worded for who reads it: as an argument from Python, as an option on the command line."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from source_files import FILES, NAMES, faults, module_name, nodes
from typer.main import get_command

from gralora_fx import GraloraConfig, LoraConfig, errors
from gralora_fx.base.progress.report import Report, Summary
from gralora_fx.cli import app
from gralora_fx.cli.wording import show
from gralora_fx.errors import ConfigError, an, command, in_command, marked, option
from gralora_fx.format.export_usage import comparison_of

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
OPTIONS: dict[str, set[str]] = {}
for param in (param for each in COMMANDS.values() for param in each.params):
    OPTIONS.setdefault(param.name, set()).update(param.opts)
ERRORS = [name for name in vars(errors) if name.endswith("Error")]
SPOKEN = ("tokenizer", "do_sample", "verify")  # each value of these has words of its own
ANY = "x"  # in place of what a message holds
REMEDIES = ("option", "command", "remedy")
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
    "with dynamic=False",
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
    "core.adapters.run_forms",
    "core.adapters.state_graph",
    "core.model",
    "core.tracing.inputs.arguments",
    "core.tracing.traced_model",
    "demo",
    "peft",
    "picture.facts",
    "format.export_usage",  # calls, beside the command of each
)
# about the service itself, which the command line alone starts
SERVICE = ("cli", "demo", "errors", "service")


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the texts of a file, with a placeholder for each value; docstrings and parts of other texts left out."""
    skipped = {
        id(node.body[0].value)
        for node in nodes(file)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    skipped |= {id(part) for node in nodes(file) if isinstance(node, ast.JoinedStr) for part in node.values}
    skipped |= {id(part) for call in remedies(file) for argument in call.args for part in ast.walk(argument)}
    for node in nodes(file):
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


def remedies(file: Path) -> list[ast.Call]:
    """Return the calls that name an option, a function or another remedy."""
    calls = [node for node in nodes(file) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in REMEDIES]


def placed(part: ast.expr) -> str:
    """Return a part of an f-string."""
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


def test_every_remedy_has_a_form_on_the_command_line() -> None:
    def without(file: Path) -> Iterator[str]:
        for line, text in texts(file):
            if any((found[1] or found[2]) not in FIELDS | {ANY} for found in REMEDY.finditer(reachable(text))):
                yield f"{line}: {text}"

    assert faults((file for name, file in NAMES.items() if not within(name, PYTHON)), without) == {}


def test_a_remedy_names_an_option_or_a_command_that_there_is() -> None:
    files = [file for name, file in NAMES.items() if not within(name, ("cli.commands",))]
    for place, call in ((f"{file}, line {call.lineno}", call) for file in files for call in remedies(file)):
        kind = ast.unparse(call.func)
        words = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        if kind == "command":
            assert in_command(command(words[0])).removeprefix("gralora-fx ") in COMMANDS, place
        elif kind == "option":
            names = words + [keyword.arg for keyword in call.keywords if keyword.arg and keyword.arg not in SPOKEN]
            assert all(in_command(option(name)) in OPTIONS.get(name, ()) for name in names), place


def test_an_error_within_another_is_marked() -> None:
    def unmarked(file: Path) -> Iterator[int]:
        for handler in (node for node in nodes(file) if isinstance(node, ast.ExceptHandler)):
            is_ours = handler.name and ast.unparse(handler.type or handler) in ERRORS
            if is_ours and f"{{{handler.name}}}" in ast.unparse(handler):
                yield handler.lineno

    assert faults(FILES, unmarked) == {}


def test_an_error_keeps_its_remedies_in_another() -> None:
    error = ConfigError(f"it exists; give {option(overwrite=True)}, or {option(output=...)} to {command('to_lora')}")
    assert str(error) == "it exists; give overwrite=True, or output=... to to_lora"
    again = pickle.loads(pickle.dumps(ConfigError(f"a: {marked(error)}")))
    assert in_command(again) == "a: it exists; give --overwrite, or --output to gralora-fx to-lora"
    assert in_command(ConfigError(option(model="a b"))) == "--model 'a b'"
    assert repr(ConfigError(option(full=False))) == "ConfigError('full=False')"


def test_a_value_has_the_article_that_fits() -> None:
    assert [an(noun) for noun in ("int", "output scale", "LSTM", "Embedding", "Upsample")] == [
        "an int",
        "an output scale",
        "an LSTM",
        "an Embedding",
        "an Upsample",
    ]
    assert [an(noun) for noun in ("list", "UNet", "uint8", "LoRA")] == ["a list", "a UNet", "a uint8", "a LoRA"]

    def fixed(file: Path) -> Iterator[str]:
        parts = ((node.lineno, node.values) for node in nodes(file) if isinstance(node, ast.JoinedStr))
        for line, values in parts:
            for before, value in pairwise(values):
                text = before.value if isinstance(before, ast.Constant) else ""
                if re.search(r"\ba $", str(text)) and isinstance(value, ast.FormattedValue):
                    yield f"{line}: {text}{ast.unparse(value)}"

    assert faults(FILES, fixed) == {}


def test_the_library_names_no_option() -> None:
    def named(file: Path) -> list[str]:
        return [f"{line}: {text}" for line, text in texts(file) if OPTION.search(text)]

    assert faults((file for file in FILES if not within(module_name(file), SERVICE)), named) == {}


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
