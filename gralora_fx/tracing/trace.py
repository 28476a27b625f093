"""`trace`: the entry point for every kind of model, which returns a clean graph over the model's own parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from transformers import PreTrainedModel

from gralora_fx.errors import TraceError, warn_caller
from gralora_fx.graph.module_tree import ModuleTree
from gralora_fx.operators.call import restore_aten
from gralora_fx.progress.stages import gc_pause, quiet
from gralora_fx.sources.sentence_modules import SentenceModules
from gralora_fx.tracing.capture import Axes, dynamic_axes, export_transformers_model
from gralora_fx.tracing.check import check_dynamic_sizes, difference, fillable_inputs
from gralora_fx.tracing.failures import reason as reason_of
from gralora_fx.tracing.failures import where, where_defined
from gralora_fx.tracing.image_trace import at_image_size, trace_sizes
from gralora_fx.tracing.inputs.arguments import (
    configured_cache,
    example_arguments,
    forward_with,
    named_arguments,
    split_constants,
)
from gralora_fx.tracing.inputs.decoder_cache import PAST
from gralora_fx.tracing.inputs.image_sizes import ImageSize
from gralora_fx.tracing.inputs.input_trees import distinct, fixed_axes
from gralora_fx.tracing.inputs.samples import check_head, infer_task, inputs_for_task, widen
from gralora_fx.tracing.inputs.signature import signature_of
from gralora_fx.tracing.normalize.clean import without_guards
from gralora_fx.tracing.normalize.masks import padding_as_argument, without_empty_blocks
from gralora_fx.tracing.normalize.modes import annotate_mode_args, find_rng_op
from gralora_fx.tracing.normalize.training_branches import differing_modules, names_of_modules, updated_buffers
from gralora_fx.tracing.patches.meta_parameters import placeholder_parameters, restore_parameters
from gralora_fx.tracing.patches.recognised import IN_EVERY_MODEL, replaced
from gralora_fx.tracing.patches.traceable import experts_as_products, traceable_modes, without_layerdrop
from gralora_fx.tracing.ready_graphs import trace_graph, trace_program
from gralora_fx.tracing.sentence_encoder import drop_unread, followed_by, sentence_modules_of
from gralora_fx.tracing.traced_model import TracedModel

_NO_CHECKPOINTS = "gradient checkpointing is not part of a trace; train with smaller batches instead"


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    task: str | None = None,
    dynamic: bool = True,
    sentence_modules: str | Path | None = None,
    image_size: ImageSize = None,
) -> TracedModel:
    """Trace a model to a `torch.fx` graph over its own parameters.

    The graph is compared with the eager model in evaluation mode on a padded sample before it is returned. A model on
    the meta device can be traced too, but has no values to compare.

    Args:
        model: A transformers model, any module, a `GraphModule` (symbolic or exported), or an `ExportedProgram`.
        example_inputs: Keyword arguments as a dict, or positional ones as a tuple. Tensors, and lists, tuples, dicts
            and dataclasses of them, become inputs; every other argument, given or not, becomes part of the graph with
            its value, and a call with another value is refused. One row and one position are enough: batch and sequence
            stay dynamic nevertheless, and a padding mask stays an input.
        kwargs: Keyword arguments beside a tuple, as in `torch.export.export(model, args, kwargs)`.
        task: One of optimum's task names; example inputs are generated from the model's configuration if none are
            given.
        dynamic: Whether axes may vary; False fixes every size to the example's.
        sentence_modules: For `task="sentence-similarity"`: a directory or hub id whose `modules.json` says what follows
            the transformer, such as that of an adapter; None for where the model was loaded from.
        image_size: For a model that takes images: a height and a width to trace with, or `"dynamic"` for images of any
            size. A model with a table of positions then interpolates it (`interpolate_pos_encoding`). None: of any size
            if the model takes them as it is called, else of the example's (see `signature.image_sizes`).

    Returns:
        The traced model, in the model's mode.

    Raises:
        TraceError: The model cannot be traced (the message says where), not for images of any size though that was
            asked for, or inputs are missing or do not fit.
    """
    arguments = None if example_inputs is None and kwargs is None else example_arguments(example_inputs, kwargs)
    sentence = sentence_modules_of(model, task, sentence_modules)
    if image_size is not None and isinstance(model, (torch.export.ExportedProgram, fx.GraphModule)):
        raise TraceError(
            "image_size has no effect on a graph, which was traced for the sizes that it takes; leave it out"
        )
    if isinstance(model, torch.export.ExportedProgram):
        return trace_program(model, arguments, task)
    if isinstance(model, fx.GraphModule):
        return trace_graph(model, arguments, task)
    if isinstance(model, TracedModel) or isinstance(getattr(model, "traced", None), TracedModel):
        raise TraceError(
            f"the {type(model).__name__} is traced already; trace its source model again, or use it as it is"
        )
    if not isinstance(model, nn.Module):
        raise TraceError(f"cannot trace a {type(model).__name__}; give an nn.Module, GraphModule or ExportedProgram")
    if isinstance(model, PreTrainedModel):
        task = task or infer_task(model)
        check_head(model, task)
    with followed_by(model, sentence):
        return _traced(model, arguments, task, dynamic, sentence, image_size)


def _traced(
    model: nn.Module,
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None,
    task: str | None,
    dynamic: bool,
    sentence: SentenceModules | None,
    image_size: ImageSize,
) -> TracedModel:
    """The trace of a live module, as it is called now."""
    with placeholder_parameters(model) as originals:
        if arguments is None:
            if not isinstance(model, PreTrainedModel):
                raise TraceError(
                    f"example_inputs are missing; {type(model).__name__} is not a transformers model, so give them"
                )
            arguments = (), inputs_for_task(model, task or "")
        tensors, constants = split_constants(model, named_arguments(model, *arguments))
        tensors, constants = at_image_size(model, tensors, constants, image_size)
        sample = distinct(widen(model, tensors) if dynamic else tensors)
        signature = signature_of(model, sample, constants, has_cache=PAST in sample)
        with (
            patch.object(model, "forward", forward_with(model, tuple(sample), constants)),
            configured_cache(model, use_cache=PAST in sample),
        ):
            with gc_pause():
                graph_module, sample, image_sizes = trace_sizes(
                    model, sample, constants, image_size, dynamic=dynamic, capture=partial(_trace_both_modes, model)
                )
            fillable, counts_padding = fillable_inputs(model, sample, signature.may_be_left_out)
        restore_parameters(graph_module, originals)
    config = getattr(model, "config", None) if isinstance(model, PreTrainedModel) else None
    traced = TracedModel(
        graph_module,
        tree=ModuleTree.of_module(model),
        example_inputs={**sample, **constants},
        signature=dataclasses.replace(
            signature,
            fillable=fillable,
            counts_padding=counts_padding,
            dynamic=dynamic,
            fixed=fixed_axes(graph_module.graph, sample),
            image_sizes=image_sizes,
        ),
        task=task,
        config=config,
        generation_config=getattr(model, "generation_config", None) if config is not None else None,
        tokenizer_source=getattr(config, "_name_or_path", None) or None,
        loss_function=getattr(model, "loss_function", None) if config is not None else None,
        shift_labels=getattr(model, "prepare_decoder_input_ids_from_labels", None),
        training=True,
        sentence=sentence,
    )
    return traced.train(model.training)


def _trace_both_modes(model: nn.Module, sample: Mapping[str, Any], axes: Axes) -> fx.GraphModule:
    """Trace a graph for both modes: in training mode, where every dropout has its probability.

    If that fails, or differs from the model in evaluation mode, the modules with a separate training branch are traced
    in evaluation mode, or else the whole model; a warning says what training then lacks.
    """
    with _unchanged(model), without_layerdrop(model):
        in_training, reason = _training_trace(model, sample, axes)
        updated = () if in_training is None else updated_buffers(in_training)
        if in_training is not None and reason is None and not updated:
            return _with_free_sizes(model, in_training, sample, axes)
        model.eval()
        in_evaluation = _export(model, sample, axes)
        annotate_mode_args(in_evaluation.graph, in_training=False)
        problem = difference(model, in_evaluation, sample)
        if problem is not None:
            raise TraceError(
                f"the trace of {type(model).__name__} differs from the model: {problem}; check what the "
                f"forward{where_defined(model)} does outside PyTorch or at random"
            )
        paths = () if in_training is None else differing_modules(in_training.graph, in_evaluation.graph)
        if in_training is not None and reason is None and not paths:  # the model updates its buffers in both modes
            return _with_free_sizes(model, in_training, sample, axes)
        reason = reason or f"it updates {', '.join(updated)}"
        if rng_op := find_rng_op(in_evaluation.graph):
            reason = f"it draws random numbers in evaluation too ({rng_op})"
            if in_training is not None and not paths and difference(model, in_training, sample) is None:
                warn_caller(f"{type(model).__name__} and its trace give other values in every run: {reason}")
                return _with_free_sizes(model, in_training, sample, axes)
        if paths:
            mixed, other_reason = _training_trace(model, sample, axes, evaluated=paths)
            reason = f"{names_of_modules(model, paths)} differs in training ({reason})"
            if mixed is not None and other_reason is None and updated_buffers(mixed) == updated_buffers(in_evaluation):
                warn_caller(f"{reason}; that is not part of the trace, and training runs it as in evaluation")
                return _with_free_sizes(model, mixed, sample, axes)
        warn_caller(
            f"{type(model).__name__} was traced in evaluation mode, so training runs without its attention dropout and "
            f"noise: {reason}"
        )
        return _with_free_sizes(model, in_evaluation, sample, axes)


def _training_trace(
    model: nn.Module, sample: Mapping[str, Any], axes: Axes, *, evaluated: Collection[str] = ()
) -> tuple[fx.GraphModule | None, str | None]:
    """A trace in training mode, or None, and why it is wrong in evaluation mode, or None.

    Args:
        model: The model; its mode changes.
        sample: Inputs by name.
        axes: Which axes may vary.
        evaluated: Paths of modules to put into evaluation mode.
    """
    model.train()
    for path in evaluated:
        model.get_submodule(path).training = False
    try:
        graph_module = _export(model, sample, axes)
        annotate_mode_args(graph_module.graph)
        if rng_op := find_rng_op(graph_module.graph):
            return graph_module, f"it draws random numbers ({rng_op})"
        return graph_module, difference(model, graph_module, sample)
    except TraceError as error:
        return None, str(error)


def _with_free_sizes(
    model: nn.Module, graph_module: fx.GraphModule, sample: Mapping[str, Any], axes: Axes
) -> fx.GraphModule:
    """The graph, after checking that it equals the model on other sizes too, if they may vary."""
    if axes is not Axes.NONE:
        check_dynamic_sizes(model, graph_module, sample)
    return graph_module


def _export(model: nn.Module, sample: Mapping[str, Any], axes: Axes) -> fx.GraphModule:
    try:
        with (
            quiet(),
            replaced(model, IN_EVERY_MODEL),
            experts_as_products(model),
            traceable_modes() as checkpoints,
        ):
            if isinstance(model, PreTrainedModel):
                program = export_transformers_model(model, sample, axes)
            else:
                shapes = dynamic_axes(sample, axes)
                with torch.enable_grad():  # so that regions without gradients are recorded
                    program = torch.export.export(model, (), dict(sample), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises errors of every type
        raise TraceError(f"cannot trace {type(model).__name__}{where(model, error)}: {reason_of(error)}") from error
    if checkpoints:
        warn_caller(f"{_NO_CHECKPOINTS} (checkpoints of {', '.join(dict.fromkeys(checkpoints))})")
    graph_module = without_guards(program.module(check_guards=False))
    restore_aten(graph_module.graph)
    without_empty_blocks(graph_module.graph)
    padding_as_argument(graph_module.graph)
    drop_unread(model, graph_module.graph)
    graph_module.recompile()
    return graph_module


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore modes, buffers and gradient checkpointing when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    if checkpointed:
        warn_caller(_NO_CHECKPOINTS)
    for module in checkpointed:
        setattr(module, "gradient_checkpointing", False)  # noqa: B010  # a name mypy cannot see on nn.Module
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
        for module in checkpointed:
            setattr(module, "gradient_checkpointing", True)  # noqa: B010
