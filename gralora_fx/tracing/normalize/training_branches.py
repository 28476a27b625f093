"""Which modules of a model compute something else in training than in evaluation, beyond what a trace can switch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from gralora_fx.compat.operators import schema_of
from gralora_fx.graph.module_tree import module_stack
from gralora_fx.tracing.normalize.modes import switched_argument

_SHOWN = 6


def differing_modules(in_training: fx.Graph, in_evaluation: fx.Graph) -> tuple[str, ...]:
    """Paths of the modules whose own operators differ between the traces of one model in its two modes.

    Dropout, batch statistics and all else that `record_switches` notes are not counted: a graph has both forms of them.

    Args:
        in_training: The trace in training mode.
        in_evaluation: The trace in evaluation mode.
    """
    training, evaluation = _operators_by_module(in_training), _operators_by_module(in_evaluation)
    paths = dict.fromkeys([*training, *evaluation])
    return tuple(path for path in paths if training.get(path) != evaluation.get(path))


def updated_buffers(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Names of the buffers that a graph writes into in either mode; batch norm's own are written in training alone."""
    names = set(dict(graph_module.named_buffers(remove_duplicate=False)))
    found = []
    for node in graph_module.graph.nodes:
        schema = schema_of(node.target)
        if node.op != "call_function" or schema is None or switched_argument(node) is not None:
            continue
        values = [*node.args, *(node.kwargs.get(argument.name) for argument in schema.arguments[len(node.args) :])]
        for argument, value in zip(schema.arguments, values, strict=True):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(value, fx.Node) and value.op == "get_attr" and str(value.target) in names:
                found.append(str(value.target))
    return tuple(dict.fromkeys(found))


def names_of_modules(model: nn.Module, paths: Iterable[str]) -> str:
    """The modules at some paths as a list to read: `blocks.0.noise (Noise), blocks.1.noise (Noise)`."""
    modules = dict(model.named_modules())
    named = [f"{path or 'the model itself'} ({type(modules[path]).__name__})" for path in paths]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more


def _operators_by_module(graph: fx.Graph) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            path = ([""] + [path for path, _ in module_stack(node)])[-1]
            found.setdefault(path, []).append(_signature(node))
    return found


def _signature(node: fx.Node) -> Any:
    """An operator and its constants, which two traces of the same code have alike."""
    if switched_argument(node) is not None:
        return str(node.target)
    constants = fx.map_arg((node.args, node.kwargs), lambda _: None)
    return str(node.target), str(constants)
