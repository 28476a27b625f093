"""Weights with adapters folded in, in new memory, computed now or when first read; no graph changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.sources.lazy_tensors import (
    EntrySource,
    is_lazy,
    lazy_parameter,
    raw_values_of,
    value_entries,
    values_of,
)
from gralora_fx.core.graph.sites import LinearSite, computed_sites, other_readers
from gralora_fx.core.methods.arrays import accumulator_of
from gralora_fx.core.methods.fold import fold
from gralora_fx.core.methods.method import Update
from gralora_fx.errors import MergeError, remedy


@dataclass(frozen=True)
class SiteUpdate:
    """The updates to fold into one site's weight."""

    site: LinearSite
    updates: tuple[Update, ...]


def folded_weights(
    graph_module: fx.GraphModule,
    work: Iterable[SiteUpdate],
    *,
    spare: Mapping[str, Tensor] | None = None,
    safe: bool = False,
    untie: bool = False,
) -> dict[str, nn.Parameter]:
    """Compute folded weights by site path, without changing anything."""
    work = list(work)
    check_foldable(graph_module, [entry.site for entry in work])
    if not untie:
        check_not_shared(graph_module, work)
    weights: dict[str, nn.Parameter] = {}
    with torch.no_grad():
        for entry in work:
            weight = folded(entry, (spare or {}).get(entry.site.path))
            weights[entry.site.path] = nn.Parameter(weight, requires_grad=False)
    if safe:
        check_finite(weights)
    return weights


def folded(entry: SiteUpdate, out: Tensor | None = None) -> Tensor:
    """Return a site's weight with its updates added, in `out` or in new memory."""
    site = entry.site
    weight = values_of(site.weight, site.path) if is_lazy(site.weight) else site.weight.data
    return fold(weight, entry.updates, transposed=site.is_transposed, out=out)


def lazy_weights(
    graph_module: fx.GraphModule, work: Iterable[SiteUpdate], *, untie: bool = False
) -> dict[str, nn.Parameter]:
    """Return lazy folded weights by site path; those in half precision are float32, so that they are rounded once."""
    work = list(work)
    check_foldable(graph_module, [entry.site for entry in work])
    if not untie:
        check_not_shared(graph_module, work)
    return {entry.site.path: _lazy_weight(entry) for entry in work}


def _lazy_weight(entry: SiteUpdate) -> nn.Parameter:
    site = entry.site

    def with_updates(stored: Tensor, updates: Sequence[Update]) -> Tensor:
        weight = stored.to(accumulator_of(stored))
        out = weight if weight is not stored else None  # fold into the copy, not into the base's own
        result = fold(weight, updates, transposed=site.is_transposed, out=out)
        check_finite({site.path: result})
        return result

    def matrices() -> Iterator[Tensor]:
        for index, matrix in enumerate(value_entries(site.weight, site.path)):
            yield with_updates(matrix, [update.matrix(index) for update in entry.updates])

    source: Callable[[], Tensor] = EntrySource(matrices)
    if entry.updates[0].stack is None:
        source = lambda: with_updates(raw_values_of(site.weight, site.path), entry.updates)  # noqa: E731
    return lazy_parameter(source, site.weight.shape, site.weight.dtype)


def shared_sites(graph_module: fx.GraphModule, sites: Iterable[LinearSite]) -> dict[str, str]:
    """Describe what else reads the weights of sites, by path of the sites with shared weights."""
    reasons: dict[str, str] = {}
    sites = list(sites)
    others, memory = other_readers(graph_module, sites), _sharing_memory(graph_module, sites)
    for site in sites:
        readers = others[site.path]
        if site.tied_with:
            reasons[site.path] = f"tied with {', '.join(site.tied_with)}"
        elif readers:
            reasons[site.path] = f"read by {', '.join(readers)} outside a linear call"
        elif site.path in memory:
            reasons[site.path] = f"in memory that {', '.join(memory[site.path])} uses too"
    return reasons


def check_foldable(graph_module: fx.GraphModule, sites: Iterable[LinearSite]) -> None:
    """Check that the weights of sites are parameters rather than computed values, so that they can be folded into."""
    computed = computed_sites(graph_module, sites)
    if computed:
        raise MergeError(
            f"the weight of {', '.join(computed)} is computed from other parameters (a parametrization), so nothing "
            "can be folded into it; remove it before tracing (torch.nn.utils.parametrize.remove_parametrizations), or "
            "leave the layer out (exclude_modules)"
        )


def _sharing_memory(graph_module: fx.GraphModule, sites: Sequence[LinearSite]) -> dict[str, tuple[str, ...]]:
    """Return names of other tensors that share memory with the weights of sites, by site path."""
    tensors: dict[str, Tensor] = dict(graph_module.named_parameters())
    tensors |= dict(graph_module.named_buffers())
    names = {id(tensor): name for name, tensor in tensors.items()}
    for site in sites:
        if id(site.weight) not in names:  # a layer without a call
            names[id(site.weight)] = f"{site.path}.weight"
            tensors[names[id(site.weight)]] = site.weight
    shared = overlapping(tensors)
    return {site.path: shared[name] for site in sites if (name := names[id(site.weight)]) in shared}


def check_not_shared(graph_module: fx.GraphModule, work: Iterable[SiteUpdate]) -> None:
    """Raise if something else reads the weights of sites, since folding would change its result.

    A layer that the model reads but never calls may have an update of zero: its adapter gets no gradient.
    """
    entries = {entry.site.path: entry for entry in work}
    shared = shared_sites(graph_module, [entry.site for entry in entries.values()])
    unused = {path for path in shared if not entries[path].site.calls and not entries[path].site.tied_with}
    if changed := [f"{path} ({shared[path]})" for path in sorted(unused) if _changes(entries[path])]:
        raise MergeError(
            f"the model reads the weight of {'; '.join(changed)} and never calls the layer, so that an adapter there "
            "does nothing, while folding it would change results, as it does in PEFT; leave it out (exclude_modules)"
        )
    if tied := [f"{path} ({why})" for path, why in shared.items() if path not in unused]:
        raise MergeError(
            f"the weight of {'; '.join(tied)} is shared, so folding into it would change more than the layer; "
            f"{remedy('merge with untie=True', 'run gralora-fx merge')} to give the layer a weight of its own, or "
            "leave it out (exclude_modules)"
        )


def _changes(entry: SiteUpdate) -> bool:
    """Return whether folding changes the weight's values."""
    values = raw_values_of(entry.site.weight, entry.site.path)
    return not torch.equal(fold(values, entry.updates, transposed=entry.site.is_transposed), values)


def _is_finite(weight: Tensor) -> bool:
    """Return whether every value is finite; the sum is faster to check, but may overflow."""
    return bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all())


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Check that every value of folded weights, by site path, is finite."""
    bad = [path for path, weight in weights.items() if not _is_finite(weight)]
    if bad:
        raise MergeError(
            f"the merged weight of {', '.join(bad)} is not finite; the adapter is damaged, or is a DoRA adapter of a "
            "row of zeros, which has no norm; nothing was changed"
        )


# -- tensors that share memory: by the same storage, overlapping slices, or views through `.data` or numpy ------------


def overlapping(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Return the tensors that share an element with others, each with the others' names; not one under two names."""
    spans = sorted(
        (span for name, tensor in tensors.items() if (span := _span(name, tensor))), key=lambda span: span[:3]
    )
    clusters: list[list[str]] = [[spans[0][3]]] if spans else []
    end = spans[0][2] if spans else 0
    for before, span in pairwise(spans):
        if span[0] != before[0] or span[1] >= end:
            clusters.append([])
            end = span[2]
        clusters[-1].append(span[3])
        end = max(end, span[2])
    overlaps: dict[str, tuple[str, ...]] = {}
    for cluster in clusters:
        for name in cluster:
            mine = tensors[name]
            others = [other for other in cluster if tensors[other] is not mine and _share(mine, tensors[other])]
            if others:
                overlaps[name] = tuple(others)
    return overlaps


def _span(name: str, tensor: Tensor) -> tuple[str, int, int, str] | None:
    """Return a tensor's device, first byte, end and name; None if it has no plain memory."""
    if tensor.is_meta or tensor.layout is not torch.strided or type(tensor.data) is not Tensor or not tensor.numel():
        return None
    start = tensor.data_ptr()
    return str(tensor.device), start, start + _extent(tensor) * tensor.element_size(), name


def _extent(tensor: Tensor) -> int:
    """Return the number of elements from a tensor's first to its last in memory, inclusive."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _share(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors share an element; interleaved column slices, for example, do not."""
    first, second = sorted((one, other), key=lambda tensor: tensor.data_ptr())
    size = first.element_size()
    distance = second.data_ptr() - first.data_ptr()
    if distance >= _extent(first) * size:
        return False
    if second.element_size() != size or distance % size:
        return True
    offset = distance // size
    occupied = torch.zeros(max(_extent(first), offset + _extent(second)), dtype=torch.bool)
    occupied.as_strided(first.shape, first.stride()).fill_(True)
    return bool(occupied.as_strided(second.shape, second.stride(), offset).any())
