"""Errors in the words of the command line.

The library words a remedy as Python's argument or function: `overwrite=True`, `adapters='data'`, `to_lora`. Here
each becomes the option of the command that runs, or of the one that it is about, or the command of a function. A
library error therefore never names an option; the tests go over every error text for a remedy that has no form here.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rich.console import Console

from gralora_fx.base.progress.report import DETAILS, Invocation, Report
from gralora_fx.core.config.checks import CONFIG_NAME
from gralora_fx.format.export_usage import COMPARING

notes = Console(stderr=True, highlight=False, soft_wrap=True)  # where what is not a result is printed
_VALUES = r"""'[^']*'|"[^"]*"|True|False|None|\.{3}|-?\d[\d.]*|\([^()]*\)|\[[^\[\]]*\]"""
# a keyword argument with the value to give it, or several; `...` stands for any
_KEYWORD = re.compile(
    rf"(?<![\w.\-/=])(?<!\w\()(?P<name>[a-z][a-z_]*)=(?P<value>{_VALUES})(?P<others>(?:(?:,| or| and) '[^']*')*)"
)
_SUBJECT = re.compile(r"\A[a-z_]+(?= must be )")  # a value that is refused, by the name of its argument
_MODEL_TO_EXPORT = re.compile(r"export_onnx\(trace\(AutoModel\.from_pretrained\(('[^']*'|\"[^\"]*\")\)\), output_dir\)")
# what is not an argument of a command's own function, and functions; longest first
PHRASES: Mapping[str, str] = {
    DETAILS: "-v",
    "verify=False": "--no-verify",
    "verify=True": "--verify quick",
    "tokenizer=...": "--model with a tokenizer, and no --no-tokenizer",
    "do_sample=True": "--temperature",
    "do_sample=False": "--temperature 0",
    "merge with untie=True": "run gralora-fx merge",
    "trace with dynamic=False": "trace it from Python with dynamic=False",
    "what rewrite() returned": "--adapter",
    "load_adapter()": "--adapter NAME=PATH",
    "print(traced.sites)": "gralora-fx inspect",
    "print(plan(traced, config))": "gralora-fx inspect",
    "the table of plan(traced, config), with target_modules='all-linear' in the config, lists": (
        "gralora-fx inspect without --adapter lists"
    ),
    "export_adapter": "gralora-fx export-adapter",
    "export_onnx": "gralora-fx export",
    "export_triton": "gralora-fx export-triton",
    "fold_onnx": "gralora-fx fold",
    "merge_checkpoint": "gralora-fx merge",
    "to_lora": "gralora-fx to-lora",
    "verify_onnx": "gralora-fx verify",
}
_PHRASE = re.compile("|".join(rf"(?<![\w.-]){re.escape(phrase)}(?![\w-])" for phrase in PHRASES))


class Wording:
    """Turns remedies into those of a command.

    Attributes:
        options: Options by the arguments that they are for, those of the running command first.
    """

    def __init__(self, commands: Mapping[str, Any], running: str | None) -> None:
        """Look at the options of the commands."""
        order: Iterable[str] = [
            name for name in (running, "export", *commands) if name in commands and name is not None
        ]
        self.options: dict[str, Any] = {}
        for name in order:
            for param in commands[name].params:
                if param.param_type_name == "option":
                    self.options.setdefault(param.name, param)

    def __call__(self, text: str) -> str:
        """The text with every remedy that has a form on the command line in that form."""
        text = _SUBJECT.sub(
            lambda found: self.options[found[0]].opts[0] if found[0] in self.options else found[0], text
        )
        text = _MODEL_TO_EXPORT.sub(lambda found: f"gralora-fx export --model {_shell(found[1])} --output DIR", text)
        return _KEYWORD.sub(self._option, _PHRASE.sub(lambda found: PHRASES[found[0]], text))

    def _option(self, found: re.Match[str]) -> str:
        param = self.options.get(found["name"])
        if param is None:
            return found[0]
        option = param.opts[0]
        first = found["value"]
        if param.is_flag:
            return option if first != "False" else f"no {option}"
        if first == "...":
            return str(option)
        if first == "None":
            return f"no {option}"
        if first[0] in "([":
            return f"{option} {param.metavar}"
        others = re.sub(r"'([^']*)'", r"\1", found["others"])
        return f"{option} {_shell(first)}{others}"


_wording: ContextVar[Callable[[str], str]] = ContextVar("wording", default=str)


def use_wording(wording: Wording) -> None:
    """Let what this process prints be in the words of a command."""
    _wording.set(wording)


def show(report: Report, *, verbose: bool, **sources: str | Sequence[str] | None) -> None:
    """Print a report to stdout: three lines, or all of it."""

    def words(usage: Invocation) -> str:
        if not usage.command:
            return usage.python
        return _command(usage, _with_base(sources) if usage.command == COMPARING else {})

    texts = [report.summary.text(words), *([report.details] if verbose else [])]
    print(_wording.get()("\n\n".join(texts)))


def _with_base(sources: Mapping[str, str | Sequence[str] | None]) -> Mapping[str, str | Sequence[str] | None]:
    """Return what names a model, with a place for its base where a local adapter alone is given and names none."""
    given = sources.get("adapter")
    adapters = [given] if isinstance(given, str) else given or ()
    local = [adapter for adapter in adapters if (Path(adapter) / CONFIG_NAME).is_file()]
    if sources.get("model") or not local:
        return sources
    from gralora_fx.core.config.reading import config_fields

    is_named = any(config_fields(adapter)[0].get("base_model_name_or_path") for adapter in local)
    return sources if is_named else {**sources, "model": "BASE"}


def _command(usage: Invocation, more: Mapping[str, str | Sequence[str] | None]) -> str:
    """A usage as a line of the shell."""
    parts = [usage.command]
    for name, given in {**usage.arguments, **more}.items():
        values = [given] if isinstance(given, str) else given or ()
        parts += [f"--{name.replace('_', '-')} {shlex.quote(value)}" for value in values]
    return " ".join(parts)


def _shell(literal: str) -> str:
    """A literal of Python as a word of the shell."""
    return shlex.quote(str(ast.literal_eval(literal)))
