"""Problems of a configuration with a model, at every site, and warnings."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import torch

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.config.checks import pattern_key
from gralora_fx.core.graph.module_tree import is_within
from gralora_fx.core.graph.sites import LinearSite, is_layer, names_of_site
from gralora_fx.core.methods import method_of
from gralora_fx.core.planning.rewrite_plan import PlannedSite
from gralora_fx.core.planning.targets import (
    TargetRule,
    counts_below,
    nearest_names,
    numbered_containers,
    unmatched_names,
)
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import an, listed, remedy, warn_caller

# where a user finds the names: a plan that takes every layer can be made of any model with linear layers
TABLE = remedy(
    "the table of plan(traced, config), with target_modules='all-linear' in the config, lists the linear layers",
    "gralora-fx inspect without --adapter lists the linear layers",
)
_MOST_UNMATCHED = 3  # names with a warning each, which lists the nearest names

UNNAMED = "it is a parameter of stacked matrices, which target_parameters does not name"


def trains_whole(path: str, saved: Iterable[str]) -> str | None:
    """Return why a site inside a saved module gets no adapter; `modules_to_save` matches the end of a path."""
    module = next((module for module in saved if is_within(path, module)), None)
    return None if module is None else f"{module} trains as a whole, since modules_to_save selects it"


def out_of_reach(site: LinearSite, traced: TracedModel, config: AdapterConfig) -> str | None:
    """Return why an adapter at a site would have no effect, or not at every call; None if it would."""
    if site.path in traced.out_of_reach:
        return traced.out_of_reach[site.path]
    if site.path in traced.in_subgraphs:
        location = f"it is called inside the subgraph of {traced.in_subgraphs[site.path]}, where its weight is adapted"
        if config.dropout:
            return f"{location} and not its output, so its input cannot have {config.DROPOUT}={config.dropout}"
        if site.weight.dtype in (torch.float16, torch.bfloat16):
            return f"{location}, and {site.weight.dtype} would round the update away"
    if not (site.in_features and site.out_features):
        return "one of its widths is 0, so an adapter would add nothing"
    return None


def problems_of(
    rule: TargetRule, config: AdapterConfig, traced: TracedModel, saved: Iterable[str], selected: Sequence[PlannedSite]
) -> list[str]:
    """Return every problem of a configuration with a model."""
    sites = {site.path: site for site in traced.sites}
    return [
        *([] if config.target_parameters else _missing(rule, config, traced, sites, saved)),
        *_unsupported(rule, traced, sites),
        *_unused_names(config.BEYOND_PEFT, rule, traced, config, selected),
        *_unfit_sizes(config, selected),
        *_unfit_tokens(config, traced),
    ]


def _missing(
    rule: TargetRule, config: AdapterConfig, traced: TracedModel, sites: dict[str, LinearSite], saved: Iterable[str]
) -> list[str]:
    """Describe why a rule selects no module at all."""
    paths = _paths(traced)
    named = [path for path in paths if rule.is_named(path)]
    if not named or (rule.all_linear and not any(is_layer(site, traced.tree) for site in sites.values())):
        if rule.pattern is not None:
            names = dict.fromkeys(path.rpartition(".")[2] for path in sites)
            return [
                f"target_modules {rule.pattern!r} matches no whole module path; the linear layers are called "
                f"{', '.join(names) or 'nothing: the model has none'}"
            ]
        if not rule.all_linear and not rule.names:
            return ["target_modules is empty; name modules, or take 'all-linear'"]
        found = listed([path for path, site in sites.items() if site.kind == "functional"])
        more = f"; name its functional calls to adapt them: {found}" if found else ""
        return [_no_match(n, paths) for n in sorted(rule.names)] or [f"the model has no linear layer to adapt{more}"]
    reasons = {
        rule.rejection(path)
        or trains_whole(path, saved)
        or (f"{path}: {why}" if path in sites and (why := out_of_reach(sites[path], traced, config)) else None)
        for path in named
    }
    if None not in reasons:
        if rule.indices is not None and not rule.indices & _existing_layers(rule, named):
            return [_no_layer(rule, named)]
        return [f"every module that target_modules names is left out: {'; '.join(sorted(filter(None, reasons)))}"]
    return []


def _paths(traced: TracedModel) -> list[str]:
    """Return all paths that a configuration can name: modules, and weights of functional calls."""
    functional = [name for site in traced.sites for name in names_of_site(site, traced.tree)]
    return [path for path in dict.fromkeys([*traced.tree.types, *functional]) if path]


def _no_match(name: str, paths: Iterable[str], field: str = "target_modules") -> str:
    near = nearest_names(name, paths)
    hint = f"nearest names: {', '.join(near)}" if near else TABLE
    return f"{field} {name!r} matches no module; {hint}"


def _no_layer(rule: TargetRule, named: list[str]) -> str:
    existing = sorted(_existing_layers(rule, named))
    requested = sorted(rule.indices or ())
    if existing:
        return f"layers_to_transform {requested} names no layer that exists; there are {_ranges(existing)}"
    containers = ", ".join(numbered_containers(named)) or "none"
    return (
        f"layers_to_transform {requested} with layers_pattern {list(rule.layer_patterns) or None} finds no numbered "
        f"layers; the containers with numbered children are: {containers}"
    )


def _existing_layers(rule: TargetRule, named: Iterable[str]) -> set[int]:
    return {index for path in named if (index := rule.layer_index(path)) is not None}


def _ranges(indices: list[int]) -> str:
    if not indices:
        return "none"
    return f"{indices[0]} to {indices[-1]}" if indices == list(range(indices[0], indices[-1] + 1)) else str(indices)


def _unsupported(rule: TargetRule, traced: TracedModel, sites: dict[str, LinearSite]) -> list[str]:
    """Describe named modules, by path or by its end, that are not linear layers."""
    if rule.all_linear:
        return []
    problems = []
    for path, kind in traced.tree.types.items():
        if path and path not in sites and rule.rejection(path) is None:
            inside = dict.fromkeys(site.removeprefix(f"{path}.") for site in sites if site.startswith(f"{path}."))
            remedy = f"name its linear layers, such as {', '.join(list(inside)[:3])}" if inside else "leave it out"
            problems.append(f"{path} is {an(kind.rpartition('.')[2])}, not a linear layer; {remedy}")
    return problems


def _unused_exclusions(rule: TargetRule, traced: TracedModel) -> list[str]:
    """Describe entries of `exclude_modules` that exclude nothing."""
    paths = _paths(traced)
    if rule.excluded_pattern is not None and not any(rule.is_excluded(path) for path in paths):
        return [f"exclude_modules {rule.excluded_pattern!r} matches no whole module path; correct it or leave it out"]
    return [_no_match(name, paths, "exclude_modules") for name in unmatched_names(rule.excluded, paths)]


def _unused_names(
    fields: Container[str],
    rule: TargetRule,
    traced: TracedModel,
    config: AdapterConfig,
    selected: Sequence[PlannedSite],
) -> list[str]:
    """Describe names in the given fields, `exclude_modules` and patterns such as `rank_pattern`, that match nothing."""
    paths = [p.parameter for p in selected if p.parameter is not None]
    paths += [name for p in selected if p.parameter is None for name in names_of_site(p.site, traced.tree)]
    problems = _unused_exclusions(rule, traced) if "exclude_modules" in fields else []
    for name in (name for name in config.PATTERNS if name in fields):
        keys = getattr(config, name)
        used = {pattern_key(keys, path) for path in paths}
        for key in keys:
            if key not in used:
                near = ", ".join(nearest_names(key, paths)) or "none"
                problems.append(f"{name} key {key!r} applies to no adapted layer; nearest names: {near}")
    return problems


def _unfit_sizes(config: AdapterConfig, selected: Sequence[PlannedSite]) -> list[str]:
    """Describe sites whose widths the method cannot adapt with their sizes, as if `gralora_k` does not divide them."""
    method = method_of(config)
    return [
        f"{planned.site.path}: {problem}"
        for planned in selected
        for problem in method.problems(planned.site.in_features, planned.site.out_features, planned.sizes)
    ]


def _unfit_tokens(config: AdapterConfig, traced: TracedModel) -> list[str]:
    """Return why an adapter cannot be activated by tokens in a model."""
    if not config.acts_from:
        return []
    from gralora_fx.base.features import parts

    return [problem for part in parts("acting tokens") for problem in part.problems(config.acts_from, traced)]


def warn_of_gaps(
    rule: TargetRule,
    config: AdapterConfig,
    traced: TracedModel,
    selected: Sequence[PlannedSite],
    others: Iterable[str] = (),
) -> None:
    """Warn about names and layer indices that match nothing while others do, and about a corrected `fan_in_fan_out`."""
    paths = _paths(traced)
    gaps = []
    if config.target_modules is not None:
        unmatched = list(unmatched_names(rule.names, paths))
        gaps += [_no_match(name, paths) for name in unmatched[:_MOST_UNMATCHED]]
        if more := unmatched[_MOST_UNMATCHED:]:
            gaps.append(f"{len(more)} more names of target_modules match no module: {listed(more, 4)}")
    if rule.indices is not None:
        existing = _existing_layers(rule, [path for path in paths if rule.is_named(path)])
        if missing := sorted(rule.indices - existing):
            gaps.append(
                f"layers_to_transform {missing} does not exist and is skipped; there are {_ranges(sorted(existing))}"
            )
    if len(rule.layer_patterns) > 1:
        containers = ", ".join(numbered_containers(paths)) or "none"
        gaps += [
            f"layers_pattern {name!r} finds no numbered layers; the containers with numbered children are: {containers}"
            for name in rule.layer_patterns
            if not any(counts_below(name, path) for path in paths)
        ]
    gaps += [
        _no_match(name, paths, "modules_to_save")
        for name in config.modules_to_save or ()
        if name not in config.task_heads and not any(path.endswith(name) for path in paths)
    ]
    # where PEFT has these fields, it ignores names that match nothing, so that a checkpoint may hold some
    of_peft = {"exclude_modules", *config.PATTERNS} - set(config.BEYOND_PEFT)
    gaps += _unused_names(of_peft, rule, traced, config, selected)
    if config.fan_in_fan_out != (corrected := stores_transposed(selected)):
        kind = "Conv1D" if corrected else "Linear"
        gaps.append(
            f"fan_in_fan_out is {config.fan_in_fan_out}, but the adapted layers are {kind}; it is read as {corrected}"
        )
    for gap in (*gaps, *others):
        warn_caller(gap)


def stores_transposed(selected: Sequence[PlannedSite]) -> bool:
    """Return the right `fan_in_fan_out` for the adapted layers: whether any of them stores `[in, out]`."""
    return any(planned.site.kind == "conv1d" for planned in selected)
