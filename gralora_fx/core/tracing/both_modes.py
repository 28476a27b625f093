"""A graph for both modes of a model: attempts to capture, normalize and check it, until one is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

from torch import fx, nn

from gralora_fx.core.graph.module_tree import module_stack
from gralora_fx.core.tracing.capture import capture
from gralora_fx.core.tracing.check import check, check_other_sizes, difference
from gralora_fx.core.tracing.draft import Captured, Draft
from gralora_fx.core.tracing.normalize.clean import normalize
from gralora_fx.core.tracing.normalize.modes import mode_argument
from gralora_fx.errors import TraceError, marked, warn_caller

_SHOWN = 6  # names of modules in a message


def trace_both_modes(draft: Draft) -> Captured:
    """The draft with a graph for both modes: captured in training mode, where every dropout has its probability.

    If that fails, or differs from the model in evaluation mode, the modules with a separate training branch are traced
    in evaluation mode, or else the whole model; a warning says what training then lacks.
    """
    captured = _first_right(draft)
    check_other_sizes(captured)
    return captured


def _first_right(draft: Draft) -> Captured:
    """The first graph that equals the model in evaluation mode."""
    kind = type(draft.model).__name__
    trained, reason = _in_training(draft)
    if trained is not None and reason is None and not trained.updated:
        return trained
    evaluated = _attempt(dataclasses.replace(draft, evaluates=True))
    if evaluated.problem is not None:
        from gralora_fx.core.tracing.failures import where_defined

        raise TraceError(
            f"the trace of {kind} differs from the model: {evaluated.problem}; check what the "
            f"forward{where_defined(draft.model)} does outside PyTorch or at random"
        )
    paths: tuple[str, ...] = ()
    if trained is not None:
        paths = differing_modules(trained.graph_module.graph, evaluated.graph_module.graph)
        if reason is None and not paths:  # the model updates its buffers in both modes
            return trained
        reason = reason or f"it updates {', '.join(trained.updated)}"
    if evaluated.drawn is not None:
        reason = f"it draws random numbers in evaluation too ({evaluated.drawn})"
        if trained is not None and not paths and difference(trained) is None:
            warn_caller(f"{kind} and its trace give other values in every run: {reason}")
            return trained
    if paths:
        mixed, other_reason = _in_training(draft, evaluated=paths)
        reason = f"{names_of_modules(draft.model, paths)} differs in training ({reason})"
        if mixed is not None and other_reason is None and mixed.updated == evaluated.updated:
            warn_caller(f"{reason}; that is not part of the trace, and training runs it as in evaluation")
            return mixed
    warn_caller(
        f"{kind} was traced in evaluation mode, so training runs without its attention dropout and noise: {reason}"
    )
    return evaluated


def _in_training(draft: Draft, *, evaluated: Collection[str] = ()) -> tuple[Captured | None, str | None]:
    """An attempt in training mode, or None, and why it is wrong in evaluation mode, or None."""
    try:
        captured = _attempt(draft, evaluated=evaluated)
    except TraceError as error:
        return None, marked(error)
    return captured, captured.problem


def _attempt(draft: Draft, *, evaluated: Collection[str] = ()) -> Captured:
    """Capture, normalize and check a model's graph in the draft's mode; the model's own mode changes."""
    draft.model.train(not draft.evaluates)
    for path in evaluated:
        draft.model.get_submodule(path).training = False
    return check(normalize(capture(draft)))


def differing_modules(in_training: fx.Graph, in_evaluation: fx.Graph) -> tuple[str, ...]:
    """Paths of the modules whose own operators differ between traces of a model in its two modes.

    Differences that `AnnotateModes` annotates, such as dropout and batch statistics, do not count.
    """
    training, evaluation = _operators_by_module(in_training), _operators_by_module(in_evaluation)
    paths = dict.fromkeys([*training, *evaluation])
    return tuple(path for path in paths if training.get(path) != evaluation.get(path))


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
