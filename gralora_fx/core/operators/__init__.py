"""The operators of this project for `torch.fx` graphs, each one class: arguments, reference, shape rule and calls."""

from functools import cache
from importlib import import_module

FILES = ("attention", "experts", "layers", "linear_attention", "state_spaces")  # that define some


@cache
def define_operators() -> None:
    """Define every operator, so that a graph may call any by its name."""
    for name in FILES:
        import_module(f"gralora_fx.core.operators.{name}")
