"""The command line: `gralora-fx inspect | export | export-adapter | fold | verify | merge | serve | generate | ...`."""

from gralora_fx.cli.commands import app
from gralora_fx.cli.program import main

__all__ = ["app", "main"]
