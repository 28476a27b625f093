"""A graph for both modes of a model: attempts to capture, normalize and check it, until one is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from gralora_fx.compat.torch_graphs import schema_of
from gralora_fx.errors import TraceError, warn_caller
from gralora_fx.graph.module_tree import module_stack
from gralora_fx.tracing.capture import NO_CHECKPOINTS, capture
from gralora_fx.tracing.check import check, check_other_sizes, difference
from gralora_fx.tracing.draft import Draft
from gralora_fx.tracing.failures import where_defined
from gralora_fx.tracing.normalize.clean import normalize
from gralora_fx.tracing.normalize.modes import find_rng_op, mode_argument
from gralora_fx.tracing.patches.traceable import without_layerdrop

_SHOWN = 6  # names of modules in a message


def trace_both_modes(draft: Draft) -> Draft:
    """The draft with a graph for both modes: captured in training mode, where every dropout has its probability.

    If that fails, or differs from the model in evaluation mode, the modules with a separate training branch are traced
    in evaluation mode, or else the whole model; a warning says what training then lacks.

    Raises:
        TraceError: The model cannot be traced, or differs from its trace, if only for other sizes that may vary.
    """
    with _unchanged(draft.model), without_layerdrop(draft.model):
        draft = _first_right(draft)
        check_other_sizes(draft)
        return draft


def _first_right(draft: Draft) -> Draft:
    """The draft with the first graph that equals the model in evaluation mode."""
    model = draft.model
    trained = _attempt(draft)
    updated = () if trained.graph_module is None else updated_buffers(trained.graph_module)
    if trained.problem is None and not updated:
        return trained
    evaluated = _attempt(dataclasses.replace(draft, evaluates=True))
    if evaluated.problem is not None:
        raise TraceError(
            f"the trace of {type(model).__name__} differs from the model: {evaluated.problem}; check what the "
            f"forward{where_defined(model)} does outside PyTorch or at random"
        )
    graph = evaluated.captured.graph
    paths = () if trained.graph_module is None else differing_modules(trained.graph_module.graph, graph)
    if trained.problem is None and not paths:  # the model updates its buffers in both modes
        return trained
    reason = trained.problem or f"it updates {', '.join(updated)}"
    if rng_op := find_rng_op(graph):
        reason = f"it draws random numbers in evaluation too ({rng_op})"
        if trained.graph_module is not None and not paths:
            if difference(model, trained.graph_module, draft.sample) is None:
                warn_caller(f"{type(model).__name__} and its trace give other values in every run: {reason}")
                return trained
    if paths:
        mixed = _attempt(draft, evaluated=paths)
        reason = f"{names_of_modules(model, paths)} differs in training ({reason})"
        if mixed.problem is None and updated_buffers(mixed.captured) == updated_buffers(evaluated.captured):
            warn_caller(f"{reason}; that is not part of the trace, and training runs it as in evaluation")
            return mixed
    warn_caller(
        f"{type(model).__name__} was traced in evaluation mode, so training runs without its attention dropout and "
        f"noise: {reason}"
    )
    return evaluated


def _attempt(draft: Draft, *, evaluated: Collection[str] = ()) -> Draft:
    """Capture, normalize and check a model's graph in the draft's mode; in training mode a failure is a problem.

    Args:
        draft: The draft; its model's mode changes.
        evaluated: Paths of modules to put into evaluation mode though the model trains.
    """
    draft.model.train(not draft.evaluates)
    for path in evaluated:
        draft.model.get_submodule(path).training = False
    try:
        return check(normalize(capture(draft)))
    except TraceError as error:
        if draft.evaluates:
            raise
        return dataclasses.replace(draft, problem=str(error))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore modes, buffers and gradient checkpointing when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    if checkpointed:
        warn_caller(NO_CHECKPOINTS)
    for module in checkpointed:
        setattr(module, "gradient_checkpointing", False)  # noqa: B010  # a name mypy cannot see on nn.Module
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)
        for module, mode in modes:
            module.training = mode
        for module in checkpointed:
            setattr(module, "gradient_checkpointing", True)  # noqa: B010


def differing_modules(in_training: fx.Graph, in_evaluation: fx.Graph) -> tuple[str, ...]:
    """Paths of the modules whose own operators differ between traces of a model in its two modes.

    Differences that `AnnotateModes` annotates, such as dropout and batch statistics, do not count.

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
