"""`trace`: one entry for every kind of model, each ending in a clean graph over the model's own parameters."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from gralora_fx.errors import TraceError
from gralora_fx.module_tree import ModuleTree
from gralora_fx.tracing.clean import inline_linear_modules, without_guards
from gralora_fx.tracing.modes import record_switches, set_mode
from gralora_fx.tracing.quiet import quiet
from gralora_fx.tracing.samples import infer_task, inputs_for_task, keyword_inputs, widen
from gralora_fx.tracing.traced import TracedModel
from gralora_fx.tracing.transformers_export import dynamic_axes, export_transformers_model

# Largest difference from the eager model, relative to its largest output, by the dtype of that output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    task: str | None = None,
    dynamic: bool = True,
) -> TracedModel:
    """Trace a model to a `torch.fx` graph over its own parameters.

    The graph is checked against the eager model in evaluation mode on a padded sample before it is returned.

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
    if example_inputs is None:
        if not isinstance(model, PreTrainedModel):
            raise TraceError(f"example_inputs are missing; {type(model).__name__} is no transformers model to ask")
        example_inputs = inputs_for_task(model, task or "")
    sample = keyword_inputs(model, example_inputs)
    sample = widen(model, sample) if dynamic else sample
    graph_module = _trace_both_modes(model, sample, dynamic)
    config = getattr(model, "config", None) if isinstance(model, PreTrainedModel) else None
    traced = TracedModel(
        graph_module,
        tree=ModuleTree.of_module(model),
        example_inputs=sample,
        input_names=tuple(sample),
        task=task,
        config=config,
        tokenizer_source=getattr(config, "_name_or_path", None) or None,
        loss_function=getattr(model, "loss_function", None) if config is not None else None,
        training=True,
    )
    return traced.train(model.training)


def _trace_both_modes(model: nn.Module, sample: Mapping[str, Any], dynamic: bool) -> fx.GraphModule:
    """A graph that can stand in either mode: traced in training mode, where every dropout shows its probability.

    Where that cannot be, or does not equal the model in evaluation mode, the evaluation trace is taken and a warning
    says what training with it misses.
    """
    with _unchanged(model):
        try:
            model.train()
            with _without_random_depth(model):
                graph_module = _export(model, sample, dynamic)
            record_switches(graph_module.graph)
            reason = _difference(model, graph_module, sample)
        except TraceError as error:
            reason = str(error)
        if reason is None:
            return graph_module
        model.eval()
        graph_module = _export(model, sample, dynamic)
        record_switches(graph_module.graph)
        difference = _difference(model, graph_module, sample)
        if difference is not None:
            raise TraceError(f"the trace of {type(model).__name__} does not compute what the model does: {difference}")
        warnings.warn(
            f"{type(model).__name__} was traced in evaluation mode, so training runs without its attention dropout: "
            f"{reason}",
            stacklevel=4,
        )
        return graph_module


def _export(model: nn.Module, sample: Mapping[str, Any], dynamic: bool) -> fx.GraphModule:
    try:
        with quiet():
            if isinstance(model, PreTrainedModel):
                program = export_transformers_model(model, sample, dynamic=dynamic)
            else:
                shapes = dynamic_axes(dict(sample)) if dynamic else None
                program = torch.export.export(model, (), dict(sample), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises errors of every type
        raise TraceError(f"cannot trace {type(model).__name__}{_where(model, error)}: {_first_line(error)}") from error
    return without_guards(program.module(check_guards=False))


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
    clean = inline_linear_modules(without_guards(graph_module))
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


def _difference(model: nn.Module, graph_module: fx.GraphModule, sample: Mapping[str, Any]) -> str | None:
    """How the graph differs from the eager model in evaluation mode, or None where it does not."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    set_mode(graph_module.graph, False)
    graph_module.recompile()
    try:
        with torch.no_grad(), quiet():
            expected = tree_leaves(_call_eager(model, sample))
            actual = tree_leaves(graph_module(**sample))
    finally:
        for module, mode in modes:
            module.training = mode
    expected, actual = ([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] for leaves in (expected, actual))
    if len(expected) != len(actual):
        return f"it returns {len(actual)} tensors, the model {len(expected)}"
    for index, (want, got) in enumerate(zip(expected, actual, strict=True)):
        if want.shape != got.shape:
            return f"output {index} has shape {tuple(got.shape)}, the model's {tuple(want.shape)}"
        if not want.numel() or not want.is_floating_point():
            continue
        largest = want.abs().nan_to_num().max().item()
        error = (want - got).abs().nan_to_num().max().item()
        if error > _TOLERANCE.get(want.dtype, 1e-4) * max(largest, 1e-6):
            return f"output {index} differs by {error:.3g} where the largest value is {largest:.3g}"
    return None


def _call_eager(model: nn.Module, sample: Mapping[str, Any]) -> Any:
    inputs = dict(sample)
    if isinstance(model, PreTrainedModel) and "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return model(**inputs)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module and gradient checkpointing when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    if checkpointed:
        warnings.warn("gradient checkpointing is not part of a trace; train with smaller batches instead", stacklevel=5)
    for module in checkpointed:
        setattr(module, "gradient_checkpointing", False)  # noqa: B010  # a name mypy cannot see on nn.Module
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module in checkpointed:
            setattr(module, "gradient_checkpointing", True)  # noqa: B010


@contextmanager
def _without_random_depth(model: nn.Module) -> Iterator[None]:
    """Set layerdrop and stochastic depth to zero: which layers a step drops is no part of a graph."""
    changed: list[tuple[Any, str, float]] = []
    holders: list[Any] = [*model.modules(), getattr(model, "config", None)]
    for holder in holders:
        drops_paths = type(holder).__name__.endswith("DropPath")
        for name in ("drop_prob",) if drops_paths else ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            value = getattr(holder, name, None)
            if isinstance(value, float) and value > 0:
                changed.append((holder, name, value))
                setattr(holder, name, 0.0)
    if changed:
        warnings.warn(
            "layerdrop and stochastic depth are not part of a trace; training runs every layer in every step",
            stacklevel=6,
        )
    try:
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


def _where(model: nn.Module, error: BaseException) -> str:
    """The innermost module and line of the model that an error passed through."""
    paths = {id(module): path or "the root module" for path, module in model.named_modules()}
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths and frame.f_code.co_name != "_wrapped_call_impl":
            file = frame.f_code.co_filename
            if "/torch/" not in file:
                place = f" at {paths[id(owner)]} ({file.rsplit('/', 1)[-1]}:{line})"
    return place


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
