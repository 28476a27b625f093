"""A weighted sum of adapters as one adapter: its configuration and its tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from gralora_fx.adapter import Factors, Update
from gralora_fx.adapter_forms import summed
from gralora_fx.adapters.installed import InstalledAdapter
from gralora_fx.config import GraloraConfig
from gralora_fx.errors import ConfigError, RewriteError


def weighted_sum(
    adapters: Sequence[InstalledAdapter], weights: Sequence[float]
) -> tuple[GraloraConfig, dict[str, Factors]]:
    """The adapter whose update at every site is the weighted sum of the given ones.

    The scale is 1 everywhere; ranks add up, and where adapters of different `gralora_k` meet, the site has the plain
    LoRA form (`k = 1`). Everything that is no size comes from the first adapter's configuration.

    Args:
        adapters: Adapters of one model; their sizes and their sites may differ.
        weights: One factor for each.

    Returns:
        The configuration, and the tensors by site path.

    Raises:
        ConfigError: There are no adapters, or weights of another count, or a weight is not finite.
        RewriteError: An adapter trains biases or whole modules, for which there is no exact sum.
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
                f"adapter {adapter.name!r} trains copies in {', '.join(adapter.copies)}, which have no weighted sum; "
                "leave it out, or merge it instead"
            )
    updates: dict[str, list[Update]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path in adapter.factors:
            update = adapter.update(path)
            updates.setdefault(path, []).append(Update(update.factors, update.scale * weight))
    hybrid_r = max(sum(update.factors.rank.hybrid_r for update in given) for given in updates.values())
    factors = {path: summed(given, hybrid_r=hybrid_r) for path, given in updates.items()}
    overflown = [
        path for path, sums in factors.items() if not all(bool(t.isfinite().all()) for t in sums if t is not None)
    ]
    if overflown:
        raise ConfigError(f"the sum is not finite at {', '.join(overflown)}; the weights {list(weights)} are too large")
    transposed = any(adapter.config.fan_in_fan_out for adapter in adapters)
    first = dataclasses.replace(adapters[0].config, fan_in_fan_out=transposed)
    return _config_of(first, factors, hybrid_r), factors


def _config_of(first: GraloraConfig, factors: dict[str, Factors], hybrid_r: int) -> GraloraConfig:
    """A configuration under which exactly these tensors stand, with scale 1."""
    ranks = {path: tensors.rank for path, tensors in factors.items()}
    usual = next(iter(ranks.values()))
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "gralora_k_pattern": {}}
    if len(set(ranks.values())) > 1:
        # every site is named, since a name is a pattern too, which could match the end of another
        patterns["rank_pattern"] = {path: rank.r for path, rank in ranks.items()}
        patterns["alpha_pattern"] = {path: rank.r + hybrid_r for path, rank in ranks.items()}
        patterns["gralora_k_pattern"] = {path: rank.k for path, rank in ranks.items()}
    return dataclasses.replace(
        first,
        r=usual.r,
        gralora_k=usual.k,
        hybrid_r=hybrid_r,
        alpha=usual.r + hybrid_r,
        target_modules=set(factors),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        bias="none",
        modules_to_save=None,
        **patterns,
    )
