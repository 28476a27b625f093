"""The command line: `gralora-fx inspect | export | export-adapter | fold | verify | merge | serve | generate | ...`."""

from __future__ import annotations

from gralora_fx import first_use

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line (see `gralora_fx.cli.program.main`)."""
    from gralora_fx.cli.program import main as run

    run()


__getattr__ = first_use(__name__, {"app": "cli.commands"})  # it imports every command
