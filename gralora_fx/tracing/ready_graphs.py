"""Tracing of ready-made graphs: symbolic traces and exported programs, whose inputs are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.compat.torch_graphs import tree_info
from gralora_fx.errors import TraceError
from gralora_fx.graph.module_tree import ModuleTree
from gralora_fx.tracing.check import check_example, fixed_axes
from gralora_fx.tracing.draft import Captured
from gralora_fx.tracing.inputs.arguments import Arguments, check_leaves
from gralora_fx.tracing.inputs.input_trees import leaf_paths
from gralora_fx.tracing.inputs.signature import CallSignature
from gralora_fx.tracing.normalize.clean import restore_aten
from gralora_fx.tracing.normalize.leaves import inline_leaves
from gralora_fx.tracing.normalize.modes import AnnotateModes, is_in_training
from gralora_fx.tracing.normalize.stage import CLEANING, INLINING, run_passes


def trace_ready_graph(
    model: fx.GraphModule | torch.export.ExportedProgram, arguments: Arguments | None, task: str | None
) -> Captured:
    """The draft of a trace of a graph: an exported program, or an exported or symbolic `GraphModule`.

    Args:
        model: The graph; it is left unchanged.
        arguments: Example inputs, positional and by name; None for those that a program was exported with.
        task: The task it is for, or None.

    Raises:
        TraceError: The example inputs do not fit it.
    """
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
    draft = run_passes(draft, (*CLEANING, restore_aten, inline_leaves, *INLINING, AnnotateModes()))
    if exported_with is not None:  # what its graph does not read is left out
        draft = dataclasses.replace(draft, model=draft.graph_module)
        _check_distinct(draft.graph_module, *exported_with)
    fixed = fixed_axes(draft.graph_module.graph, sample) if is_exported else {}
    is_dynamic = not fixed or any(size is None for sizes in fixed.values() for size in sizes)
    is_training = is_in_training(draft.graph_module.graph) or (graph_module.training and not is_exported)
    if sample:
        check_example(draft.graph_module, sample)
    signature = dataclasses.replace(signature, fixed=fixed, dynamic=is_dynamic)
    return dataclasses.replace(draft, signature=signature, evaluates=not is_training)


def tree_of(draft: Captured) -> ModuleTree:
    """The modules that a graph holds, and those that its nodes record."""
    tree, noted = ModuleTree.of_module(draft.model), ModuleTree.of_graph(draft.graph_module)
    if not tree.linear:
        return noted
    # a layer with its own forward, which a symbolic trace goes into, is only recorded in the nodes
    kinds = {path: noted.types[path] for path in noted.linear if path in tree.types}
    return dataclasses.replace(tree, types={**tree.types, **kinds}, linear=tree.linear | kinds.keys())


def _check_distinct(graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check that a program was exported with a tensor for each of its inputs."""
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
    missing = [name for name in names if name not in sample and name not in optional]
    if missing:
        raise TraceError(f"{takes}, but the example inputs lack {', '.join(missing)}; give every input")
    check_leaves(sample)
    return {name: sample[name] for name in names if name in sample}


def _call_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Input names of the calling convention of an exported graph, nested inputs counted once."""
    return tuple(tree_info(graph_module.graph).orig_args)
