"""Parameters that a graph reads other than as the weight of a linear layer, such as stacked matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx, nn

from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.graph.weight_views import tensor_at


@dataclass(frozen=True, eq=False, repr=False)
class ParameterSite(LinearSite):
    """A parameter of 2 or 3 dimensions that an adapter can change, whatever the graph computes with it.

    One of 3 dimensions is a stack of matrices. `path` is the parameter's name, `kind` is `"parameter"`, and
    `calls` are the names of the nodes that read the parameter itself (`get_attr`).

    Attributes:
        is_transposed: Whether its matrices are stored `[in, out]`, as the `is_transposed` of the module says that owns
            it (gpt-oss), rather than `[out, in]`.
    """

    is_transposed: bool = False

    @property
    def stack(self) -> int | None:
        """How many matrices it holds; None for a single one, of 2 dimensions."""
        return self.weight.shape[0] if self.weight.ndim == 3 else None

    @property
    def module(self) -> str:
        """Path of the module that owns it."""
        return self.path.rpartition(".")[0]


def parameter_sites(
    graph_module: fx.GraphModule, tree: ModuleTree, sites: Iterable[LinearSite]
) -> tuple[ParameterSite, ...]:
    """Every parameter of 2 or 3 dimensions that no linear layer multiplies by, in the order of the model's modules."""
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
            found.append(_site(name, parameter, tuple(reads.get(key, ())), tuple(others), tree))
    return tuple(found)


def _site(
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
