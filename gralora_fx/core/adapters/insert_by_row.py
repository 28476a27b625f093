"""Adapters by row in a graph: each adapter's subgraphs on the rows that an input gives it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.base.compat.torch_graphs import TreeSpec, convention_of, set_convention, tree_flatten, tree_info
from gralora_fx.core.adapters.adapter import CopyTable, ModelAdapter
from gralora_fx.core.adapters.insert_adapter import INSERTED, InsertAdapter, Insertion
from gralora_fx.core.adapters.other_parameters import OWN_WEIGHTS, is_inside
from gralora_fx.core.graph.linear_calls import LinearCall, calls_at, tensor_at
from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.graph.sites import ParameterSite
from gralora_fx.core.graph.surgery import annotate, module_of
from gralora_fx.core.methods.low_rank import set_rows, take_rows
from gralora_fx.core.tracing.normalize.modes import MODES
from gralora_fx.errors import RewriteError
from gralora_fx.format.input_names import ROWS


@contract(leaves={INSERTED}, ends={OWN_WEIGHTS, MODES})
@dataclass(frozen=True)
class InsertByRow:
    """Add the outputs of adapters to some rows of their sites, and compute modules that they train whole with theirs.

    Before: `y = linear(x, w, b)`
    After:  `y = linear(x, w, b); x_a = take_rows(x, rows_a); y_a = take_rows(y, rows_a);
            z_a = accumulate(y_a, project(x_a, A), B, scale); ...; y_1 = set_rows(y, [rows_a, ...], [z_a, ...])`

    The rows of each adapter are an input of the graph, `adapter_rows`.

    Attributes:
        adapters: The adapters.
        tree: The modules of the source model.
        main_input: Name of the input whose first axis is that of rows.
    """

    adapters: tuple[ModelAdapter, ...]
    tree: ModuleTree
    main_input: str

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Insert them."""
        for adapter in self.adapters:
            if adapter.plan.trained_biases:
                raise RewriteError(
                    f"adapter_names names {adapter.name!r}, which trains the base's biases (bias="
                    f"{adapter.config.bias!r}): these are not by row; set it with set_adapter instead"
                )
        by_name = {node.name: node for node in graph.nodes}
        layout = _Layout(graph, self.main_input)
        rows = {a.name: node for a, node in zip(self.adapters, _add_input(graph, len(self.adapters)), strict=True)}
        for module in dict.fromkeys(module for adapter in self.adapters for module in adapter.copies):
            copies = [
                _ModuleCopy(graph, self.tree, module, adapter.copies[module], rows[adapter.name], layout)
                for adapter in self.adapters
                if module in adapter.copies
            ]
            self._copy_module(graph, module, copies, layout)
        calls: dict[fx.Node, list[tuple[fx.Node, InsertAdapter, Insertion, LinearCall]]] = {}
        for adapter in self.adapters:
            inserted = adapter.insertion()
            for insertion in inserted.insertions:
                for call in _calls(by_name, insertion, adapter.name):
                    calls.setdefault(call.node, []).append((rows[adapter.name], inserted, insertion, call))
        for node, parts in calls.items():
            self._insert(graph, node, parts, layout)
        return PassResult(len(calls))

    def _insert(
        self,
        graph: fx.Graph,
        node: fx.Node,
        parts: Sequence[tuple[fx.Node, InsertAdapter, Insertion, LinearCall]],
        layout: _Layout,
    ) -> None:
        """Give the readers of a call its output with the adapters."""
        after = node.next
        names, path = ", ".join(part[1].adapter for part in parts), parts[0][2].site.path
        values: list[fx.Node] = []
        with graph.inserting_before(after):
            batch = layout.batch_argument(parts[0][3].input, f"{path} reads")
            for rows, inserted, insertion, call in parts:
                x, y = (graph.call_function(take_rows, (each, rows, *batch)) for each in (call.input, node))
                values.append(inserted.output(graph, insertion, call, x, y))
            chosen = graph.call_function(set_rows, (node, [part[0] for part in parts], values, *batch))
        added = node.next
        members = set()
        while added is not after:
            members.add(added)
            annotate(added, site=path, adapter=names, call=node.name)
            if "nn_module_stack" in node.meta:
                added.meta["nn_module_stack"] = node.meta["nn_module_stack"]
            added = added.next
        chosen.meta |= {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
        node.replace_all_uses_with(chosen, delete_user_cb=lambda user: user not in members)

    def _copy_module(self, graph: fx.Graph, module: str, copies: Sequence[_ModuleCopy], layout: _Layout) -> None:
        """Compute a module once more for each adapter that trains it whole, with its parameters and on its rows."""
        inside = [n for n in graph.nodes if n.op.startswith("call_") and is_inside(n, module, self.tree)]
        if not inside:
            raise RewriteError(f"adapter_names: the graph does not call {module}, which modules_to_save names")
        for node in inside:
            users = [user for user in node.users if user not in inside]
            with graph.inserting_before(node.next):
                values = [made.add(node) for made in copies]
                if not users:
                    continue
                batch = layout.batch_argument(node, f"{module} gives")
                arguments = (node, [made.rows for made in copies], values, *batch)
                chosen = graph.call_function(set_rows, arguments, {"in_place": False})
            chosen.meta = dict(node.meta)
            for user in users:
                user.replace_input_with(node, chosen)


class _ModuleCopy:
    """A module's nodes once more, with an adapter's parameters and on its rows.

    Attributes:
        rows: The node of the rows.
    """

    def __init__(
        self, graph: fx.Graph, tree: ModuleTree, module: str, owned: CopyTable, rows: fx.Node, layout: _Layout
    ) -> None:
        self.rows = rows
        self._graph, self._module, self._layout = graph, module, layout
        self._owned = {id(tree.parameters[base]): path for base, path in owned.paths.items()}
        self._made: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> fx.Node:
        """Copy a node at the insertion point."""
        for read in node.all_input_nodes:
            if read not in self._made:
                self._made[read] = self._outside(read)
        self._made[node] = made = self._graph.node_copy(node, self._made.__getitem__)
        return made

    def _outside(self, node: fx.Node) -> fx.Node:
        """Return what a copy reads in the place of a node outside the module."""
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
    """Where the rows of a batch are in the values of a graph."""

    def __init__(self, graph: fx.Graph, main_input: str) -> None:
        self.source = next(node for node in graph.find_nodes(op="placeholder") if node.target == main_input)
        shape = _shape(self.source)
        if not shape:
            raise RewriteError(
                "adapter_names: the graph has no record of its shapes, as after pickle, so that the rows in its values "
                "are not known; trace and rewrite the model again"
            )
        self._batch = _expression(shape[0])

    def is_shared(self, node: fx.Node) -> bool:
        """Return whether a node's value is the same for all rows."""
        return not any(_divided(_expression(size), self._batch) for size in _shape(node))

    def is_count(self, node: fx.Node) -> bool:
        """Return whether a node is the number of rows."""
        return bool(_expression(node.meta.get("val")) == self._batch)

    def batch_argument(self, node: fx.Node, where: str) -> tuple[fx.Node, ...]:
        """Return the argument `batch` of `take_rows` for a node's value, at the insertion point; nothing for rows.

        Raises:
            RewriteError: The value's first axis is not that of rows, or of places in one row beside those of the next.
        """
        if self.is_shared(node) or not self._is_by_row(node, set()):
            raise RewriteError(
                f"adapter_names: {where} values that are not by row: the same for all rows, or places of all rows "
                "together; leave this layer out of the adapters, or run the rows of each adapter alone (set_adapter)"
            )
        if _expression(_shape(node)[0]) == self._batch:
            return ()
        return (node.graph.call_function(torch.ops.aten.sym_size.int, (self.source, 0)),)

    def _is_by_row(self, node: fx.Node, seen: set[fx.Node]) -> bool:
        """Return whether rows are one after the other in the first axis of a value and of what it was computed from."""
        waiting = [node]
        while waiting:
            current = waiting.pop()
            shape = _shape(current)
            if current in seen or not shape or self.is_shared(current):
                continue
            seen.add(current)
            if not _divided(_expression(shape[0]), self._batch):
                return False
            if _expression(shape[0]) != self._batch:
                waiting += current.all_input_nodes
        return True


def _shape(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


def _expression(size: Any) -> Any:
    """Return a size as a number or a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _divided(size: Any, batch: Any) -> bool:
    """Return whether a size is a multiple of the number of rows: its expression has it as a factor."""
    if isinstance(batch, int) or isinstance(size, int):
        return bool(size == batch)
    rest = (size / batch).cancel()
    return bool(rest.is_polynomial() and batch not in rest.free_symbols)


def _calls(by_name: Mapping[str, fx.Node], insertion: Insertion, adapter: str) -> Iterator[LinearCall]:
    """Yield the calls of a site, each of which has to be a node of the graph itself."""
    site = insertion.site
    calls = () if isinstance(site, ParameterSite) else [c for n in site.calls for c in calls_at(by_name[n], site.path)]
    if not calls or any(call.operand is not None for call in calls):
        raise RewriteError(
            f"adapter_names names {adapter!r}, which adapts {site.path}: a parameter that other code reads, or a layer "
            "in a branch or a loop, has one value for all rows; leave it out of the adapter, or set it with set_adapter"
        )
    yield from calls


def _add_input(graph: fx.Graph, count: int) -> list[fx.Node]:
    """Add the input `adapter_rows` to a graph, a tuple."""
    placeholders = graph.find_nodes(op="placeholder")
    with graph.inserting_after(placeholders[-1]):
        added = [graph.placeholder(f"{ROWS}_{index}") for index in reversed(range(count))][::-1]
    convention, info = copy.copy(convention_of(graph)), tree_info(graph)
    args, kwargs = info.in_spec.children()
    names, specs = [*kwargs.context, ROWS], [*kwargs.children(), tree_flatten(tuple(added))[1]]
    in_spec = TreeSpec(tuple, None, [args, TreeSpec(dict, names, specs)])
    convention.pytree_info = info._replace(orig_args=[*info.orig_args, ROWS], in_spec=in_spec)
    set_convention(graph, convention)
    return added
