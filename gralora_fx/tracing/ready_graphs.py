"""Tracing of ready-made graphs: symbolic traces and exported programs, whose inputs are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.compat.torch_graphs import tree_info
from gralora_fx.errors import TraceError
from gralora_fx.graph.module_tree import ModuleTree
from gralora_fx.tracing.check import check_example
from gralora_fx.tracing.inputs.arguments import check_leaves
from gralora_fx.tracing.inputs.input_trees import fixed_axes, leaf_paths
from gralora_fx.tracing.inputs.signature import CallSignature
from gralora_fx.tracing.normalize.clean import without_guards
from gralora_fx.tracing.normalize.leaves import inline_leaves
from gralora_fx.tracing.normalize.modes import annotate_mode_args
from gralora_fx.tracing.traced_model import TracedModel

_Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


def trace_program(program: torch.export.ExportedProgram, arguments: _Arguments | None, task: str | None) -> TracedModel:
    """The traced model of an exported program.

    Args:
        program: The program.
        arguments: Example inputs, positional and by name; None for those it was exported with.
        task: The task it is for, or None.

    Raises:
        TraceError: The example inputs do not fit it.
    """
    graph_module = without_guards(program.module(check_guards=False))
    given_to_export: Any = program.example_inputs or ((), {})
    args, kwargs = given_to_export
    names = _call_names(graph_module)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    seen: dict[int, tuple[str, bool]] = {}
    for (path, leaf), node in zip(
        leaf_paths({**dict(zip(names, args, strict=False)), **kwargs}), placeholders, strict=False
    ):
        other, is_read = seen.setdefault(id(leaf), (path, bool(node.users)))
        if isinstance(leaf, Tensor) and other != path and not (is_read and node.users):
            raise TraceError(
                f"the program was exported with one tensor for {other!r} and {path!r}, so it reads one of them for "
                "both; export it again with a tensor for each"
            )
    return trace_graph(graph_module, program.example_inputs if arguments is None else arguments, task)


def trace_graph(graph_module: fx.GraphModule, arguments: _Arguments | None, task: str | None) -> TracedModel:
    """The traced model of a graph.

    Args:
        graph_module: The graph; it is left unchanged.
        arguments: Example inputs, positional and by name; None for a trace without any.
        task: The task it is for, or None.

    Raises:
        TraceError: The example inputs do not fit it.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    is_exported = tree_info(graph_module.graph) is not None
    names = _call_names(graph_module) if is_exported else tuple(str(node.target) for node in placeholders)
    defaults = {str(node.target): node.args[0] for node in placeholders if node.args}
    sample = {} if arguments is None else _named(names, defaults, *arguments)
    clean = inline_leaves(without_guards(graph_module))
    is_training = annotate_mode_args(clean.graph) or (graph_module.training and not is_exported)
    tree, noted = ModuleTree.of_module(graph_module), ModuleTree.of_graph(clean)
    if len(tree.linear) == 0:
        tree = noted
    else:  # a layer with its own forward, which a symbolic trace goes into, is only recorded in the nodes
        kinds = {path: noted.types[path] for path in noted.linear if path in tree.types}
        tree = dataclasses.replace(tree, types={**tree.types, **kinds}, linear=tree.linear | kinds.keys())
    fixed = fixed_axes(clean.graph, sample) if is_exported else {}
    traced = TracedModel(
        clean,
        tree=tree,
        example_inputs=sample,
        signature=CallSignature(
            inputs=names,
            positional=names,
            fixed=fixed,
            dynamic=not fixed or any(size is None for sizes in fixed.values() for size in sizes),
            has_form=is_exported,
        ),
        task=task,
        training=is_training,
    )
    if sample:
        check_example(clean, sample)
    return traced.train(is_training)


def _named(
    names: tuple[str, ...], defaults: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Example inputs by name, in the graph's order."""
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
    missing = [name for name in names if name not in sample and name not in defaults]
    if missing:
        raise TraceError(f"{takes}, but the example inputs lack {', '.join(missing)}; give every input")
    check_leaves(sample)
    return {name: sample[name] for name in names if name in sample}


def _call_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Input names of the calling convention of an exported graph, nested inputs counted once."""
    return tuple(tree_info(graph_module.graph).orig_args)
