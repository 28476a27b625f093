"""The operators of this project for `torch.fx` graphs, each one class: arguments, reference, shape rule and calls."""

from functools import cache
from importlib import import_module

FILES = ("attention", "layers")  # that define some


@cache
def define_operators(name: str) -> None:
    """Define this project's operators, so that a graph may call one by its name."""
    from gralora_fx.base.features import parts

    for file in FILES:
        import_module(f"gralora_fx.core.operators.{file}")
    parts("operators", {name})
