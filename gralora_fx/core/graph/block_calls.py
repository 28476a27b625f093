"""Splits a flat graph into blocks with graphs of their own, and a graph that calls them."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from gralora_fx.core.graph.effects import has_effect, may_write
from gralora_fx.core.graph.module_tree import is_within, module_calls
from gralora_fx.core.graph.surgery import copy_graph, module_of


class BlockCall(NamedTuple):
    """One call of a block in a graph."""

    path: str  # path of the block
    graph: fx.Graph  # the block's graph; it reads parameters by their paths within the block
    # modules from outside the block that it calls, such as branches: paths by their names in the block
    outside: Mapping[str, str]

    @property
    def structure(self) -> list[Any]:
        """Its graph's operations independent of node names; equal for calls that can share one graph."""
        places = {node: index for index, node in enumerate(self.graph.nodes)}
        nodes = [
            (
                node.op,
                None if node.op == "placeholder" else node.target,
                fx.map_arg((node.args, node.kwargs), places.get),
            )
            for node in self.graph.nodes
        ]
        return [dict(self.outside), *nodes]


class NoBlock(Exception):
    """A block's operations cannot run together."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path  # path of the block
        self.reason = reason  # why not


def callable_blocks(flat: fx.GraphModule, found: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the modules that a graph can call as blocks, and the reasons why it cannot call the others."""
    owners = {str(node.target) for node in flat.graph.find_nodes(op="get_attr") if node.users}
    owners |= {str(node.target) for node in flat.graph.find_nodes(op="call_module")}
    owners = {prefix for target in owners for prefix in _prefixes(target)}
    refused = {path: "the graph reads no tensor of it" for path in found if path not in owners}
    while True:
        paths = [path for path in found if path not in refused]
        try:
            called = {call.path for call in call_blocks(flat, paths)[1]}
        except NoBlock as error:
            refused[error.path] = error.reason
            continue
        refused |= {path: "the graph does not call it" for path in paths if path not in called}
        return [path for path in found if path not in refused], refused


def call_blocks(flat: fx.GraphModule, paths: Collection[str]) -> tuple[fx.Graph, list[BlockCall]]:
    """Return a copy of a graph that calls blocks as modules, and the calls in order, each with its block's graph.

    Before: `w = self.layers.0.fc.weight; h = linear(x, w); y = gelu(h); z = norm(y)`
    After:  `y = self.layers.0(x); z = norm(y)`, and in the block `h = linear(x, self.fc.weight); return gelu(h)`

    Nodes that draw random numbers or write into tensors keep their order. Tensors outside the block, such as those of
    adapters, are its arguments. All calls of a block have the same graph; one whose nodes cannot run together raises
    `NoBlock`.
    """
    graph = copy_graph(flat)
    graph.owning_module = flat
    members: dict[tuple[str, str], list[fx.Node]] = {}
    for node in graph.nodes:
        if (call := _call_of(node, paths)) is not None:
            members.setdefault(call, []).append(node)
    calls: dict[str, BlockCall] = {}
    for (path, _), nodes in members.items():
        others = {node for listed in members.values() if listed is not nodes for node in listed}
        made = _take_out(graph, path, _together(path, nodes, others))
        first = calls.setdefault(path, made)
        if first is not made and first.structure != made.structure:
            raise NoBlock(path, "it is called several times, and computes something else in one of its calls")
    graph.owning_module = None
    return graph, list(calls.values())


def _prefixes(target: str) -> list[str]:
    """Return the paths of a tensor's attributes from the outermost module to the tensor."""
    parts = target.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _call_of(node: fx.Node, paths: Collection[str]) -> tuple[str, str] | None:
    """Return the block that a node was traced in and its call's number, empty for the first; None outside blocks."""
    if node.op in ("placeholder", "output", "get_attr"):
        return None
    found = ((path, call.partition("@")[2]) for call, path, _ in module_calls(node) if path in paths)
    return next(found, None)


def _take_out(graph: fx.Graph, path: str, nodes: Sequence[fx.Node]) -> BlockCall:
    """Move the operations of one block call into a graph of their own, and call it."""
    inside = set(nodes)
    body, copies, outside = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, str]()
    reads, arguments = _inputs_of(nodes, inside), list[fx.Node]()
    writes = [node for node in nodes if any(user not in inside for user in node.users)]
    for node in reads:
        is_attribute = node.op == "get_attr"
        if is_attribute and (is_within(str(node.target), path) or _is_module(graph, node)):
            copies[node] = body.get_attr(_own_name(str(node.target), path, outside))
        else:
            copies[node] = body.placeholder(node.name)
            arguments.append(node)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = copied = body.node_copy(node, copies.__getitem__)
        if node.op == "call_module":
            copied.target = _own_name(str(node.target), path, outside)
    results = tuple(copies[node] for node in writes)
    body.output(results[0] if len(results) == 1 else results)
    with graph.inserting_after(nodes[-1]):
        call = graph.call_module(path, tuple(arguments))
    call.meta = {"nn_module_stack": nodes[-1].meta.get("nn_module_stack", {})}
    _hand_over(graph, call, writes, inside)
    for node in reversed(nodes):
        graph.erase_node(node)
    for node in reads:
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return BlockCall(path, body, outside)


def _is_module(graph: fx.Graph, node: fx.Node) -> bool:
    """Return whether an attribute is a module, such as a branch of `cond`, rather than a tensor."""
    found: Any = module_of(graph)
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return isinstance(found, nn.Module)


def _own_name(target: str, path: str, outside: dict[str, str]) -> str:
    """Return an attribute's path within a block; modules from outside get a new name there."""
    if is_within(target, path):
        return target[len(path) + 1 :]
    name = "outside_" + target.replace(".", "_")
    outside[name] = target
    return name


def _hand_over(graph: fx.Graph, call: fx.Node, writes: Sequence[fx.Node], inside: Collection[fx.Node]) -> None:
    """Redirect the readers of a block's values to its call."""
    after = call.next
    for index, node in enumerate(writes):
        value = call
        if len(writes) > 1:
            with graph.inserting_before(after):
                value = graph.call_function(operator.getitem, (call, index))
        value.meta = {**node.meta, **({"nn_module_stack": call.meta["nn_module_stack"]} if value is call else {})}
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)


def _together(path: str, nodes: Sequence[fx.Node], others: Collection[fx.Node]) -> list[fx.Node]:
    """Return the nodes that run in a block: its own, and others between them that depend on it or keep their order."""
    span = [nodes[0]]
    while span[-1] is not nodes[-1]:
        span.append(span[-1].next)
    taken = set(nodes)
    for node in span:
        if not taken.isdisjoint(node.all_input_nodes):
            taken.add(node)
    rest = [node for node in span if node not in taken and node.op not in ("get_attr", "placeholder")]
    if any(has_effect(node) for node in rest) or any(may_write(node) for node in nodes):
        taken |= set(rest)
    if strange := [node for node in span if node in taken and node in others]:
        raise NoBlock(path, f"{strange[0].name} of another block is computed between its operations")
    for node in span:
        if node not in taken:  # it reads no value of the block
            nodes[0].prepend(node)
    return [node for node in span if node in taken]


def _inputs_of(nodes: Iterable[fx.Node], inside: Collection[fx.Node]) -> list[fx.Node]:
    """Return the values that nodes read from outside, each once: activations first, then `get_attr` nodes."""
    reads = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    return sorted(reads, key=lambda node: node.op == "get_attr")
