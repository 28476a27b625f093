"""An adapter's nodes at every call of its sites; no output that other nodes read is overwritten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from gralora_fx.core.adapters.other_parameters import OWN_WEIGHTS
from gralora_fx.core.graph.linear_calls import LinearCall, calls_at, replace_operand
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.graph.sites import LinearSite, ParameterSite
from gralora_fx.core.graph.surgery import annotate, annotation_of
from gralora_fx.core.methods import AdapterMethod, AdapterTensors, LayerCall, Sizes
from gralora_fx.core.methods.low_rank import accumulate, set_rows
from gralora_fx.core.tracing.normalize.modes import MODES
from gralora_fx.errors import RewriteError

if TYPE_CHECKING:
    from gralora_fx.core.adapters.acting_tokens import ActingTokens, Inserting

INSERTED = "adapters are inserted"


class Insertion(NamedTuple):
    """An adapter at one site."""

    site: LinearSite  # the site, found in the graph or one it was copied from
    # attribute paths of the adapter's tensors in the graph module, by field of the method's named tuple
    names: Mapping[str, str]
    sizes: Sizes
    scale: float  # factor of its update
    dtype: torch.dtype | None = None  # the adapter's dtype where it differs from the layer's

    @property
    def features(self) -> tuple[int, int]:
        """The layer's widths, `in` and `out`."""
        return self.site.in_features, self.site.out_features


@contract(leaves={INSERTED}, ends={OWN_WEIGHTS, MODES})
@dataclass(frozen=True)
class InsertAdapter:
    """Add an adapter's output to that of its sites, at each of their calls.

    Before: `y = linear(x, w, b); z = relu(y)`
    After:  `y = linear(x, w, b); h = project(x, A); y_1 = accumulate(y, h, B, scale); z = relu(y_1)`

    `AdapterMethod.add_output` makes the nodes, running on the graph's own proxies. A parameter of other code, such as
    stacked matrices, is changed where the graph reads it:

    Before: `w = self.moe.down_proj; y = grouped_mm(x, w, offsets)`
    After:  `w = self.moe.down_proj; ...; w_1 = baddbmm(w, B, A, alpha=scale); y = grouped_mm(x, w_1, offsets)`
    After:  `x_1 = at_tokens(x, acting); y = linear(x, w, b); h = project(x_1, A); ...`, where it acts on some tokens;
            layers that read one value share `x_1`
    """

    adapter: str  # name of the adapter
    method: AdapterMethod
    insertions: tuple[Insertion, ...]  # its sites
    dropout: float = 0.0  # dropout probability of its input
    # inserts the mask of the tokens on which it acts (for `at_tokens`); None if it acts on all
    acting: Inserting | None = None

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Insert the adapter."""
        by_name = {node.name: node for node in graph.nodes}
        acting = None if self.acting is None else self.acting(graph)
        count = 0
        for insertion in self.insertions:
            if isinstance(insertion.site, ParameterSite):
                _check_acts_everywhere(acting, insertion.site.path)
                count += sum(self._insert_at_read(graph, by_name[name], insertion) for name in insertion.site.calls)
                continue
            for name in insertion.site.calls:
                for call in _calls(by_name, name, insertion.site):
                    self._insert(graph, call, insertion, acting)
                    count += 1
        return PassResult(count)

    def _insert(self, graph: fx.Graph, call: LinearCall, insertion: Insertion, acting: ActingTokens | None) -> None:
        if call.operand is not None:
            _check_acts_everywhere(acting, insertion.site.path)
            added = self._insert_into_operand(graph, call, call.operand, insertion)
        else:
            added = self._insert_after(graph, call, insertion, acting)
        annotate_all(added, insertion.site.path, self.adapter, call.node)

    def _insert_after(
        self, graph: fx.Graph, call: LinearCall, insertion: Insertion, acting: ActingTokens | None
    ) -> list[fx.Node]:
        """Redirect the readers of a call to its output with the adapter."""
        x = call.input if acting is None else acting.read(call.input, insertion.site.path, self.adapter)
        node, after = call.node, call.node.next
        with graph.inserting_before(after):
            result = self.output(graph, insertion, call, x, node)
        return redirect_readers(node, result, after)

    def output(self, graph: fx.Graph, insertion: Insertion, call: LinearCall, x: fx.Node, y: fx.Node) -> fx.Node:
        """Insert the nodes that add the adapter to a call's output `y` of the input `x`, and return the last one."""
        tracer = GraphAppendingTracer(graph)
        weight, bias = _proxy(call.weight, tracer), None if call.added is None else _proxy(call.added, tracer)
        x_and_y = _proxy(x, tracer), _proxy(y, tracer)
        result: Any = self.method.add_output(
            LayerCall(*x_and_y, insertion.features, weight, bias, call.stored_transposed, call.rows),
            self._tensors(graph, tracer, insertion),
            insertion.scale,
            sizes=insertion.sizes,
            dropout=self.dropout,
            dtype=insertion.dtype,
        )
        node: fx.Node = result.node
        return node

    def _insert_into_operand(
        self, graph: fx.Graph, call: LinearCall, operand: tuple[int, int], insertion: Insertion
    ) -> list[fx.Node]:
        """Pass the weight with the adapter to a subgraph of `cond` or of a loop.

        Before: `y = cond(p, self.true, self.false, (x, w))`
        After:  `...; w_1 = add(w, update); y = cond(p, self.true, self.false, (x, w_1))`
        """
        before, tracer = set(graph.nodes), GraphAppendingTracer(graph)
        with graph.inserting_before(call.node):
            result: Any = self.method.new_weight(
                _proxy(call.weight, tracer),
                self._tensors(graph, tracer, insertion),
                insertion.scale,
                features=insertion.features,
                sizes=insertion.sizes,
            )
        replace_operand(call.node, operand, result.node)
        return [candidate for candidate in graph.nodes if candidate not in before]

    def _insert_at_read(self, graph: fx.Graph, node: fx.Node, insertion: Insertion) -> bool:
        """Redirect the readers of a parameter to its values with the adapter; return whether there are any."""
        site, users = insertion.site, set(node.users)
        first = node
        while users and first not in users:
            first = first.next
        if not users:
            return False
        assert isinstance(site, ParameterSite)
        before, tracer = set(graph.nodes), GraphAppendingTracer(graph)
        with graph.inserting_before(first):  # just before its first use, so that fewer weights are in memory at once
            factors = self._tensors(graph, tracer, insertion)
            factors = factors if site.stack is None else self.method.of_stack(factors, site.stack)
            weight: Any = _proxy(node, tracer)
            weight = weight if insertion.dtype is None else weight.to(insertion.dtype)
            result: Any = self.method.new_weight(
                weight.transpose(-2, -1) if site.is_transposed else weight,
                factors,
                insertion.scale,
                features=insertion.features,
                sizes=insertion.sizes,
                stack=site.stack,
            )
            result = result.transpose(-2, -1) if site.is_transposed else result
            result = result if insertion.dtype is None else result.to(site.weight.dtype)
        added = [candidate for candidate in graph.nodes if candidate not in before]
        node.replace_all_uses_with(result.node, delete_user_cb=users.__contains__)
        for inserted in added:
            annotate(inserted, site=site.path, adapter=self.adapter, call=node.name)
            if "nn_module_stack" in first.meta:
                inserted.meta["nn_module_stack"] = first.meta["nn_module_stack"]
        return True

    def _tensors(self, graph: fx.Graph, tracer: GraphAppendingTracer, insertion: Insertion) -> AdapterTensors:
        """Return proxies of new `get_attr` nodes for the adapter's tensors."""
        names = insertion.names.items()
        return self.method.tensors(
            **{field: _proxy(graph.create_node("get_attr", attribute), tracer) for field, attribute in names}
        )


def _check_acts_everywhere(acting: ActingTokens | None, path: str) -> None:
    if acting is not None:
        raise RewriteError(
            f"{path} is a parameter that other code reads, or a layer in a branch or a loop, where an adapter acts on "
            "all tokens or on none, and this one acts on some; leave it out of the adapter"
        )


def redirect_readers(node: fx.Node, result: fx.Node, after: fx.Node) -> list[fx.Node]:
    """Redirect a node's readers to another value, except the nodes that compute that value; return these."""
    inserted: list[fx.Node] = []
    while (candidate := inserted[-1].next if inserted else node.next) is not after:
        inserted.append(candidate)
    members = set(inserted)
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in members)
    return inserted


def annotate_all(nodes: Iterable[fx.Node], site: str, adapter: str, call: fx.Node) -> None:
    """Annotate an adapter's nodes at a call, and give them the call's module stack."""
    for node in nodes:
        annotate(node, site=site, adapter=adapter, call=call.name)
        if "nn_module_stack" in call.meta:
            node.meta["nn_module_stack"] = call.meta["nn_module_stack"]


def _calls(by_name: Mapping[str, fx.Node], name: str, site: LinearSite) -> tuple[LinearCall, ...]:
    """Return the calls of a site that a node makes."""
    node = by_name.get(name)
    calls = () if node is None else calls_at(node, site.path)
    if not calls:
        raise RewriteError(
            f"{site.path}: node {name!r} is not a linear call of this graph any more; trace the model again"
        )
    return calls


def _proxy(node: fx.Node, tracer: GraphAppendingTracer) -> Tensor:
    return fx.Proxy(node, tracer)  # type: ignore[return-value]  # a proxy stands for a tensor


@contract(needs={INSERTED})
def protect_outputs(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Make an adapter add, or write rows, out of place where another node, inserted since, reads the layer's output.

    Before: `y = linear(x, w, b); p = probe(y); ...; z = accumulate(y, h, B, scale)`
    After:  `y = linear(x, w, b); p = probe(y); ...; z = accumulate(y, h, B, scale, in_place=False)`
    """
    changed = 0
    for node in [node for node in graph.nodes if node.target in (accumulate, set_rows)]:
        annotation = annotation_of(node)
        source = node.args[0]
        while isinstance(source, fx.Node) and node.kwargs.get("in_place", True):
            if any(annotation_of(user) != annotation for user in source.users):
                node.update_kwarg("in_place", False)
                changed += 1
            if annotation_of(source) is None or not source.args:
                break
            source = source.args[0]
    return PassResult(changed)
