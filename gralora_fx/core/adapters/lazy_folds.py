"""Folded weights that are computed when they are read, so that a model is folded with the memory of one weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, fx, nn

from gralora_fx.base.sources.lazy_tensors import EntrySource, lazy_parameter, raw_values_of, value_entries
from gralora_fx.core.adapters.folded_weights import SiteUpdate, check_finite, check_foldable, check_not_shared
from gralora_fx.core.methods.arrays import accumulator_of
from gralora_fx.core.methods.fold import fold
from gralora_fx.core.methods.method import Update


def lazy_weights(graph_module: fx.GraphModule, work: Iterable[SiteUpdate]) -> dict[str, nn.Parameter]:
    """Lazy folded weights by site path, computed when they are read (see `gralora_fx.base.sources.lazy_tensors`).

    Half-precision weights are folded into a float32 result, so that they are rounded once.
    """
    work = list(work)
    check_foldable(graph_module, [entry.site for entry in work])
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
