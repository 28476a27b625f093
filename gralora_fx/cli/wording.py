"""Help and reports in the command line's words, and the console for messages.

Help begins with an example, then required options, then groups of options with a placeholder for each value.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from gralora_fx.base.progress.report import Invocation, Report
from gralora_fx.core.config.checks import CONFIG_NAME
from gralora_fx.errors import ConfigError, in_command, joined
from gralora_fx.format.export_usage import COMPARING

REQUIRED, _OTHER = "Required", "Options"
_HYPHEN = "\u2011"  # a hyphen without a line break, so that names stay whole


class _Help:
    """Help that begins with an example, and breaks no line within a name."""

    epilog: str | None
    help: str | None

    def get_help(self, ctx: Any) -> str:
        """Return the help text."""
        formatter = ctx.make_formatter()
        formatter.write(f"Example: {self.epilog}\n\n")
        self.format_help(ctx, formatter)  # type: ignore[attr-defined]
        text: str = formatter.getvalue()
        return text.replace(_HYPHEN, "-").rstrip("\n")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the command's description."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(_unbroken(inspect.cleandoc(self.help or "")))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write nothing at the end, as the example came first."""


class Group(_Help, TyperGroup):
    """The program; its help describes every command in a sentence."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the usage line after the program's name."""
        return ["COMMAND", "[OPTIONS]"]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, each with the first line of its help."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, _unbroken((found.help or "").partition("\n")[0])) for name, found in commands if found is not None
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
        formatter.write_paragraph()
        formatter.write_text(_unbroken("gralora-fx COMMAND --help shows an example of a command, and its options."))
        formatter.write_text("GRALORA_FX_PROGRESS=0 in the environment hides the progress of long work.")


class Command(_Help, TyperCommand):
    """A command whose help and usage name the required options first.

    An option's first name is shown; its further names are older ones, still accepted.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; raise for a repeated single-value option, of which click would keep the last."""
        for text in args:
            if "\0" in text:
                raise ConfigError(f"{text[:80]!r} holds a zero byte; give text without one")
        given: list[Any] = self.make_parser(ctx).parse_args(args=list(args))[2]
        for param in dict.fromkeys(given):
            takes_one = param.param_type_name == "option" and not (param.multiple or param.is_flag or param.count)
            if takes_one and given.count(param) > 1:
                times = "twice" if given.count(param) == 2 else f"{given.count(param)} times"
                raise typer.BadParameter(f"it is given {times}, and {ctx.info_name} takes one", ctx, param)
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the usage line after the command's name: `--output DIR [OPTIONS]`."""
        needed = [name_of(param) for param in self.get_params(ctx) if _group(param) == REQUIRED]
        return [*needed, "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each group of options."""
        groups: dict[str, list[tuple[str, str]]] = {REQUIRED: []}
        for param in self.get_params(ctx):
            if param.param_type_name == "option" and not getattr(param, "hidden", False):
                groups.setdefault(_group(param), []).append((name_of(param), _unbroken(" ".join(_texts(param)))))
        for title, rows in sorted(groups.items(), key=lambda group: group[0] == _OTHER):  # ungrouped options last
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def name_of(param: Any) -> str:
    """Return an option's name with its placeholder, such as `--output DIR`."""
    letters = [name for name in param.opts[1:] if not name.startswith("--")]
    names = ", ".join([*letters, param.opts[0]])
    return names if not param.metavar or param.is_flag else f"{names} {param.metavar}"


def _unbroken(text: str) -> str:
    return text.replace("-", _HYPHEN)


def _group(param: Any) -> str:
    return getattr(param, "rich_help_panel", None) or (REQUIRED if param.required else _OTHER)


def _texts(param: Any) -> Iterator[str]:
    yield param.help or ""
    if getattr(param, "envvar", None):
        yield f" [environment: {param.envvar}]"
    default = param.default
    if default is not None and not isinstance(default, bool) and default != () and not callable(default):
        yield f" [default: {default:g}]" if isinstance(default, float) else f" [default: {default}]"


notes = Console(stderr=True, highlight=False, soft_wrap=True)  # for messages that are not results


def show(report: Report, *, verbose: bool, **sources: str | Sequence[str] | None) -> None:
    """Print a report to stdout: three lines, or with all details."""

    def words(usage: Invocation) -> str:
        if not usage.command:
            return usage.python
        return _command(usage, _with_base(sources) if usage.command == COMPARING else {})

    texts = [report.summary.text(words), *([report.details] if verbose else [])]
    print(in_command(joined(texts, "\n\n")))


def _with_base(sources: Mapping[str, str | Sequence[str] | None]) -> Mapping[str, str | Sequence[str] | None]:
    """Return the options that name a model, with a placeholder for the base if a local adapter does not name one."""
    given = sources.get("adapter")
    adapters = [given] if isinstance(given, str) else given or ()
    local = [adapter for adapter in adapters if (Path(adapter) / CONFIG_NAME).is_file()]
    if sources.get("model") or not local:
        return sources
    from gralora_fx.core.config.reading import config_fields

    is_named = any(config_fields(adapter)[0].get("base_model_name_or_path") for adapter in local)
    return sources if is_named else {**sources, "model": "BASE"}


def _command(usage: Invocation, more: Mapping[str, str | Sequence[str] | None]) -> str:
    parts = [usage.command]
    for name, given in {**usage.arguments, **more}.items():
        values = [given] if isinstance(given, str) else given or ()
        parts += [f"--{name.replace('_', '-')} {shlex.quote(value)}" for value in values]
    return " ".join(parts)
