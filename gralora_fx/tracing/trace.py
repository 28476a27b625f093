"""`trace`: the entry point for every kind of model, which returns a clean graph over the model's own parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from transformers import PreTrainedModel

from gralora_fx.errors import TraceError
from gralora_fx.graph.module_tree import ModuleTree
from gralora_fx.graph.out_of_reach import layers_of
from gralora_fx.progress.stages import gc_pause
from gralora_fx.sources.sentence_modules import SentenceModules
from gralora_fx.tracing.both_modes import trace_both_modes
from gralora_fx.tracing.check import fillable_inputs
from gralora_fx.tracing.draft import Axes, Draft
from gralora_fx.tracing.image_trace import trace_images
from gralora_fx.tracing.inputs.arguments import (
    Arguments,
    configured_cache,
    example_arguments,
    forward_with,
    named_arguments,
    split_constants,
)
from gralora_fx.tracing.inputs.cache import PAST
from gralora_fx.tracing.inputs.image_sizes import ImageSize
from gralora_fx.tracing.inputs.input_trees import fixed_axes
from gralora_fx.tracing.inputs.samples import check_head, infer_task, inputs_for_task
from gralora_fx.tracing.inputs.signature import signature_of
from gralora_fx.tracing.inputs.sizes import at_image_size, distinct, takes_images, widen
from gralora_fx.tracing.patches.meta_parameters import placeholder_parameters, restore_parameters
from gralora_fx.tracing.ready_graphs import trace_ready_graph, tree_of
from gralora_fx.tracing.sentence_encoder import followed_by, sentence_modules_of
from gralora_fx.tracing.traced_model import TracedModel


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
    if isinstance(model, (fx.GraphModule, torch.export.ExportedProgram)):
        if image_size is not None:
            raise TraceError(
                "image_size has no effect on a graph, which was traced for the sizes that it takes; leave it out"
            )
        draft = trace_ready_graph(model, arguments, task)
        return _with_layers(draft, tree_of(draft), training=not draft.evaluates)
    if isinstance(model, TracedModel) or isinstance(getattr(model, "traced", None), TracedModel):
        raise TraceError(
            f"the {type(model).__name__} is traced already; trace its source model again, or use it as it is"
        )
    if not isinstance(model, nn.Module):
        raise TraceError(f"cannot trace a {type(model).__name__}; give an nn.Module, GraphModule or ExportedProgram")
    if isinstance(model, PreTrainedModel):
        task = task or infer_task(model)
        check_head(model, task)
    with ExitStack() as patches:
        patches.enter_context(followed_by(model, sentence))
        originals = patches.enter_context(placeholder_parameters(model))
        draft = _with_inputs(model, arguments, task, image_size, sentence, dynamic=dynamic)
        forward = forward_with(model, tuple(draft.sample), draft.constants)
        patches.enter_context(patch.object(model, "forward", forward))
        patches.enter_context(configured_cache(model, use_cache=PAST in draft.sample))
        with gc_pause():
            draft = trace_images(draft, trace_both_modes) if takes_images(draft.sample) else trace_both_modes(draft)
        draft = _with_call_signature(draft)
        restore_parameters(draft.captured, originals)
    return _with_layers(draft, ModuleTree.of_module(model), training=model.training)


def _with_inputs(
    model: nn.Module,
    arguments: Arguments | None,
    task: str | None,
    image_size: ImageSize,
    sentence: SentenceModules | None,
    *,
    dynamic: bool,
) -> Draft:
    """The first draft of a live module: the inputs to capture it from, and how it is called."""
    if arguments is None:
        if not isinstance(model, PreTrainedModel):
            raise TraceError(
                f"example_inputs are missing; {type(model).__name__} is not a transformers model, so give them"
            )
        arguments = (), inputs_for_task(model, task or "")
    tensors, constants = split_constants(model, named_arguments(model, *arguments))
    tensors, constants = at_image_size(model, tensors, constants, image_size)
    sample = distinct(widen(model, tensors) if dynamic else tensors)
    return Draft(
        model=model,
        sample=sample,
        constants=constants,
        signature=signature_of(model, sample, constants, has_cache=PAST in sample),
        task=task,
        sentence=sentence,
        image_size=image_size,
        axes=Axes.SEQUENCES if dynamic else Axes.NONE,
    )


def _with_call_signature(draft: Draft) -> Draft:
    """The draft with what its graph shows of the inputs: which may be left out, and which sizes are fixed."""
    fillable, counts_padding = fillable_inputs(draft.model, draft.sample, draft.signature.may_be_left_out)
    signature = dataclasses.replace(
        draft.signature,
        fillable=fillable,
        counts_padding=counts_padding,
        dynamic=draft.axes is not Axes.NONE,
        fixed=fixed_axes(draft.captured.graph, draft.sample),
        image_sizes=draft.image_sizes,
    )
    return dataclasses.replace(draft, signature=signature)


def _with_layers(draft: Draft, tree: ModuleTree, *, training: bool) -> TracedModel:
    """The last stage: the linear layers of a checked graph, and what the source model says beside it."""
    model = draft.model
    config = getattr(model, "config", None) if isinstance(model, PreTrainedModel) else None
    traced = TracedModel(
        draft.captured,
        tree=tree,
        example_inputs={**draft.sample, **draft.constants},
        signature=draft.signature,
        **layers_of(draft.captured, tree)._asdict(),
        task=draft.task,
        config=config,
        generation_config=getattr(model, "generation_config", None) if config is not None else None,
        tokenizer_source=getattr(config, "_name_or_path", None) or None,
        loss_function=getattr(model, "loss_function", None) if config is not None else None,
        shift_labels=getattr(model, "prepare_decoder_input_ids_from_labels", None),
        sentence=draft.sentence,
        passes=draft.passes,
    )
    return traced.train(training)
