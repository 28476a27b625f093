"""The command line: `gralora-fx inspect | export | export-adapter | fold | verify | merge | serve | generate | ...`."""

from __future__ import annotations

import sys

from gralora_fx import first_use
from gralora_fx.cli.huge_pages import use_huge_pages

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line (see `gralora_fx.cli.program.main`)."""
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    if command == "serve" and "--help" not in sys.argv:
        use_huge_pages()  # before imports that the restarted program would repeat
    from gralora_fx.cli.program import main as run

    run()


__getattr__ = first_use(__name__, {"app": "cli.commands"})  # it imports every command
