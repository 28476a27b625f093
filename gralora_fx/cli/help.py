"""The help: an example first, then what is required, options in groups with a placeholder for each value."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gralora_fx.errors import ConfigError

REQUIRED, _OTHER = "Required", "Options"
_HYPHEN = "\u2011"  # one at which no line is broken, so that every name is found as it is written


class _Help:
    """Help that leads with an example, and breaks no line within a name."""

    epilog: str | None
    help: str | None

    def get_help(self, ctx: Any) -> str:
        """The text."""
        formatter = ctx.make_formatter()
        formatter.write(f"Example: {self.epilog}\n\n")
        self.format_help(ctx, formatter)  # type: ignore[attr-defined]
        text: str = formatter.getvalue()
        return text.replace(_HYPHEN, "-").rstrip("\n")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the command does."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(_unbroken(inspect.cleandoc(self.help or "")))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write nothing at the end, as the example came first."""


class Group(_Help, TyperGroup):
    """The program, whose help says what every command does in a whole sentence."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage line after the program."""
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

    An option's first name is its name; further ones are older names, which go on working and are not shown.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; of an option that takes one value and is given several, click would keep the last."""
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
        """The usage line after the command: `--output DIR [OPTIONS]`."""
        needed = [name_of(param) for param in self.get_params(ctx) if _group(param) == REQUIRED]
        return [*needed, "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each group of options."""
        groups: dict[str, list[tuple[str, str]]] = {REQUIRED: []}
        for param in self.get_params(ctx):
            if param.param_type_name == "option" and not getattr(param, "hidden", False):
                groups.setdefault(_group(param), []).append((name_of(param), _unbroken(" ".join(_texts(param)))))
        for title, rows in sorted(groups.items(), key=lambda group: group[0] == _OTHER):  # those of no group last
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def name_of(param: Any) -> str:
    """An option's name with the placeholder of its value, such as `--output DIR`."""
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
