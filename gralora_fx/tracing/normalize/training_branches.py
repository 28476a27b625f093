"""Modules that compute something else in training than in evaluation, beyond mode arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from gralora_fx.compat.torch_graphs import schema_of
from gralora_fx.graph.module_tree import module_stack
from gralora_fx.tracing.normalize.modes import mode_argument

_SHOWN = 6


def differing_modules(in_training: fx.Graph, in_evaluation: fx.Graph) -> tuple[str, ...]:
    """Paths of the modules whose own operators differ between traces of a model in its two modes.

    Differences that `annotate_mode_args` annotates, such as dropout and batch statistics, do not count.

    Args:
        in_training: The trace in training mode.
        in_evaluation: The trace in evaluation mode.
    """
    training, evaluation = _operators_by_module(in_training), _operators_by_module(in_evaluation)
    paths = dict.fromkeys([*training, *evaluation])
    return tuple(path for path in paths if training.get(path) != evaluation.get(path))


def updated_buffers(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Names of buffers that a graph updates in either mode, unlike batch norm's, which change only in training."""
    names = set(dict(graph_module.named_buffers(remove_duplicate=False)))
    updated = []
    for node in graph_module.graph.nodes:
        schema = schema_of(node.target)
        if node.op != "call_function" or schema is None or mode_argument(node) is not None:
            continue
        values = [*node.args, *(node.kwargs.get(argument.name) for argument in schema.arguments[len(node.args) :])]
        for argument, value in zip(schema.arguments, values, strict=True):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(value, fx.Node) and value.op == "get_attr" and str(value.target) in names:
                updated.append(str(value.target))
    return tuple(dict.fromkeys(updated))


def names_of_modules(model: nn.Module, paths: Iterable[str]) -> str:
    """A readable list of the modules at some paths: `blocks.0.noise (Noise), blocks.1.noise (Noise)`."""
    modules = dict(model.named_modules())
    named = [f"{path or 'the model itself'} ({type(modules[path]).__name__})" for path in paths]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more


def _operators_by_module(graph: fx.Graph) -> dict[str, list[Any]]:
    operators: dict[str, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            path = ([""] + [path for path, _ in module_stack(node)])[-1]
            operators.setdefault(path, []).append(_signature(node))
    return operators


def _signature(node: fx.Node) -> Any:
    """An operator and its constants, which are equal in two traces of the same code."""
    if mode_argument(node) is not None:
        return str(node.target)
    constants = fx.map_arg((node.args, node.kwargs), lambda _: None)
    return str(node.target), str(constants)
