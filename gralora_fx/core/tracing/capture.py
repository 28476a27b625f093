"""Captures a live model as a graph for both modes, with transformers' exporter or PyTorch's, until it equals the model.

During the trace, patches replace what cannot be recorded: checkpoints, inference mode, loops, branches. Attention of a
decoder with a cache, and layers of features, become one node each.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from torch.export import _trace
from torch.nn.modules import transformer
from torch.utils import checkpoint
from transformers import PreTrainedModel

from gralora_fx.base.compat.torch_graphs import name_keywords, sizes_of_slices
from gralora_fx.base.compat.transformers_exporters import auto_dynamic_shapes, export_program
from gralora_fx.base.patches import patched_here
from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.graph.kept_calls import keeping_calls
from gralora_fx.core.graph.module_tree import module_stack
from gralora_fx.core.tracing.aliases import own_modules, without_traces
from gralora_fx.core.tracing.check import check, difference
from gralora_fx.core.tracing.draft import NO_CHECKPOINTS, Captured, Draft
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout, cache_layout
from gralora_fx.core.tracing.inputs.signature import own_inputs
from gralora_fx.core.tracing.normalize.clean import normalize
from gralora_fx.core.tracing.normalize.modes import mode_argument
from gralora_fx.core.tracing.size_guards import guards_of
from gralora_fx.core.tracing.training_check import all_trainable, can_compare, training_gaps
from gralora_fx.core.tracing.tried_sizes import with_limits
from gralora_fx.errors import TraceError, listed, marked, warn_caller
from gralora_fx.format.input_names import PAST


def capture(draft: Draft) -> Captured:
    """Export the draft's model in its current mode, and return the draft with the graph."""
    model, sample = draft.model, draft.sample
    name_keywords(name for name, _ in model.named_modules())
    name_keywords(name for name, _ in model.named_parameters())
    try:
        with (
            quiet(),
            all_trainable(model),
            sizes_of_slices(),
            keeping_calls(model, everything=draft.keeps_all) as kept,
            _as_traced(model),
            own_modules(model),
            without_traces(model),
            traceable_modes() as checkpoints,
        ):
            shapes = dynamic_axes(sample, draft.held) if draft.dynamic else None
            if isinstance(model, PreTrainedModel):
                program = _export_transformers_model(model, sample, shapes)
            else:
                # with gradients, so that regions without gradients are recorded
                with torch.enable_grad():
                    program = torch.export.export(model, (), dict(sample), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises errors of every type
        from gralora_fx.core.tracing.failures import reason, where

        raise TraceError(f"cannot trace {type(model).__name__}{where(model, error)}: {reason(error)}") from error
    if checkpoints:
        warn_caller(f"{NO_CHECKPOINTS} (checkpoints of {', '.join(dict.fromkeys(checkpoints))})")
    graph_module = program.module(check_guards=False)
    guards = guards_of(graph_module.graph)
    kept.write(graph_module)
    return Captured(
        **vars(draft), graph_module=graph_module, guards=guards, kept_calls=bool(kept.calls), lost=tuple(kept.lost)
    )


def _export_transformers_model(
    model: PreTrainedModel, inputs: Mapping[str, Any], shapes: dict[str, Any] | None
) -> torch.export.ExportedProgram:
    """Export a transformers model in its current mode, with a cache if given; without shapes, all axes are fixed."""
    own, forward = own_inputs(inputs), model.forward
    if "use_cache" in inspect.signature(forward).parameters:
        forward = functools.partial(forward, use_cache=PAST in inputs)
    with patch.object(model, "forward", forward), _steps(model, inputs):
        return export_program(model, own, shapes, dynamic=shapes is not None)


@contextmanager
def _as_traced(model: nn.Module) -> Iterator[None]:
    """Replace known code of a model by code that can be traced, and features' layers by operators, within the block."""
    with ExitStack() as changed:
        if has_own_code(model):
            from gralora_fx.base.features import parts
            from gralora_fx.core.tracing.known_code import IN_EVERY_MODEL, replaced

            for table in (IN_EVERY_MODEL, *parts("known code")):
                changed.enter_context(replaced(model, table))
        if any(isinstance(part, (nn.RNNBase, nn.MaxPool1d)) for part in model.modules()):
            from gralora_fx.core.tracing.any_length import AnyLength

            changed.enter_context(AnyLength())
        changed.enter_context(features_as_nodes(model))
        yield


@contextmanager
def features_as_nodes(model: nn.Module) -> Iterator[None]:
    """Let layers that features have operators for become one node each, within the block."""
    with ExitStack() as changed:
        if has_own_code(model):
            from gralora_fx.base.features import parts

            for patches in parts("trace patches"):
                changed.enter_context(patches(model))
        yield


def has_own_code(model: nn.Module) -> bool:
    """Return whether a model has modules of other classes than torch's."""
    return any(not type(part).__module__.startswith("torch.nn.") for part in model.modules())


@contextmanager
def _steps(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let a decoder's layers become one node each within the block, if the inputs are those of a step with a cache."""
    with ExitStack() as changed:
        if cache_layout(inputs) is CacheLayout.DECODER:
            from gralora_fx.base.features import parts
            from gralora_fx.core.tracing.decoder_operators import decoder_operators
            from gralora_fx.core.tracing.inputs.cache import attributes_of

            changed.enter_context(decoder_operators(model, inputs))
            for patches in parts("step patches", attributes_of(inputs[PAST])):
                changed.enter_context(patches())
        yield


def dynamic_axes(inputs: Mapping[str, Any], held: Collection[str] = ()) -> dict[str, Any]:
    """Return `dynamic_shapes` for `torch.export`: all axes vary, of caches batch and length, of `held` the batch."""
    shapes = auto_dynamic_shapes(inputs)
    shapes |= {name: {0: torch.export.Dim.AUTO} for name in held if name in shapes}
    if PAST in shapes:
        from gralora_fx.core.tracing.inputs.cached_steps import varying_axes

        varying = varying_axes(inputs)
        shapes |= {name: varying[name] for name in shapes if name in varying}
    return shapes


@contextmanager
def traceable_modes() -> Iterator[list[str]]:
    """Within the block, call checkpointed functions directly, and let inference mode only disable gradients.

    A trace would record a reentrant checkpoint as a forward without gradients, and inference mode not at all. A mask is
    not looked at for being causal, and a graph that fails is not printed.
    """
    used: list[str] = []
    around = checkpoint._checkpoint_without_reentrant_generator

    def note(function: Any) -> None:
        used.append(getattr(function, "__qualname__", type(function).__qualname__))

    def direct(_: type, function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        note(function)
        return function(*args)

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        note(function)
        return around(function, *args, **kwargs)

    def enter(mode: Any) -> None:
        mode._inference_mode_context = torch.is_grad_enabled()
        torch.set_grad_enabled(not mode.mode)

    def leave(mode: Any, *_: object) -> None:
        torch.set_grad_enabled(mode._inference_mode_context)

    with (
        patched_here(torch.inference_mode, "__enter__", enter),
        patched_here(torch.inference_mode, "__exit__", leave),
        patched_here(checkpoint.CheckpointFunction, "apply", direct),
        patched_here(checkpoint, "_checkpoint_without_reentrant_generator", noted),
        patched_here(transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: is_causal is True),
        patched_here(_trace, "print", lambda *_, **__: None),
    ):
        yield used


_SHOWN = 6  # names of modules in a message


def trace_both_modes(draft: Draft) -> Captured:
    """Return the draft with a graph for both modes, captured in training mode, where dropouts have their probability.

    If that fails, or differs from the model in evaluation mode, modules with a separate training branch, or else all,
    are traced in evaluation mode; a warning says what training then lacks.
    """
    return _trained_alike(draft, with_limits(_first_right(draft)))


def _trained_alike(draft: Draft, captured: Captured) -> Captured:
    """Return a capture that trains as the model does, or warn how it differs."""
    if can_compare(captured):
        gaps = training_gaps(captured)
    else:  # a transformers model's own functions have the gradients of their forward
        gaps = [] if isinstance(draft.model, PreTrainedModel) else list(captured.lost)
    if gaps and captured.lost:
        other = _first_right(dataclasses.replace(draft, keeps_all=True))
        if not can_compare(other) or not (gaps := training_gaps(other)):
            return with_limits(other)
    if gaps:
        lost = f" (the trace has not {listed(captured.lost)})" if captured.lost else ""
        warn_caller(
            f"training the trace of {type(draft.model).__name__} differs from training the model in "
            f"{listed(gaps, 5)}{lost}; compute such gradients in an autograd.Function of tensors, or by "
            "Tensor.register_hook in the forward, which a trace keeps"
        )
    return captured


def _first_right(draft: Draft) -> Captured:
    """Try training mode, then evaluation mode; return the first graph that equals the model in evaluation mode."""
    kind = type(draft.model).__name__
    trained, reason = _attempt_in_training(draft)
    if trained is not None and reason is None and not trained.updated:
        return trained
    evaluated = check(capture_in_mode(dataclasses.replace(draft, evaluates=True)))
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
        mixed, other_reason = _attempt_in_training(dataclasses.replace(draft, evaluated=paths))
        reason = f"{names_of_modules(draft.model, paths)} differs in training ({reason})"
        if mixed is not None and other_reason is None and mixed.updated == evaluated.updated:
            warn_caller(f"{reason}; that is not part of the trace, and training runs it as in evaluation")
            return mixed
    warn_caller(
        f"{kind} was traced in evaluation mode, so training runs without its attention dropout and noise: {reason}"
    )
    return evaluated


def _attempt_in_training(draft: Draft) -> tuple[Captured | None, str | None]:
    """Return a capture in training mode, or None, and how it fails or differs in evaluation mode, or None."""
    try:
        captured = check(capture_in_mode(draft))
    except TraceError as error:
        return None, marked(error)
    return captured, captured.problem


def capture_in_mode(draft: Draft) -> Captured:
    """Capture and normalize a model's graph in the draft's mode; this changes the model's own mode."""
    draft.model.train()
    kept = tuple(path for path, part in draft.model.named_modules(remove_duplicate=False) if not part.training)
    draft = dataclasses.replace(draft, kept=kept)
    draft.model.train(not draft.evaluates)
    for path in draft.evaluated:
        draft.model.get_submodule(path).training = False
    return normalize(capture(draft))


def differing_modules(in_training: fx.Graph, in_evaluation: fx.Graph) -> tuple[str, ...]:
    """Return paths of modules whose operators differ between traces in both modes, except annotated ones."""
    training, evaluation = _operators_by_module(in_training), _operators_by_module(in_evaluation)
    paths = dict.fromkeys([*training, *evaluation])
    return tuple(path for path in paths if training.get(path) != evaluation.get(path))


def names_of_modules(model: nn.Module, paths: Iterable[str]) -> str:
    """Return a readable list of modules: `blocks.0.noise (Noise), blocks.1.noise (Noise)`."""
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
    """Return an operator and its constants, which are equal in two traces of the same code."""
    if mode_argument(node) is not None:
        return str(node.target)
    constants = fx.map_arg((node.args, node.kwargs), lambda _: None)
    return str(node.target), str(constants)
