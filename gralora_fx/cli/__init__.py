"""The command line: `gralora-fx inspect | export | export-adapter | fold | verify | to-lora | merge | serve | demo`."""

from gralora_fx.cli.commands import app
from gralora_fx.cli.program import main

__all__ = ["app", "main"]
