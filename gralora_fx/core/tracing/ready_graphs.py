"""Graphs traced by other means: symbolic traces and exported programs, which are checked or captured again."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import (
    HigherOrderOperator,
    OpOverload,
    saved_guards,
    sizes_of_slices,
    tree_info,
)
from gralora_fx.base.features import parts
from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.core.graph.pipeline import Pass, PassLog
from gralora_fx.core.graph.surgery import placeholder_parameters, restore_parameters
from gralora_fx.core.tracing.capture import dynamic_axes
from gralora_fx.core.tracing.check import fixed_axes
from gralora_fx.core.tracing.draft import Captured
from gralora_fx.core.tracing.inputs.arguments import Arguments, check_leaves
from gralora_fx.core.tracing.inputs.input_trees import leaf_paths
from gralora_fx.core.tracing.inputs.signature import CallSignature, own_inputs
from gralora_fx.core.tracing.normalize.clean import (
    cleaning_passes,
    inlining_passes,
    normalized,
    restore_aten,
    run_passes,
)
from gralora_fx.core.tracing.normalize.inline import inline_leaves
from gralora_fx.core.tracing.normalize.modes import AnnotateModes, is_in_training
from gralora_fx.core.tracing.size_guards import recorded_limits
from gralora_fx.errors import TraceError, first_line
from gralora_fx.format.size_limits import SizeLimit

_CONTROL_FLOW = {"cond", "scan"}  # control flow with an ONNX form
_SCALARS = {"_operator", "math", "torch"}  # modules of the functions that compute sizes
_PREFIX = "graph_module."


def trace_ready_graph(
    model: fx.GraphModule | torch.export.ExportedProgram, arguments: Arguments | None, task: str | None
) -> Captured:
    """Return the draft of a given graph: an exported program, or an exported or symbolic `GraphModule`."""
    exported_with: Any = None
    if isinstance(model, fx.GraphModule):
        graph_module = model
    else:
        graph_module, exported_with = model.module(check_guards=False), model.example_inputs
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    is_exported = tree_info(graph_module.graph) is not None
    names = _call_names(graph_module) if is_exported else tuple(str(node.target) for node in placeholders)
    optional = frozenset(str(node.target) for node in placeholders if node.args)
    arguments = exported_with if arguments is None else arguments
    sample = {} if arguments is None else _named(names, optional, *arguments)
    signature = CallSignature(inputs=names, positional=names, optional=optional, has_form=is_exported)
    draft = Captured(graph_module, sample, signature, task=task, graph_module=graph_module)
    cleaning = cleaning_passes(graph_module)
    passes: tuple[Pass[fx.Graph], ...] = (*cleaning, restore_aten, inline_leaves, *inlining_passes(), AnnotateModes())
    draft = run_passes(draft, passes)
    if exported_with is not None:  # tensors that its graph does not read are left out
        draft = dataclasses.replace(draft, model=draft.graph_module)
        _check_distinct(draft.graph_module, *exported_with)
    fixed = fixed_axes(draft.graph_module.graph, sample) if is_exported else {}
    is_dynamic = not fixed or any(size is None for sizes in fixed.values() for size in sizes)
    is_training = is_in_training(draft.graph_module.graph) or (graph_module.training and not is_exported)
    if sample:
        _check_example(draft.graph_module, sample)
    limits: tuple[SizeLimit, ...] = ()
    if is_exported:
        limits = recorded_limits(graph_module.graph, sample, saved_guards(model))
    signature = dataclasses.replace(signature, fixed=fixed, dynamic=is_dynamic, limits=limits)
    return dataclasses.replace(draft, signature=signature, evaluates=not is_training)


def tree_of(draft: Captured) -> ModuleTree:
    """Return the modules in a graph module and those recorded in its nodes."""
    tree, noted = ModuleTree.of_module(draft.model), ModuleTree.of_graph(draft.graph_module)
    if not tree.linear:
        return noted
    # a layer with its own forward, which a symbolic trace goes into, is only recorded in the nodes
    kinds = {path: noted.types[path] for path in noted.linear if path in tree.types}
    return dataclasses.replace(tree, types={**tree.types, **kinds}, linear=tree.linear | kinds.keys())


def _check_distinct(graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise if a program was exported with one tensor for several inputs."""
    inputs = {**dict(zip(_call_names(graph_module), args, strict=False)), **kwargs}
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    seen: dict[int, tuple[str, bool]] = {}
    for (path, leaf), node in zip(leaf_paths(inputs), placeholders, strict=False):
        other, is_read = seen.setdefault(id(leaf), (path, bool(node.users)))
        if isinstance(leaf, Tensor) and other != path and not (is_read and node.users):
            raise TraceError(
                f"the program was exported with one tensor for {other!r} and {path!r}, so it reads one of them for "
                "both; export it again with a tensor for each"
            )


def _named(
    names: tuple[str, ...], optional: Collection[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return example inputs by name, in the graph's order."""
    takes = f"the graph takes {', '.join(names)}"
    if len(args) > len(names):
        raise TraceError(f"{takes}, but {len(args)} example inputs are given by position; give one for each")
    sample = dict(zip(names, args, strict=False))
    unknown = [name for name in kwargs if name not in names]
    if unknown:
        raise TraceError(f"{takes}, not {', '.join(unknown)}; name its inputs")
    twice = [name for name in kwargs if name in sample]
    if twice:
        raise TraceError(f"example input {twice[0]!r} is given twice, by position and by name")
    sample |= kwargs
    missing = [name for name in names if name not in sample and name not in optional]
    if missing:
        raise TraceError(f"{takes}, but the example inputs lack {', '.join(missing)}; give every input")
    check_leaves(sample)
    return {name: sample[name] for name in names if name in sample}


def _call_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Return the input names of an exported graph's calling convention; a nested input counts once."""
    return tuple(tree_info(graph_module.graph).orig_args)


def is_operator_graph(graph: fx.Graph) -> bool:
    """Return whether a graph consists of PyTorch's operators with traced values, and has dynamic axes."""
    nodes = list(graph.nodes)
    inputs = [value for node in nodes if node.op == "placeholder" and isinstance(value := node.meta.get("val"), Tensor)]
    varies = any(isinstance(size, torch.SymInt) for value in inputs for size in value.shape)
    return varies and all(_is_known(node) for node in nodes)


def _is_known(node: fx.Node) -> bool:
    if node.op in ("get_attr", "output"):
        return True
    if node.op == "placeholder":
        return "val" in node.meta or not node.users
    if node.op != "call_function" or "val" not in node.meta:
        return False
    if isinstance(node.target, HigherOrderOperator):
        return str(node.target) in _CONTROL_FLOW
    module = getattr(node.target, "__module__", "")
    return isinstance(node.target, OpOverload) or node.target is operator.getitem or module in _SCALARS


def recapture(graph_module: fx.GraphModule, inputs: Mapping[str, Any], *, dynamic: bool = True) -> fx.GraphModule:
    """Capture a graph again by running it, with dynamic axes where possible.

    Before: `x = input.flatten(1); y = self.act(torch.nn.functional.linear(x, w))`
    After:  `x = aten.flatten(input, 1); y = aten.relu(aten.linear(x, w))`
    """
    from gralora_fx.core.tracing.any_length import AnyLength

    graph_module.recompile()
    with placeholder_parameters(graph_module) as originals, quiet(), torch.no_grad():
        wrapper, held = _Named(graph_module, inputs), [name for known in parts("input axes", inputs) for name in known]
        shapes = dynamic_axes(inputs, held) if dynamic else None
        with AnyLength(), sizes_of_slices():
            program = torch.export.export(wrapper, (), dict(inputs), dynamic_shapes=shapes, strict=False)
        fresh = program.module(check_guards=False)
        captured = normalized(fresh, (*cleaning_passes(fresh), restore_aten), PassLog())
    restore_parameters(captured, originals)
    for node in captured.graph.nodes:
        if node.op in ("get_attr", "call_module") and str(node.target).startswith(_PREFIX):
            node.target = str(node.target).removeprefix(_PREFIX)
    modules = {name: module for name, module in captured.named_children() if f"{name}." != _PREFIX}
    inner = captured.get_submodule(_PREFIX[:-1]) if hasattr(captured, _PREFIX[:-1]) else nn.Module()
    for name, module in modules.items():
        inner.add_module(name, module)
    return fx.GraphModule(inner, captured.graph)


class _Named(nn.Module):
    """A graph whose `forward` signature names its inputs, as `torch.export` needs for dynamic shapes."""

    def __init__(self, graph_module: fx.GraphModule, names: Iterable[str]) -> None:
        super().__init__()
        self.graph_module = graph_module
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

        def forward(**inputs: Any) -> Any:
            return self.graph_module(**inputs)

        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.forward = forward


def _check_example(graph_module: fx.GraphModule, sample: Mapping[str, Any]) -> None:
    if any(parameter.is_meta for parameter in graph_module.parameters()):
        return
    buffers = [(buffer, buffer.clone()) for buffer in graph_module.buffers()]
    try:
        with torch.no_grad(), quiet(), torch.random.fork_rng(devices=()):
            graph_module(**own_inputs(sample))
    except Exception as error:  # a graph raises its operators' errors
        raise TraceError(
            f"the graph fails on the example inputs with {type(error).__name__}: {first_line(error)}; give inputs that "
            "it takes"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
