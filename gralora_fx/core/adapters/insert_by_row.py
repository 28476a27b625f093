"""A different adapter for each row in a graph: each adapter's nodes run on the rows that an input lists."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.base.compat.torch_graphs import is_mutable
from gralora_fx.core.adapters.acting_tokens import ActingTokens, acting_of, shape_of
from gralora_fx.core.adapters.adapter import CopyTable, ModelAdapter
from gralora_fx.core.adapters.insert_adapter import INSERTED, InsertAdapter, Insertion, annotate_all, redirect_readers
from gralora_fx.core.adapters.module_copies import is_inside, is_tied_outside
from gralora_fx.core.adapters.other_parameters import OWN_WEIGHTS
from gralora_fx.core.graph.linear_calls import calls_at, tensor_at
from gralora_fx.core.graph.module_tree import ModuleTree, is_within
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.graph.sites import ParameterSite
from gralora_fx.core.graph.surgery import add_tuple_input, module_of
from gralora_fx.core.methods.low_rank import at_tokens, set_rows, take_rows
from gralora_fx.core.tracing.normalize.modes import MODES
from gralora_fx.errors import RewriteError
from gralora_fx.format.input_names import ROWS


@contract(leaves={INSERTED}, ends={OWN_WEIGHTS, MODES})
@dataclass(frozen=True)
class InsertByRow:
    """Add adapters' outputs on their rows of each site, and compute fully trained modules once per adapter.

    Before: `y = linear(x, w, b)`
    After:  `y = linear(x, w, b); x_a = take_rows(x, rows_a); y_a = take_rows(y, rows_a);
            z_a = accumulate(y_a, project(x_a, A), B, scale); ...; y_1 = set_rows(y, [rows_a, ...], [z_a, ...])`,
            with the rows as input `adapter_rows` of the graph
    """

    adapters: tuple[ModelAdapter, ...]
    tree: ModuleTree  # the modules of the source model
    main_input: str  # name of the input whose first axis is the batch

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Insert the adapters."""
        for adapter in self.adapters:
            if adapter.plan.trained_biases:
                raise RewriteError(
                    f"adapter_names names {adapter.name!r}, which trains the base's biases (bias="
                    f"{adapter.config.bias!r}): these are not by row; set it with set_adapter instead"
                )
        by_name = {node.name: node for node in graph.nodes}
        layout = _Layout(graph, self.main_input)
        added = add_tuple_input(graph, ROWS, len(self.adapters))
        rows = {adapter.name: node for adapter, node in zip(self.adapters, added, strict=True)}
        modules = list(dict.fromkeys(module for adapter in self.adapters for module in adapter.copies))
        for inner, outer in itertools.permutations(modules, 2):
            if is_within(inner, outer):
                raise RewriteError(
                    f"adapter_names: modules_to_save of one adapter has {outer}, and of another {inner} within it; run "
                    "them in batches of their own"
                )
        for module in modules:
            copies = [
                _ModuleCopy(graph, self.tree, module, adapter.copies[module], rows[adapter.name], layout)
                for adapter in self.adapters
                if module in adapter.copies
            ]
            self._copy_module(graph, module, copies, layout)
        acting = {a.name: made(graph, rows[a.name]) for a in self.adapters if (made := acting_of(a.config))}
        calls: dict[fx.Node, list[tuple[fx.Node, InsertAdapter, Insertion]]] = {}
        for adapter in self.adapters:
            inserted = adapter.insertion()
            for insertion in inserted.insertions:
                for node in _calls(by_name, insertion, adapter.name):
                    calls.setdefault(node, []).append((rows[adapter.name], inserted, insertion))
        for node, parts in calls.items():
            self._insert(graph, node, parts, layout, acting)
        return PassResult(len(calls))

    def _insert(
        self,
        graph: fx.Graph,
        node: fx.Node,
        parts: Sequence[tuple[fx.Node, InsertAdapter, Insertion]],
        layout: _Layout,
        acting: Mapping[str, ActingTokens],
    ) -> None:
        """Redirect the readers of a call to its output with the adapters."""
        after = node.next
        names, path = ", ".join(part[1].adapter for part in parts), parts[0][2].site.path
        (call,) = calls_at(node, path)  # looked up again: its input may have adapters by now
        values: list[fx.Node] = []
        with graph.inserting_before(after):
            batch = layout.batch_argument(call.input, f"{path} reads")
            for rows, inserted, insertion in parts:
                x, y = (graph.call_function(take_rows, (each, rows, *batch)) for each in (call.input, node))
                if (tokens := acting.get(inserted.adapter)) is not None:
                    tokens.check(call.input, path)
                    x = graph.call_function(at_tokens, (x, tokens.mask))
                values.append(inserted.output(graph, insertion, call, x, y))
            chosen = graph.call_function(set_rows, (node, [part[0] for part in parts], values, *batch))
        annotate_all(redirect_readers(node, chosen, after), path, names, node)
        _describe_as(chosen, node)

    def _copy_module(self, graph: fx.Graph, module: str, copies: Sequence[_ModuleCopy], layout: _Layout) -> None:
        """Compute a module once more for each adapter that trains it whole, with that adapter's parameters and rows."""
        inside = [n for n in graph.nodes if n.op.startswith("call_") and is_inside(n, module, self.tree)]
        if not inside:
            raise RewriteError(f"adapter_names: the graph does not call {module}, which modules_to_save names")
        copies[0].check(inside)
        for node in inside:
            users = [user for user in node.users if user not in inside]
            with graph.inserting_before(node.next):
                values = [made.add(node) for made in copies]
                if not users:
                    continue
                batch = layout.batch_argument(node, f"{module} gives")
                arguments = (node, [made.rows for made in copies], values, *batch)
                chosen = graph.call_function(set_rows, arguments, {"in_place": False})
            _describe_as(chosen, node)
            for user in users:
                user.replace_input_with(node, chosen)


class _ModuleCopy:
    """A copy of a module's nodes that reads an adapter's parameters and rows."""

    def __init__(
        self, graph: fx.Graph, tree: ModuleTree, module: str, owned: CopyTable, rows: fx.Node, layout: _Layout
    ) -> None:
        self.rows = rows  # the node of the rows
        self._graph, self._module, self._layout = graph, module, layout
        self._tree = tree
        self._owned = {id(tree.parameters[base]): path for base, path in owned.paths.items()}
        self._made: dict[fx.Node, fx.Node] = {}

    def check(self, inside: Collection[fx.Node]) -> None:
        """Raise if a module updates buffers, has a fixed batch size, or shares its parameters with other code."""
        named = f"adapter_names: modules_to_save has {self._module}"
        if self._layout.is_fixed:
            raise RewriteError(f"{named}, and the trace has a fixed number of rows; trace the model with dynamic=True")
        if any(is_mutable(node.target) or "batch_norm" in str(node.target) for node in inside):
            raise RewriteError(f"{named}, which updates buffers of the base, as BatchNorm does; set its adapter alone")
        for node in self._graph.find_nodes(op="get_attr"):
            parameter = tensor_at(module_of(self._graph), str(node.target))
            is_tied = id(parameter) not in self._owned or is_tied_outside(parameter, self._module, self._tree)
            if not is_tied and set(node.users) - set(inside):
                raise RewriteError(f"{named}, whose {node.target} other code reads too; set its adapter alone")

    def add(self, node: fx.Node) -> fx.Node:
        """Copy a node at the insertion point."""
        for read in node.all_input_nodes:
            if read not in self._made:
                self._made[read] = self._outside(read)
        self._made[node] = made = self._graph.node_copy(node, self._made.__getitem__)
        return made

    def _outside(self, node: fx.Node) -> fx.Node:
        """Return the node that a copied node reads in place of one outside the module."""
        if node.op == "get_attr":
            path = self._owned.get(id(tensor_at(module_of(self._graph), str(node.target))))
            return node if path is None else self._graph.get_attr(path)
        if isinstance(node.meta.get("val"), Tensor) and not self._layout.is_shared(node):
            batch = self._layout.batch_argument(node, f"{self._module} reads")
            return self._graph.call_function(take_rows, (node, self.rows, *batch))
        if self._layout.is_count(node):
            taken = self._graph.call_function(take_rows, (self._layout.source, self.rows))
            return self._graph.call_function(torch.ops.aten.sym_size.int, (taken, 0))
        return node


class _Layout:
    """The position of the batch axis in the values of a graph."""

    def __init__(self, graph: fx.Graph, main_input: str) -> None:
        placeholders = graph.find_nodes(op="placeholder")
        self.source = next(node for node in placeholders if node.target == main_input)
        shape = shape_of(self.source)
        if not shape:
            raise RewriteError(
                "adapter_names: the graph has no record of its shapes, as after pickle, so that the rows in its values "
                "are not known; trace and rewrite the model again"
            )
        self._batch = _expression(shape[0])
        # a mask may have its own symbol for the batch size
        shapes = [shape for node in placeholders if len(shape := shape_of(node)) > 1]
        self._symbols = {_expression(s[0]) for s in shapes if _hint(s[0]) == _hint(shape[0])} | {self._batch}

    @property
    def is_fixed(self) -> bool:
        """True if the graph has a fixed number of rows."""
        return isinstance(self._batch, int)

    def is_shared(self, node: fx.Node) -> bool:
        """Return whether a node's value is the same for all rows."""
        return not any(self._has_rows(size) for size in shape_of(node))

    def is_count(self, node: fx.Node) -> bool:
        """Return whether a node's value is the batch size."""
        value = node.meta.get("val")
        return isinstance(value, torch.SymInt) and _expression(value) in self._symbols

    def batch_argument(self, node: fx.Node, where: str) -> tuple[fx.Node, ...]:
        """Return `take_rows`' argument `batch` for a node's value, at the insertion point; empty with a batch axis.

        Raise if the first axis is neither the batch nor the batch flattened with its positions, row after row.
        """
        shape = shape_of(node)
        if shape and _expression(shape[0]) in self._symbols:
            return ()
        if self.is_shared(node) or not self._is_by_row(node):
            raise RewriteError(
                f"adapter_names: {where} values that are not by row: the same for all rows, or positions of several "
                "rows mixed; leave this layer out of the adapters, or run the rows of each adapter alone (set_adapter)"
            )
        return (node.graph.call_function(torch.ops.aten.sym_size.int, (self.source, 0)),)

    def _has_rows(self, size: Any) -> bool:
        """Return whether a size is the batch size or a multiple of it."""
        return any(_divided(_expression(size), batch) for batch in self._symbols)

    def _is_by_row(self, node: fx.Node) -> bool:
        """Return whether a value, and those it was computed from, have rows one after the other in the first axis."""
        waiting, seen = [node], set()
        while waiting:
            current = waiting.pop()
            shape = shape_of(current)
            if current in seen or not shape or self.is_shared(current):
                continue
            seen.add(current)
            if not self._has_rows(shape[0]):
                return False
            if _expression(shape[0]) not in self._symbols:
                waiting += current.all_input_nodes
        return True


def _expression(size: Any) -> Any:
    """Return a size as a number or a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _hint(size: Any) -> Any:
    """Return the concrete value of a size in the trace."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _divided(size: Any, batch: Any) -> bool:
    """Return whether a size's expression has the batch size as a factor."""
    if isinstance(batch, int) or isinstance(size, int):
        return bool(size == batch)
    rest = (size / batch).cancel()
    return bool(rest.is_polynomial() and batch not in rest.free_symbols)


def _calls(by_name: Mapping[str, fx.Node], insertion: Insertion, adapter: str) -> Iterator[fx.Node]:
    """Yield the nodes of a site's calls, which must be in the graph itself rather than in a subgraph."""
    site = insertion.site
    calls = () if isinstance(site, ParameterSite) else [c for n in site.calls for c in calls_at(by_name[n], site.path)]
    if not calls or any(call.operand is not None for call in calls):
        raise RewriteError(
            f"adapter_names names {adapter!r}, which adapts {site.path}: a parameter that other code reads, or a layer "
            "in a branch or a loop, has one value for all rows; leave it out of the adapter, or set it with set_adapter"
        )
    yield from (call.node for call in calls)


def _describe_as(node: fx.Node, other: fx.Node) -> None:
    """Copy the shape and the module stack of one node to another."""
    node.meta |= {key: other.meta[key] for key in ("val", "tensor_meta", "nn_module_stack") if key in other.meta}
