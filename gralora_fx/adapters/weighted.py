"""A weighted sum of adapters as one adapter: its configuration and its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gralora_fx.adapters.installed import InstalledAdapter
from gralora_fx.config import GraloraConfig
from gralora_fx.errors import ConfigError, RewriteError
from gralora_fx.methods.forms import summed
from gralora_fx.methods.gralora import Factors, Update


def weighted_sum(
    adapters: Sequence[InstalledAdapter], weights: Sequence[float]
) -> tuple[GraloraConfig, dict[str, Factors]]:
    """The adapter whose update at every site is the weighted sum of the given ones.

    The scale is 1 everywhere, and all sites have the same sizes, so that PEFT, which knows no patterns, loads the sum:
    ranks add up, missing ones are filled with zeros, and different `gralora_k` become one (see `_common_sizes`).
    Everything that is not a size comes from the first adapter's configuration.

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
    k, r, hybrid_r = _common_sizes(list(updates.values()))
    factors = {path: summed(given, k=k, r=r, hybrid_r=hybrid_r) for path, given in updates.items()}
    overflown = [
        path for path, sums in factors.items() if not all(bool(t.isfinite().all()) for t in sums if t is not None)
    ]
    if overflown:
        raise ConfigError(f"the sum is not finite at {', '.join(overflown)}; the weights {list(weights)} are too large")
    transposed = any(adapter.config.fan_in_fan_out for adapter in adapters)
    config = adapters[0].config.changed(
        r=r,
        gralora_k=k,
        hybrid_r=hybrid_r,
        alpha=r + hybrid_r,  # a scale of 1
        target_modules=set(factors),
        fan_in_fan_out=transposed,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        bias="none",
        modules_to_save=None,
        rank_pattern={},
        alpha_pattern={},
        gralora_k_pattern={},
    )
    return config, factors


def _common_sizes(sites: Sequence[Sequence[Update]]) -> tuple[int, int, int]:
    """One `(k, r, hybrid_r)` in which the sum at every site can be written, of the smallest rank.

    `k` is the least common multiple of all, where it divides the widths, or 1.
    """
    ranks = [[update.factors.rank for update in updates] for updates in sites]
    hybrid_r = max(sum(rank.hybrid_r for rank in given) for given in ranks)
    multiple = math.lcm(*(rank.k for given in ranks for rank in given))
    widths = {
        update.factors.rank.k * width
        for updates in sites
        for update in updates
        for width in (update.factors.A.shape[1], update.factors.B.shape[2])
    }
    candidates = [(max(sum(rank.r * rank.k for rank in given) for given in ranks), 1)]
    if all(width % multiple == 0 for width in widths):
        candidates.insert(0, (max(sum(rank.r * multiple // rank.k for rank in given) for given in ranks), multiple))
    r, k = min(candidates, key=lambda candidate: candidate[0])
    return k, r, hybrid_r
