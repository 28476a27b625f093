"""The command line: `gralora-fx inspect | export | export-adapter | fold | verify | merge | serve | generate | ...`."""

from __future__ import annotations

import sys
from typing import Any

from gralora_fx.cli.huge_pages import use_huge_pages

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line (see `gralora_fx.cli.program.main`)."""
    if next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None) == "serve":
        use_huge_pages()  # before anything is imported that the program would import once more
    from gralora_fx.cli.program import main as run

    run()


def __getattr__(name: str) -> Any:
    """Import `app`, which imports every command, when it is first asked for."""
    if name == "app":
        from gralora_fx.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
