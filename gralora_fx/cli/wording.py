"""Reports in the words of the command line, and where what is not a result is printed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from gralora_fx.base.progress.report import Invocation, Report
from gralora_fx.core.config.checks import CONFIG_NAME
from gralora_fx.errors import in_command, joined
from gralora_fx.format.export_usage import COMPARING

notes = Console(stderr=True, highlight=False, soft_wrap=True)  # where what is not a result is printed


def show(report: Report, *, verbose: bool, **sources: str | Sequence[str] | None) -> None:
    """Print a report to stdout: three lines, or all of it."""

    def words(usage: Invocation) -> str:
        if not usage.command:
            return usage.python
        return _command(usage, _with_base(sources) if usage.command == COMPARING else {})

    texts = [report.summary.text(words), *([report.details] if verbose else [])]
    print(in_command(joined(texts, "\n\n")))


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
