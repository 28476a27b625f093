"""Adapters folded into the base's own parameters, in place; everything is checked before the first one changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.sources.lazy_tensors import is_lazy
from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.adapters.folded_weights import (
    SiteUpdate,
    check_finite,
    check_foldable,
    check_not_shared,
    folded,
    folded_weights,
    overlapping,
    shared_sites,
)
from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import MergeError


def fold_adapters(
    traced: TracedModel, adapters: Sequence[ModelAdapter], work: Sequence[SiteUpdate], *, safe: bool, untie: bool
) -> dict[str, nn.Parameter]:
    """Fold adapters and their copies in place; return new weights of tied layers by path if `untie` is set."""
    graph_module = traced.graph_module
    copies = _copied_values(traced.tree, adapters)
    shared = shared_sites(graph_module, [entry.site for entry in work]) if untie else {}
    tied = [entry for entry in work if entry.site.path in shared or is_lazy(entry.site.weight)]
    weights = folded_weights(graph_module, tied, safe=safe, untie=True)
    fold_in_place(graph_module, [entry for entry in work if entry not in tied], safe=safe)
    _replace_values(copies)
    return weights


def fold_in_place(graph_module: fx.GraphModule, work: Iterable[SiteUpdate], *, safe: bool = False) -> None:
    """Fold updates into the weights in place, keeping no copy; every weight is checked before the first one changes.

    A weight that cannot be written, such as an expanded tensor whose elements share memory, is replaced by a new
    tensor.
    """
    work = list(work)
    check_foldable(graph_module, [entry.site for entry in work])
    check_not_shared(graph_module, work)
    in_place = [entry for entry in work if _is_writable(entry.site.weight)]
    with torch.no_grad():
        if safe:
            for entry in in_place:
                check_finite({entry.site.path: folded(entry)})
        others = [entry for entry in work if entry not in in_place]
        replacements = {entry.site.path: folded(entry) for entry in others}
        if safe:
            check_finite(replacements)
        for entry in in_place:
            folded(entry, entry.site.weight.data)
        _replace_values([(entry.site.weight, replacements[entry.site.path]) for entry in others])


def _replace_values(updates: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Replace the data of parameters without copying; an error changes none."""
    before = [parameter.data for parameter, _ in updates]
    try:
        for parameter, values in updates:
            parameter.data = values.data
    except BaseException:
        for (parameter, _), values in zip(updates, before, strict=True):
            parameter.data = values
        raise


def _is_writable(tensor: Tensor) -> bool:
    """Return whether a tensor can be written in place: every element has its own memory."""
    if type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
        return False
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return False
            extent += (size - 1) * stride
    return True


def _copied_values(tree: ModuleTree, adapters: Sequence[ModelAdapter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return base parameters of which adapters train copies, each with a clone of the adapter's copy."""
    memory = overlapping(tree.parameters)
    copies: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for adapter in adapters:
        for module, owned in adapter.copies.items():
            for base, parameter in owned.items():
                outside = [n for n in (*tree.names_of(tree.parameters[base]), *memory.get(base, ())) if n not in owned]
                if outside:
                    raise MergeError(
                        f"{base} of {module} is tied with {', '.join(outside)}, which would change too; "
                        "use gralora_fx.merge, which leaves the base as it is"
                    )
                copies[id(tree.parameters[base])] = tree.parameters[base], parameter.detach().clone()
    return list(copies.values())
