"""The project's operators for `torch.fx` graphs, one class each: arguments, reference, shape rule and calls."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from torch import fx

from gralora_fx.base.compat.torch_graphs import OpOverload, schema_of

FILES = ("attention", "layers")  # modules that define operators
NAMESPACE = "gralora"
COMPUTING = "operators compute values"

# facts about the defined operators
STANDS_FOR: dict[Any, Any] = {}  # real operators by their shape-only counterparts
# operators that differ in training: the position of the flag, or of a probability that evaluation sets to zero
TRAIN_FLAGS: dict[Any, int] = {}
DROPOUTS: dict[Any, int] = {}
CONTRACTIONS: set[Any] = set()  # operators that multiply by weights or activations and sum


@cache
def define_operators(name: str) -> None:
    """Define the project's operators in `torch.ops`, so that a graph may call one by its name."""
    from gralora_fx.base.features import parts

    for file in FILES:
        import_module(f"gralora_fx.core.operators.{file}")
    parts("operators", {name})


def operators_called(graph: fx.Graph) -> set[str]:
    """Return the names of the operators that a graph calls, such as `"gralora::attention"`."""
    targets = {node.target for node in graph.nodes if node.op == "call_function"}
    return {schema_of(target).name for target in targets if isinstance(target, OpOverload)}
