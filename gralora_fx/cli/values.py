"""Options declared by records, and parsers of option values that import nothing slow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from gralora_fx.base.compat.packages import require_extra
from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.core.config.checks import check_adapter_letters
from gralora_fx.core.config.option import DeclaredOption, declared_options
from gralora_fx.errors import ConfigError, first_line, in_command, option, shown
from gralora_fx.format.adapter_paths import check_name
from gralora_fx.format.tasks import check_task

Declared = Any  # type of a parameter whose option, with its default, a record declares
_KINDS = (Path, int, float, str)
_Command = TypeVar("_Command", bound=Callable[..., None])


def utf8(value: Any) -> Any:
    """Check that an option's value is valid UTF-8, which the operating system does not guarantee."""
    for part in value if isinstance(value, (list, tuple)) else [value]:
        try:
            str(part).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{str(part)[:80]!a} is not valid UTF-8; give text in UTF-8") from error
    return value


def model_name(name: str | None) -> str | None:
    """Check that a directory or hub id is not empty."""
    if name is not None and not name.strip():
        raise ConfigError("--model, --adapter and --base take a local directory or a hub id, but one of them is empty")
    return utf8(name)  # type: ignore[no-any-return]


def model_names(names: list[str] | None) -> list[str] | None:
    """Check that no directory or hub id of several is empty."""
    for name in names or ():
        model_name(name)
    return names


def file_name(name: str | None) -> str | None:
    """Check an adapter's name in an export, which becomes a file name."""
    return name if name is None else check_name(utf8(name), ConfigError)


def graph_name(name: str | None) -> str | None:
    """Check an adapter's name, which becomes a file name and a name in the graph."""
    if file_name(name) is not None:
        check_adapter_letters(name)
    return name


def task_name(task: str | None) -> str | None:
    """Check a task's name before anything slow is imported."""
    check_task(utf8(task))
    return task


def quantization_words(words: str | None) -> str | None:
    """Check a `--base-quantization` value."""
    return words if words is None else str(BaseQuantization.of(utf8(words)))


def check_rounding(quantization: str | BaseQuantization | None) -> None:
    """Check that the extra needed to round a base is installed, before anything slow is imported."""
    if quantization is not None and (extra := BaseQuantization.of(quantization).extra) is not None:
        require_extra(extra, option(base_quantization=str(quantization)), ConfigError)


def export_directory(onnx: Path | None, directory: Path | None) -> Path:
    """Return the export directory, given as --onnx or, as in earlier versions, as an argument."""
    if (onnx is None) == (directory is None):
        raise typer.BadParameter(
            "missing --onnx DIR, the directory of an export" if onnx is None else f"give --onnx {onnx} or {directory}"
        )
    return onnx or directory  # type: ignore[return-value]


def read_adapter(text: str, *, may_be_bare: bool = False) -> tuple[str, Path | None]:
    """Parse `--adapter NAME=PATH`."""
    name, equals, path = text.partition("=")
    if not name or (equals and not path) or not (equals or may_be_bare):
        form = "a name, or a name and a path as NAME=PATH" if may_be_bare else "a name and a path as NAME=PATH"
        raise ConfigError(f"--adapter takes {form}, but got {shown(text)}")
    return name, Path(path) if equals else None


def read_adapters(texts: list[str] | None) -> dict[str, Path]:
    """Parse several `--adapter NAME=PATH` into paths by name."""
    found: dict[str, Path] = {}
    for name, path in map(read_adapter, texts or ()):
        if name in found:
            raise ConfigError(f"--adapter {name} is given twice; give it once")
        assert path is not None
        found[name] = path
    return found


def read_texts(path: Path) -> list[str]:
    """Read the non-empty lines of a file."""
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise ConfigError(f"--texts {path} does not exist; give a file with one text on each line") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts {path} cannot be read as UTF-8 text ({first_line(error)})") from error
    if not texts:
        raise ConfigError(f"--texts {path} holds no text; write one on each line")
    return texts


def text_option(*names: str, metavar: str, callback: Callable[[Any], Any] = utf8, **others: Any) -> Any:
    """Declare an option whose value is a text, such as a path, and is checked."""
    return typer.Option(*names, metavar=metavar, callback=callback, **others)


def model_option(*names: str, callback: Callable[[Any], Any] = model_name, **others: Any) -> Any:
    """Declare an option whose value is a local directory or a hub id."""
    return text_option(*names, metavar="DIR|ID", callback=callback, **others)


def takes(*records: type) -> Callable[[_Command], _Command]:
    """Return a decorator that adds an option for each one that the records declare.

    They come after the command's own positional parameters and before its keyword-only ones, and reach the command as
    `**options`. An option that the command names itself takes that place and is passed by that name.
    """
    options = [option for record in records for option in declared_options(record)]
    declared = {option.name: _parameter(option) for option in options if option.option.help}

    def with_options(command: _Command) -> _Command:
        own = inspect.signature(command, eval_str=True).parameters
        first = [name for name, parameter in own.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        last = [name for name, parameter in own.items() if parameter.kind is parameter.KEYWORD_ONLY]
        between = [name for name in declared if name not in own]
        parameters = [{**own, **declared}[name] for name in (*first, *between, *last)]
        keywords = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
        vars(command)["__signature__"] = inspect.Signature(keywords)
        for name in declared.keys() & own.keys():
            del command.__annotations__[name]  # typer would look there first
        return command

    return with_options


def _parameter(declared: DeclaredOption) -> inspect.Parameter:
    """Return an option as a parameter that typer reads; a choice is a string, which its record checks."""
    option = declared.option
    text = in_command(option.help)
    info: dict[str, Any] = {"help": f"{text}  [default: {option.left_out}]" if option.left_out else text}
    info |= {"rich_help_panel": option.group} if option.group else {}
    if declared.is_flag:
        kind: Any = bool
    elif declared.types == (tuple[str, ...],):
        kind = list[str]
        info |= {"metavar": declared.metavar, "callback": utf8}
    else:
        kind = str if declared.choices else next(k for k in _KINDS if k in declared.types)
        info |= {"metavar": declared.metavar, "min": option.least, "envvar": option.environment or None}
        info |= {"callback": utf8} if kind in (Path, str) and not declared.choices else {}
    is_default = declared.is_flag or (kind in _KINDS and isinstance(declared.default, kind))
    default = declared.default if is_default else None
    annotation: Any = Annotated[kind if default is not None else kind | None, typer.Option(declared.flag, **info)]
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(declared.name, place, default=default, annotation=annotation)
