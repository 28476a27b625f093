"""`trace`: one entry for every kind of model, each ending in a clean graph over the model's own parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel

from gralora_fx.collection import fewer_collections
from gralora_fx.errors import TraceError, first_line, warn_caller
from gralora_fx.module_tree import ModuleTree
from gralora_fx.tracing.attention import padding_as_argument
from gralora_fx.tracing.check import difference, refuse_fixed_sizes, where
from gralora_fx.tracing.clean import without_guards
from gralora_fx.tracing.eager_modes import traceable_modes
from gralora_fx.tracing.leaves import inline_leaves
from gralora_fx.tracing.masks import without_empty_blocks
from gralora_fx.tracing.modes import draws_randomly, record_switches
from gralora_fx.tracing.namespace import restore_operators
from gralora_fx.tracing.quiet import quiet
from gralora_fx.tracing.samples import infer_task, inputs_for_task, keyword_inputs, widen
from gralora_fx.tracing.stand_ins import stand_ins, take_own
from gralora_fx.tracing.stochastic_depth import drop_paths_as_operators, without_layerdrop
from gralora_fx.tracing.traced import TracedModel
from gralora_fx.tracing.training_branches import differing_modules, names_of_modules, updated_buffers
from gralora_fx.tracing.transformers_export import dynamic_axes, export_transformers_model

_NO_CHECKPOINTS = "gradient checkpointing is not part of a trace; train with smaller batches instead"


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    task: str | None = None,
    dynamic: bool = True,
) -> TracedModel:
    """Trace a model to a `torch.fx` graph over its own parameters.

    The graph is checked against the eager model in evaluation mode on a padded sample before it is returned. A model
    on the meta device is traced as well; it has no values to check with.

    Args:
        model: A transformers model, any module, a `GraphModule` (symbolic or exported), or an `ExportedProgram`.
        example_inputs: Keyword arguments as a dict, or positional ones as a tuple. One row and one position will do:
            batch and sequence stay dynamic all the same, and a padding mask stays an input.
        task: One of optimum's task names; makes example inputs from the model's configuration where none are given.
        dynamic: Whether axes may vary; False fixes every size to the example's.

    Returns:
        The traced model, in the mode the model stands in.

    Raises:
        TraceError: The model cannot be traced (the message says where), or inputs are missing or do not fit.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return _from_program(model, example_inputs, task)
    if isinstance(model, fx.GraphModule):
        return _from_graph(model, example_inputs, task)
    if not isinstance(model, nn.Module):
        raise TraceError(f"cannot trace a {type(model).__name__}; give an nn.Module, GraphModule or ExportedProgram")
    if isinstance(model, PreTrainedModel):
        task = task or infer_task(model)
    with stand_ins(model) as own:
        if example_inputs is None:
            if not isinstance(model, PreTrainedModel):
                raise TraceError(f"example_inputs are missing; {type(model).__name__} is no transformers model to ask")
            example_inputs = inputs_for_task(model, task or "")
        if not isinstance(example_inputs, (Mapping, tuple)):
            raise TraceError(
                f"example_inputs are a {type(example_inputs).__name__}; give a dict or a tuple of arguments"
            )
        sample = keyword_inputs(model, example_inputs)
        sample = widen(model, sample) if dynamic else sample
        with fewer_collections():
            graph_module = _trace_both_modes(model, sample, dynamic)
        take_own(graph_module, own)
    config = getattr(model, "config", None) if isinstance(model, PreTrainedModel) else None
    traced = TracedModel(
        graph_module,
        tree=ModuleTree.of_module(model),
        example_inputs=sample,
        input_names=tuple(sample),
        task=task,
        config=config,
        generation_config=getattr(model, "generation_config", None) if config is not None else None,
        tokenizer_source=getattr(config, "_name_or_path", None) or None,
        loss_function=getattr(model, "loss_function", None) if config is not None else None,
        shift_labels=getattr(model, "prepare_decoder_input_ids_from_labels", None),
        training=True,
    )
    return traced.train(model.training)


def _trace_both_modes(model: nn.Module, sample: Mapping[str, Any], dynamic: bool) -> fx.GraphModule:
    """A graph that can stand in either mode: traced in training mode, where every dropout shows its probability.

    Where that cannot be, or does not equal the model in evaluation mode, the modules that have a branch of their own
    for training are traced in evaluation mode, or else the whole model is; a warning says what training then misses.
    """
    with _unchanged(model), without_layerdrop(model):
        in_training, reason = _training_trace(model, sample, dynamic)
        updated = () if in_training is None else updated_buffers(in_training)
        if in_training is not None and reason is None and not updated:
            return _with_free_sizes(model, in_training, sample, dynamic)
        model.eval()
        in_evaluation = _export(model, sample, dynamic)
        record_switches(in_evaluation.graph)
        found = difference(model, in_evaluation, sample)
        if found is not None:
            raise TraceError(f"the trace of {type(model).__name__} does not compute what the model does: {found}")
        paths = () if in_training is None else differing_modules(in_training.graph, in_evaluation.graph)
        if in_training is not None and reason is None and not paths:  # the model updates its buffers in either mode
            return _with_free_sizes(model, in_training, sample, dynamic)
        reason = reason or f"it updates {', '.join(updated)}"
        if paths:
            mixed, other_reason = _training_trace(model, sample, dynamic, evaluated=paths)
            reason = f"{names_of_modules(model, paths)} differs in training ({reason})"
            if mixed is not None and other_reason is None and updated_buffers(mixed) == updated_buffers(in_evaluation):
                warn_caller(f"{reason}; that is not part of the trace, and training runs it as in evaluation")
                return _with_free_sizes(model, mixed, sample, dynamic)
        warn_caller(
            f"{type(model).__name__} was traced in evaluation mode, so training runs without its attention dropout and "
            f"noise: {reason}"
        )
        return _with_free_sizes(model, in_evaluation, sample, dynamic)


def _training_trace(
    model: nn.Module, sample: Mapping[str, Any], dynamic: bool, *, evaluated: Collection[str] = ()
) -> tuple[fx.GraphModule | None, str | None]:
    """A trace in training mode, if there is one, and why it is not right in evaluation mode, if it is not.

    Args:
        model: The model; its mode changes.
        sample: Inputs by name.
        dynamic: Whether axes may vary.
        evaluated: Paths of modules that are in evaluation mode themselves.
    """
    model.train()
    for path in evaluated:
        model.get_submodule(path).training = False
    try:
        graph_module = _export(model, sample, dynamic)
        record_switches(graph_module.graph)
        if drawn := draws_randomly(graph_module.graph):
            return graph_module, f"it draws random numbers ({drawn})"
        return graph_module, difference(model, graph_module, sample)
    except TraceError as error:
        return None, str(error)


def _with_free_sizes(
    model: nn.Module, graph_module: fx.GraphModule, sample: Mapping[str, Any], dynamic: bool
) -> fx.GraphModule:
    """The graph, if it computes what the model does on other sizes too, where they may vary."""
    if dynamic:
        refuse_fixed_sizes(model, graph_module, sample)
    return graph_module


def _export(model: nn.Module, sample: Mapping[str, Any], dynamic: bool) -> fx.GraphModule:
    try:
        with quiet(), drop_paths_as_operators(model), traceable_modes() as checkpoints:
            if isinstance(model, PreTrainedModel):
                program = export_transformers_model(model, sample, dynamic=dynamic)
            else:
                shapes = dynamic_axes(dict(sample)) if dynamic else None
                program = torch.export.export(model, (), dict(sample), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises errors of every type
        raise TraceError(f"cannot trace {type(model).__name__}{where(model, error)}: {first_line(error)}") from error
    if checkpoints:
        warn_caller(f"{_NO_CHECKPOINTS} (checkpoints of {', '.join(dict.fromkeys(checkpoints))})")
    graph_module = without_guards(program.module(check_guards=False))
    restore_operators(graph_module.graph)
    without_empty_blocks(graph_module.graph)
    padding_as_argument(graph_module.graph)
    graph_module.recompile()
    return graph_module


def _from_program(
    program: torch.export.ExportedProgram, example_inputs: Mapping[str, Any] | tuple[Any, ...] | None, task: str | None
) -> TracedModel:
    args, kwargs = program.example_inputs or ((), {})
    graph_module = without_guards(program.module(check_guards=False))
    if example_inputs is None:
        example_inputs = kwargs if not args else (*args, *kwargs.values())
    return _from_graph(graph_module, example_inputs, task)


def _from_graph(
    graph_module: fx.GraphModule, example_inputs: Mapping[str, Any] | tuple[Any, ...] | None, task: str | None
) -> TracedModel:
    """Take a graph as it is: it is a trace already."""
    names = tuple(str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder")
    values = example_inputs or {}
    sample = dict(values) if isinstance(values, Mapping) else dict(zip(names, values, strict=False))
    clean = inline_leaves(without_guards(graph_module))
    is_training = record_switches(clean.graph) or (graph_module.training and not _is_exported(graph_module))
    tree = ModuleTree.of_module(graph_module)
    if len(tree.linear) == 0:
        tree = ModuleTree.of_graph(clean)
    call_names = _call_names(graph_module) or names
    unknown = [name for name in sample if name not in call_names]
    if unknown:
        raise TraceError(f"the graph takes {', '.join(call_names)}, not {', '.join(unknown)}; name its inputs")
    traced = TracedModel(
        clean, tree=tree, example_inputs=sample, input_names=call_names, task=task, training=is_training
    )
    return traced.train(is_training)


def _call_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Input names of the calling convention of an exported graph, nested inputs counted once."""
    info = getattr(graph_module.graph._codegen, "pytree_info", None)
    return tuple(info.orig_args) if info is not None else ()


def _is_exported(graph_module: fx.GraphModule) -> bool:
    return hasattr(graph_module.graph._codegen, "pytree_info")


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module and gradient checkpointing when the block ends."""
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
