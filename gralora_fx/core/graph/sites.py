"""Linear sites: the layers whose weights a graph multiplies by, each with all of its calls; and other parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import fx, nn

from gralora_fx.core.graph.linear_calls import (
    LinearCall,
    calls_at,
    is_unpacked,
    match_linear_call,
    note_weight,
    readers,
    subgraph_calls,
    tensor_at,
)
from gralora_fx.core.graph.module_tree import ModuleTree, innermost_path

Kind = Literal["linear", "conv1d", "functional", "parameter"]

_WORDS = 2  # columns of a table aligned to the left; the others are numbers


@dataclass(frozen=True)
class LinearSite:
    """A linear layer of the model, with every call of it in the graph.

    Attributes:
        path: Innermost module path of the calls, such as `model.layers.0.self_attn.q_proj`.
        kind: `"linear"` (weight `[out, in]`), `"conv1d"` for a transposed linear layer (weight `[in, out]`,
            transformers' `Conv1D`), or `"functional"` for a call whose weight is not owned by a linear layer (weight
            `[out, in]`). A `ParameterSite` is of kind `"parameter"`.
        in_features: Width of the input.
        out_features: Width of the output.
        weight: The parameter itself.
        bias: The bias parameter, or None.
        calls: Names of the nodes that compute `x @ weight`; empty if the traced forward does not call the layer.
        tied_with: Other names under which the model holds the same weight.
    """

    path: str
    kind: Kind
    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    calls: tuple[str, ...]
    tied_with: tuple[str, ...] = ()

    @property
    def is_transposed(self) -> bool:
        """True if its weight is stored `[in, out]`."""
        return self.kind == "conv1d"

    def __eq__(self, other: object) -> bool:
        """Return whether all fields are equal, comparing tensors by identity: `==` of tensors is a tensor."""
        if not isinstance(other, LinearSite):
            return NotImplemented
        return self._identity() == other._identity()

    def _identity(self) -> tuple[object, ...]:
        values = (getattr(self, one.name) for one in fields(self))
        return tuple(id(value) if isinstance(value, torch.Tensor) else value for value in values)

    def __repr__(self) -> str:
        """Return a line without tensors, with the number of calls."""
        facts = f"{self.path!r}, {self.kind!r}, in_features={self.in_features}, out_features={self.out_features}"
        tied = f", tied_with={self.tied_with}" if self.tied_with else ""
        return f"{type(self).__name__}({facts}, calls={len(self.calls)}{tied})"


def find_sites(graph_module: fx.GraphModule, tree: ModuleTree) -> tuple[LinearSite, ...]:
    """Return every linear layer of the model, in the order of its modules, with the graph's calls of it.

    One that is never called is a site without calls: adapters and checkpoints then cover the same layers as in PEFT.
    """
    tensors = {**dict(graph_module.named_parameters(remove_duplicate=False)), **tree.parameters}
    nodes = graph_module.graph.nodes
    plain: list[LinearCall] = []
    inner: list[LinearCall] = []
    for node in nodes:
        plain += [call] if (call := match_linear_call(node)) is not None else []
        inner += subgraph_calls(node, graph_module)
    weights = {call: tensors.get(str(call.weight.target)) for call in plain}
    within = {call: tensors.get(str(call.weight.target)) for call in inner}
    weights |= {call: weight for call, weight in within.items() if _layer_of(weight, tree) is not None}
    calls = {call: w for call, w in weights.items() if isinstance(w, nn.Parameter) and w.ndim == 2}
    paths = {call: _called(call, tree) for call in calls}
    names = {id(weight): tree.names_of(weight) for weight in calls.values()}
    called = {path for path in paths.values() if path in tree.linear}
    groups: dict[tuple[str, int, bool], list[LinearCall]] = {}
    for call, weight in calls.items():
        owner = _owner(call, weight, paths[call], names[id(weight)], tree, called)
        groups.setdefault((owner, id(weight), call.stored_transposed), []).append(call)
    sites: dict[str, LinearSite] = {}
    shared_paths = [path for path, _, _ in groups]
    for (path, _, _), group in groups.items():
        weight = calls[group[0]]
        own_bias = f"{path}.bias" if path in tree.linear else ""  # added after the product, as in Falcon's layers
        bias_name = group[0].bias.target if group[0].bias is not None else own_bias
        is_shared = path not in tree.linear and (not path or shared_paths.count(path) > 1)
        name = _weight_name(path, weight, tree) if is_shared else path
        if name in sites:  # one weight used both as it is and transposed
            name = f"{name}.T"
        sites[name] = _site(name, weight, tensors.get(str(bias_name)), group, tree)
        for call in group:
            if call.operand is not None:
                note_weight(call.node, name, call.operand)
    for path, group in _computed_calls(graph_module, tree, sites).items():
        if (original := _original(path, group[0], tree)) is not None:
            sites[path] = _site(path, original, tree.parameters.get(f"{path}.bias"), group, tree)
    for path in tree.linear - set(sites):
        parameter = tree.parameters.get(f"{path}.weight", _original(path, None, tree))
        if parameter is not None and parameter.ndim == 2:
            sites[path] = _site(path, parameter, tree.parameters.get(f"{path}.bias"), [], tree)
    order = {path: index for index, path in enumerate(tree.types)}
    ranked = sorted(sites, key=lambda path: order.get(path, order.get(path.rpartition(".")[0], len(order))))
    return tuple(sites[path] for path in ranked)


def is_layer(site: LinearSite, tree: ModuleTree) -> bool:
    """Return whether a site is a linear layer of the model, rather than a functional call."""
    return tree.canonical(site.path) in tree.linear


def names_of_site(site: LinearSite, tree: ModuleTree) -> tuple[str, ...]:
    """Return the names for a site in configurations: its path, and for a functional call its weight's name."""
    weights = () if is_layer(site, tree) or site.kind == "parameter" else tree.names_of(site.weight)
    return tuple(dict.fromkeys((site.path, *weights)))


def other_readers(graph_module: fx.GraphModule, sites: Iterable[LinearSite]) -> dict[str, tuple[str, ...]]:
    """Return the names of other nodes that read a site's weight, such as a tied embedding."""
    sources: dict[int, list[fx.Node]] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        sources.setdefault(id(tensor_at(graph_module, str(node.target))), []).append(node)
    for node in filter(is_unpacked, graph_module.graph.nodes):
        sources.setdefault(id(getattr(node.target, "parameter", None)), []).append(node)
    others: dict[str, tuple[str, ...]] = {}
    for site in sites:
        if site.kind == "parameter":  # all of its readers are its own
            others[site.path] = ()
            continue
        names = [reader.name for source in sources.get(id(site.weight), []) for reader in readers(source)]
        others[site.path] = tuple(name for name in names if name not in site.calls)
    return others


def is_read_by_layers(graph_module: fx.GraphModule, site: LinearSite, sites: Iterable[LinearSite]) -> bool:
    """Return whether other layers read what a layer computes, through any nodes; none reads that of a head."""
    others, reached = {name for one in sites if one is not site for name in one.calls}, set[fx.Node]()
    for node in graph_module.graph.nodes:
        if node.name in site.calls or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return not others.isdisjoint(node.name for node in reached)


def computed_sites(graph_module: fx.GraphModule, sites: Iterable[LinearSite]) -> tuple[str, ...]:
    """Return the paths of sites whose weight is computed in the graph, as by a parametrization."""
    by_name = {node.name: node for node in graph_module.graph.nodes}
    return tuple(
        site.path
        for site in sites
        if site.kind != "parameter"
        and any(
            call.operand is None and match_linear_call(call.node) is None
            for name in site.calls
            for call in calls_at(by_name[name], site.path)
        )
    )


def site_table(sites: Sequence[LinearSite], notes: Mapping[str, Mapping[str, str]]) -> str:
    """Return a table with a row for each site: its path, kind and sizes, and a column for each kind of note."""
    columns = {name: texts for name, texts in notes.items() if texts}
    rows = [("site", "kind", "in", "out", "calls", *columns)]
    for site in sites:
        sizes = (str(site.in_features), str(site.out_features), str(len(site.calls)))
        rows.append((site.path, site.kind, *sizes, *(texts.get(site.path, "") for texts in columns.values())))
    numbers = range(_WORDS, len(rows[0]) - len(columns))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _layer_of(weight: object, tree: ModuleTree) -> str | None:
    """Return the path of the linear layer that owns a weight; None unless there is exactly one."""
    if not isinstance(weight, torch.Tensor):
        return None
    names = tree.names_of(weight)
    paths = {tree.canonical(name.removesuffix(".weight")) for name in names if name.endswith(".weight")}
    linear = sorted(paths & tree.linear)
    return linear[0] if len(linear) == 1 else None


def _computed_calls(
    graph_module: fx.GraphModule, tree: ModuleTree, known: Collection[str]
) -> dict[str, list[LinearCall]]:
    """Return calls of linear layers with one weight that is computed in the graph, by the layer's path."""
    by_path: dict[str, list[LinearCall]] = {}
    runs: list[tuple[str, str | None]] = []
    for node in graph_module.graph.nodes:
        call = match_linear_call(node, computed=True)
        path = None if call is None else tree.innermost(node, str(call.weight.target).rpartition(".")[0])
        if call is not None and path in tree.linear and path not in known:
            by_path.setdefault(path, []).append(call)
            runs.append((path, tree.call_within(node, path)))
    return {
        path: calls for path, calls in by_path.items() if all(runs.count(run) == 1 for run in runs if run[0] == path)
    }


def _original(path: str, call: LinearCall | None, tree: ModuleTree) -> nn.Parameter | None:
    """Return the parameter that a layer's weight is computed from: the largest of the weight's shape."""
    noted = None if call is None else call.weight.meta.get("val")
    candidates = [p for name, p in tree.parameters.items() if name.startswith(f"{path}.") and p.ndim == 2]
    if isinstance(noted, torch.Tensor):
        candidates = [p for p in candidates if p.shape == noted.shape]
    return max(candidates, key=lambda parameter: parameter.numel(), default=None)


def _site(
    path: str, weight: nn.Parameter, bias: nn.Parameter | None, calls: list[LinearCall], tree: ModuleTree
) -> LinearSite:
    is_transposed = calls[0].stored_transposed if calls else tree.types[path].endswith("Conv1D")
    kind: Kind = "conv1d" if is_transposed else "linear" if tree.canonical(path) in tree.linear else "functional"
    rows, columns = weight.shape
    return LinearSite(
        path=path,
        kind=kind,
        in_features=rows if is_transposed else columns,
        out_features=columns if is_transposed else rows,
        weight=weight,
        bias=bias,
        calls=tuple(call.node.name for call in calls),
        tied_with=tuple(name for name in tree.names_of(weight) if not _is_own_name(name, path, tree)),
    )


def _called(call: LinearCall, tree: ModuleTree) -> str:
    """Return the path of the module that a call was traced in; another name of a layer is a path of its own."""
    path = innermost_path(call.node) or ""
    if tree.canonical(path) in tree.linear and tree.is_again(path):
        return path
    return tree.innermost(call.node, str(call.weight.target).rpartition(".")[0])


def _owner(
    call: LinearCall, weight: nn.Parameter, innermost: str, names: Sequence[str], tree: ModuleTree, called: set[str]
) -> str:
    """Return the path of the linear layer that a call belongs to, or of the module around a functional call.

    A use of the weight of a layer that is never called counts as its call, as `nn.MultiheadAttention` uses its
    `out_proj`.
    """
    if call.operand is not None and (layer := _layer_of(weight, tree)) is not None:
        return layer
    if innermost in tree.linear:
        return innermost
    prefix = f"{innermost}." if innermost else ""
    for name in names:
        path = tree.canonical(name.removesuffix(".weight"))
        is_child = name.endswith(".weight") and name.startswith(prefix) and path in tree.linear
        if is_child and path not in called and call.stored_transposed == tree.types[path].endswith("Conv1D"):
            return path
    return innermost


def _weight_name(path: str, weight: nn.Parameter, tree: ModuleTree) -> str:
    """Return the weight's name, as the path of a functional site whose module makes several such calls."""
    names = tree.names_of(weight)
    return next((name for name in names if name.rpartition(".")[0] == path), names[0] if names else path)


def _is_own_name(name: str, path: str, tree: ModuleTree) -> bool:
    if tree.canonical(path) in tree.linear and name.startswith(f"{path}."):
        return True
    owner = tree.canonical(name.rpartition(".")[0])
    return owner == path or name == path or (path not in tree.linear and owner == path.rpartition(".")[0])


@dataclass(frozen=True, eq=False, repr=False)
class ParameterSite(LinearSite):
    """A parameter, a matrix or a stack of them, that an adapter can change, whatever the graph computes with it.

    `path` is the parameter's name, `kind` is `"parameter"`, and `calls` name the nodes that read it (`get_attr`).
    """

    # whether its matrices are stored `[in, out]` rather than `[out, in]`, by the attribute `is_transposed` of the
    # module that owns it (gpt-oss)
    is_transposed: bool = False

    @property
    def stack(self) -> int | None:
        """Number of its matrices; None for a parameter of 2 dimensions."""
        return self.weight.shape[0] if self.weight.ndim == 3 else None

    @property
    def module(self) -> str:
        """Path of the module that owns it."""
        return self.path.rpartition(".")[0]


def parameter_sites(
    graph_module: fx.GraphModule, tree: ModuleTree, sites: Iterable[LinearSite]
) -> tuple[ParameterSite, ...]:
    """Return every parameter of 2 or 3 dimensions outside linear layers, in the modules' order."""
    weights = {id(site.weight) for site in sites}
    reads: dict[int, list[str]] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if node.users:
            reads.setdefault(id(tensor_at(graph_module, str(node.target))), []).append(node.name)
    names: dict[int, list[str]] = {}
    for name, parameter in tree.parameters.items():
        names.setdefault(id(parameter), []).append(name)
    found = []
    for key, (name, *others) in names.items():
        parameter = tree.parameters[name]
        if parameter.ndim in (2, 3) and key not in weights:
            found.append(_parameter_site(name, parameter, tuple(reads.get(key, ())), tuple(others), tree))
    return tuple(found)


def _parameter_site(
    name: str, parameter: nn.Parameter, reads: tuple[str, ...], others: tuple[str, ...], tree: ModuleTree
) -> ParameterSite:
    owner = name.rpartition(".")[0]
    is_transposed = parameter.ndim == 3 and owner in tree.transposed
    rows, columns = parameter.shape[-2:]
    return ParameterSite(
        path=name,
        kind="parameter",
        in_features=rows if is_transposed else columns,
        out_features=columns if is_transposed else rows,
        weight=parameter,
        bias=None,
        calls=reads,
        tied_with=tuple(other for other in others if tree.canonical(other.rpartition(".")[0]) != owner),
        is_transposed=is_transposed,
    )
