"""Exact weighted sums of adapters, as one adapter of one method and one size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gralora_fx.base.sources import ACTING
from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods import AdapterTensors, SummableMethod, Update
from gralora_fx.core.methods.forms import as_gralora, summed, summed_lora
from gralora_fx.core.methods.gralora import GraloraSizes
from gralora_fx.core.methods.registry import GRALORA
from gralora_fx.errors import ConfigError, RewriteError, listed


def weighted_sum(
    adapters: Sequence[ModelAdapter], weights: Sequence[float]
) -> tuple[AdapterConfig, dict[str, AdapterTensors]]:
    """Return the adapter whose update at every site is the weighted sum of the given ones.

    Its scale is 1 and its sizes are the same at all sites, so that PEFT, which reads no patterns of GraLoRA, loads it:
    ranks add up, missing ones are zeros, and different `gralora_k` become one. LoRA adapters give a LoRA adapter,
    different methods a GraLoRA adapter with the LoRA in its `hybrid_r`. All but the sizes comes from the first
    configuration.
    """
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(
            f"{len(adapters)} adapters were named, but {len(weights)} weights given; give one weight for each adapter"
        )
    for adapter, weight in zip(adapters, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"the weight of adapter {adapter.name!r} must be a finite number, but got {weight!r}")
        if adapter.copies:
            raise RewriteError(
                f"adapter {adapter.name!r} trains copies in {', '.join(adapter.copies)}, which cannot be summed; "
                "leave it out, or merge it instead"
            )
        adapter.method.check_lora_form(f"adapter {adapter.name!r}", "a weighted sum", RewriteError)
        if at := [planned.parameter for planned in adapter.plan.selected if planned.parameter is not None]:
            raise RewriteError(
                f"adapter {adapter.name!r} adapts parameters ({listed(at, 2)}), which cannot be summed, as "
                "in PEFT; make both active (set_adapter), or merge them"
            )
    if len({adapter.config.acts_from for adapter in adapters}) > 1:
        raise RewriteError(
            f"adapters {listed(repr(adapter.name) for adapter in adapters)} act from different tokens on "
            f"({ACTING}), and a sum could act from only one of them; make them active together (set_adapter)"
        )
    updates: dict[str, list[Update]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path in adapter.factors:
            update = adapter.update(path)
            updates.setdefault(path, []).append(Update(update.factors, update.scale * weight))
    config, factors = _sums(adapters, updates)
    overflown = [
        path for path, sums in factors.items() if not all(bool(t.isfinite().all()) for t in sums if t is not None)
    ]
    if overflown:
        raise ConfigError(f"the sum is not finite at {', '.join(overflown)}; the weights {list(weights)} are too large")
    config = config.changed(
        target_modules=set(factors),
        fan_in_fan_out=any(adapter.config.fan_in_fan_out for adapter in adapters),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        bias="none",
        modules_to_save=None,
    )
    return config, factors


def _sums(
    adapters: Sequence[ModelAdapter], updates: Mapping[str, Sequence[Update]]
) -> tuple[AdapterConfig, dict[str, AdapterTensors]]:
    """Return the sum at every site in one method and size: the adapters' own method if possible, else GraLoRA."""
    method = adapters[0].method
    if all(adapter.method is method for adapter in adapters) and isinstance(method, SummableMethod):
        rank = max(sum(update.lora_form()[0].shape[0] for update in summands) for summands in updates.values())
        factors = {path: method.from_lora_form(*summed_lora(summands, r=rank)) for path, summands in updates.items()}
        return method.config_of(adapters[0].config, rank), factors
    k, r, hybrid_r = _common_sizes(list(updates.values()))
    sums: dict[str, AdapterTensors] = {
        path: summed(summands, k=k, r=r, hybrid_r=hybrid_r) for path, summands in updates.items()
    }
    return GRALORA.config_of(adapters[0].config, GraloraSizes(r, k, hybrid_r)), sums


def _common_sizes(sites: Sequence[Sequence[Update]]) -> tuple[int, int, int]:
    """Return the `(k, r, hybrid_r)` of smallest rank with which the sum at every site can be written.

    `k` is the least common multiple of all, if it divides the widths, or 1; `r` is at least `k`.
    """
    sizes = [[as_gralora(update.factors).sizes for update in updates] for updates in sites]
    hybrid_r = max(sum(entry.hybrid_r for entry in summands) for summands in sizes)
    multiple = math.lcm(*(entry.k for summands in sizes for entry in summands))
    widths = {width for updates in sites for update in updates for width in update.factors.features}
    candidates = [(max(sum(entry.r * entry.k for entry in summands) for summands in sizes), 1)]
    if all(width % multiple == 0 for width in widths):
        candidates.insert(0, (max(sum(entry.r * multiple // entry.k for entry in s) for s in sizes), multiple))
    r, k = min(candidates, key=lambda candidate: candidate[0])
    return k, max(r, k), hybrid_r
