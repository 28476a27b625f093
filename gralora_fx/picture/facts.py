"""Facts about a model that a picture shows: sites, adapters and counts, without tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.graph.module_tree import is_within
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.methods import method_of
from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import RewriteError, an

PLANNED = "planned"  # name and state of the adapter of a plan not carried out
_LONGEST_TARGETS = 80  # characters of `target_modules` that are shown at once
_STATES = ("active", "merged", "waiting", PLANNED)  # the first one present paints the site


class AdaptedModel(Protocol):
    """The part of `GraloraModel` that a picture needs, as a protocol to avoid a circular import."""

    @property
    def traced(self) -> TracedModel:
        """The base model."""

    @property
    def plans(self) -> dict[str, RewritePlan]:
        """The plan of each adapter."""

    @property
    def active_adapters(self) -> list[str]:
        """Adapters whose outputs are added."""

    @property
    def merged_adapters(self) -> list[str]:
        """Adapters that are folded into the weights."""

    def block_norms(self, path: str, adapter_name: str | None = None) -> Tensor:
        """Norms of the blocks of an adapter's update."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameters."""


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter."""

    name: str
    state: str  # its state, as that of a `SiteAdapter`
    config: AdapterConfig  # its configuration
    settings: Mapping[str, Any]  # its method's own description of the configuration, by field
    sites: tuple[str, ...]  # paths of the sites that it adapts
    parameters: int  # how many values it trains

    @property
    def settings_text(self) -> str:
        """The settings on one line."""
        numbers = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in self.settings.items()}
        return " ".join(f"{name}={text}" for name, text in numbers.items())

    @property
    def targets(self) -> str:
        """The value of `target_modules`, as text."""
        targets = self.config.target_modules
        if targets is None:
            return "the model type's default"
        return targets if isinstance(targets, str) else ", ".join(sorted(targets))

    @property
    def targets_summary(self) -> str | None:
        """The count of a long `target_modules` list, such as "12 layers"; None if the list itself is short."""
        targets = self.config.target_modules
        if not isinstance(targets, set) or len(self.targets) <= _LONGEST_TARGETS:
            return None
        return f"{len(targets)} {'layers' if targets <= set(self.sites) else 'names'}"


@dataclass(frozen=True)
class SiteAdapter:
    """An adapter at a site."""

    name: str  # the adapter's name
    state: str  # `"active"`, `"merged"`, `"waiting"` or `"planned"`
    sizes: str  # its sizes, in words
    k: int  # blocks of its update in each direction
    scale: float  # factor of its update
    # Frobenius norms of the update's blocks, rows for output blocks; None for a plan
    norms: tuple[tuple[float, ...], ...] | None

    @property
    def update_norm(self) -> float | None:
        """Frobenius norm of the whole update."""
        return None if self.norms is None else math.hypot(*(value for row in self.norms for value in row))

    @property
    def mean_block_norm(self) -> float | None:
        """Root mean square of its blocks' norms, comparable with the heat map's scale."""
        return None if self.norms is None else (self.update_norm or 0.0) / len(self.norms)


@dataclass(frozen=True)
class SiteFacts:
    """A linear site as a picture shows it."""

    site: LinearSite
    calls: int  # number of nodes that read the weight as a layer
    status: str  # the state of its adapters, or `"saved"`, `"rejected"`, `"base"`
    adapters: tuple[SiteAdapter, ...] = ()  # the adapters that it has
    reasons: Mapping[str, str] | None = None  # reasons why it has no adapter, by adapter name
    saved_by: tuple[str, ...] = ()  # adapters that train a copy of it, or of a module around it
    notes: tuple[str, ...] = ()  # other notes about it

    @property
    def reason(self) -> str:
        """Reason for having no adapter, by adapter name if the reasons differ."""
        reasons = self.reasons or {}
        if len(set(reasons.values())) == 1:
            return next(iter(reasons.values()))
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


@dataclass(frozen=True)
class ModelFacts:
    """A model as a picture shows it."""

    name: str  # the name to show
    traced: TracedModel  # the base model
    sites: dict[str, SiteFacts]  # its sites by path
    adapters: tuple[AdapterFacts, ...]
    trained_whole: dict[str, tuple[str, ...]]  # names of the adapters that train a copy of a module, by its path
    trainable: int | None  # number of values that train; None where nothing was planned
    total: int  # number of all values

    @functools.cached_property  # every box and heat map asks for it
    def largest_norm(self) -> float | None:
        """Largest finite block norm of all sites; None if no adapter has tensors."""
        grids = [a.norms for facts in self.sites.values() for a in facts.adapters if a.norms is not None]
        values = [value for grid in grids for row in grid for value in row if math.isfinite(value)]
        return max(values, default=0.0) if grids else None


def read_facts(model: TracedModel | AdaptedModel, plan: RewritePlan | None = None) -> ModelFacts:
    """Collect everything that a picture shows of a model."""
    if isinstance(model, TracedModel):
        traced, plans, states = model, {} if plan is None else {PLANNED: plan}, {PLANNED: PLANNED}
        if plan is not None:
            plan.check_fits(traced.adaptable)
    elif not hasattr(model, "adapter"):
        raise RewriteError(f"cannot draw {an(type(model).__name__)}; give what trace() or rewrite() returned")
    elif plan is not None:
        raise RewriteError("a rewritten model has plans of its own; leave plan out, or give the traced model with it")
    else:
        traced, plans = model.traced, model.plans
        states = {name: "active" if name in model.active_adapters else "waiting" for name in plans}
        states |= dict.fromkeys(model.merged_adapters, "merged")
    counts: tuple[int | None, int] = (None, traced.tree.parameter_count)
    if plan is not None:
        counts = (plan.trainable_parameters, plan.total_parameters)
    elif not isinstance(model, TracedModel):
        counts = model.get_nb_trainable_parameters()
    whole = [(path, name) for name, entry in plans.items() for path in entry.saved_modules]
    return ModelFacts(
        name=_name_of(traced),
        traced=traced,
        sites=_sites(traced, plans, states, None if isinstance(model, TracedModel) else model),
        adapters=tuple(
            AdapterFacts(
                name,
                states[name],
                entry.config,
                method_of(entry.config).settings(entry.config),
                tuple(planned.site.path for planned in entry.selected),
                entry.trainable_parameters,
            )
            for name, entry in plans.items()
        ),
        trained_whole={path: tuple(name for other, name in whole if other == path) for path, _ in whole},
        trainable=counts[0],
        total=counts[1],
    )


def _sites(
    traced: TracedModel, plans: Mapping[str, RewritePlan], states: Mapping[str, str], model: AdaptedModel | None
) -> dict[str, SiteFacts]:
    sites = {site.path: (site, len(site.calls)) for site in traced.sites}
    adapters: dict[str, list[SiteAdapter]] = {}
    reasons: dict[str, dict[str, str]] = {}
    notes: dict[str, list[str]] = {}
    for name, plan in plans.items():
        text = method_of(plan.config).text
        for planned in plan.selected:
            path, scale = planned.site.path, planned.scale
            sites.setdefault(path, (planned.site, len(planned.site.calls)))
            norms = None
            if model is not None:
                norms = tuple(tuple(row) for row in model.block_norms(path, name).tolist())
            adapters.setdefault(path, []).append(
                SiteAdapter(name, states[name], text(planned.sizes), planned.k, scale, norms)
            )
        for rejected in plan.rejected:
            site = rejected.site
            if site.path not in sites:  # stacked matrices, which are not sites of the graph
                sites[site.path] = site, len(site.calls)
            reasons.setdefault(site.path, {})[name] = rejected.reason
        for path in {bias.rpartition(".")[0] for bias in plan.trained_biases} & set(sites):
            notes.setdefault(path, []).append(f"bias trains ({name})")
    saved_by = {
        path: tuple(
            name for name, plan in plans.items() if any(is_within(path, module) for module in plan.saved_modules)
        )
        for path in sites
    }
    return {
        path: SiteFacts(
            site=site,
            calls=calls,
            status=_status(adapters.get(path, []), is_saved=bool(saved_by[path]), is_rejected=path in reasons),
            adapters=tuple(adapters.get(path, [])),
            reasons=reasons.get(path),
            saved_by=saved_by[path],
            notes=tuple(notes.get(path, [])),
        )
        for path, (site, calls) in sites.items()
    }


def _status(adapters: list[SiteAdapter], *, is_saved: bool, is_rejected: bool) -> str:
    states = {adapter.state for adapter in adapters}
    if states:
        return next(state for state in _STATES if state in states)
    return "saved" if is_saved else "rejected" if is_rejected else "base"


def _name_of(traced: TracedModel) -> str:
    kind = traced.tree.types.get("", "").rpartition(".")[2] or "model"
    source = getattr(traced.config, "name_or_path", "") or ""
    return f"{kind} ({source})" if source else kind
