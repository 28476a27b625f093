"""The table of an export's options in `export.md`, derived from their declarations: `python docs/option_table.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from gralora_fx.core.config.option import declared_options
from gralora_fx.errors import Message
from gralora_fx.exporters.options import ExportOptions

PAGE = Path(__file__).parent / "export.md"
_HEAD = "| command line | `export_onnx` | default | meaning |\n|---|---|---|---|\n"


def rows() -> Iterator[str]:
    """Yield a row for each option that the command line has too: its names, its default, its text."""
    for declared in declared_options(ExportOptions):
        if text := Message(declared.option.help).removesuffix("."):
            value = "" if declared.is_flag else f" {declared.metavar}".replace("|", "\\|")
            default = declared.option.left_out or declared.default
            yield f"| `{declared.flag}{value}` | `{declared.name}` | `{default}` | {text} |\n"


def with_table(page: str) -> str:
    """Return a page with the table as it is declared."""
    return re.sub(rf"(?<={re.escape(_HEAD)})(\|.*\n)*", lambda _: "".join(rows()), page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
