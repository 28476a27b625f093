"""`plan`: matches a configuration with the sites of a model, before anything is changed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.config.checks import pattern_key
from gralora_fx.core.graph.sites import LinearSite, ParameterSite, is_layer, is_read_by_layers, names_of_site
from gralora_fx.core.methods import method_of
from gralora_fx.core.planning.problems import (
    UNNAMED,
    out_of_reach,
    problems_of,
    stores_transposed,
    trains_whole,
    warn_of_gaps,
)
from gralora_fx.core.planning.rewrite_plan import ChosenParameters, PlannedSite, RejectedSite, RewritePlan
from gralora_fx.core.planning.targets import TargetRule, resolve_targets, saved_modules
from gralora_fx.core.tracing.traced_model import TracedModel, check_traced
from gralora_fx.errors import ConfigError, TargetError


def plan(traced: TracedModel, config: AdapterConfig) -> RewritePlan:
    """Decide for every site whether it gets an adapter; nothing is changed.

    Args:
        traced: A traced model.
        config: The configuration of the adapter.

    Returns:
        The plan; printed, it shows every site and, for those without an adapter, the reason.

    Raises:
        TargetError: The configuration does not fit the model: nothing matches, a named module is not a linear layer,
            widths are not divisible by `gralora_k`, no layer of `layers_to_transform` exists, or a key of a pattern
            matches nothing. Every problem is listed.
    """
    check_traced(traced, TargetError, "plan for")
    if not isinstance(config, AdapterConfig):
        from gralora_fx.core.methods import not_a_config

        raise TargetError(f"cannot plan with {not_a_config(config)}")
    rule = resolve_targets(config, traced.tree, getattr(traced.config, "model_type", None))
    if rule.all_linear:
        rule = dataclasses.replace(rule, left_out={**_unfit_heads(config, rule, traced), **rule.left_out})
    sites = {site.path: site for site in traced.sites}
    saved = saved_modules(config, traced.tree)
    others = traced.parameter_sites
    chosen = _chosen_parameters(config, rule, traced, saved)
    by_name = {site.path: name for name, site in chosen.sites.items()}
    reasons = {
        path: _reason_against(s, rule, saved, traced, config) for path, s in sites.items() if path not in by_name
    }
    reasons |= {site.path: UNNAMED for site in others if _is_stack_of_layers(site) and site.path not in by_name}
    reasons |= {path: chosen.reasons.get(path) for path in by_name}  # after the modules, as PEFT draws its tensors
    sites |= {site.path: site for site in others}
    rejected = [RejectedSite(sites[path], reason) for path, reason in reasons.items() if reason]
    selected = tuple(
        _with_sizes(sites[path], config, traced, by_name.get(path)) for path, reason in reasons.items() if not reason
    )
    problems = [*chosen.problems, *problems_of(rule, config, traced, saved, selected)]
    if problems:
        raise TargetError(_joined(problems))
    warn_of_gaps(rule, config, traced, selected, chosen.gaps)
    biases = _trained_biases(config, traced, selected)
    copied = [p for path in saved for p in {id(p): p for p in _parameters_under(traced, path).values()}.values()]
    trained = {id(p): p for name in biases if (p := traced.tree.parameters[name]) is not None}
    twice = {id(p) for p in copied}
    return RewritePlan(
        config=config.changed(fan_in_fan_out=stores_transposed(selected)),
        selected=selected,
        rejected=tuple(rejected),
        saved_modules=saved,
        saved_parameters=sum(p.numel() for p in copied),
        trained_biases=biases,
        bias_parameters=sum(p.numel() for key, p in trained.items() if key not in twice),
        base_parameters=traced.tree.parameter_count,
    )


def _chosen_parameters(
    config: AdapterConfig, rule: TargetRule, traced: TracedModel, saved: Iterable[str]
) -> ChosenParameters:
    """Choose the parameters that `target_parameters` names; none without it."""
    if not config.target_parameters:
        return ChosenParameters()
    from gralora_fx.core.planning.parameters import chosen_parameters

    return chosen_parameters(config, rule, traced, traced.parameter_sites, saved)


def _reason_against(
    site: LinearSite, rule: TargetRule, saved: Iterable[str], traced: TracedModel, config: AdapterConfig
) -> str | None:
    """Return why a site gets no adapter, or None if it gets one."""
    of_layer = is_layer(site, traced.tree)
    reasons = [rule.rejection(name, is_linear_layer=of_layer) for name in names_of_site(site, traced.tree)]
    if any(rule.is_excluded(name) for name in names_of_site(site, traced.tree)):
        return reasons[0] or next(filter(None, reasons))
    reason = (reasons[0] if None not in reasons else None) or trains_whole(site.path, saved)
    return reason or out_of_reach(site, traced, config)


def _unfit_heads(config: AdapterConfig, rule: TargetRule, traced: TracedModel) -> dict[str, str]:
    """Return the names of heads that the adapter does not fit, with the reason; none if other layers are unfit too.

    A head is a layer that no other layer reads, such as that of a classifier, whose width is the number of classes.
    """
    method, heads = method_of(config), dict[str, str]()
    for site in traced.sites:
        names = names_of_site(site, traced.tree)
        if not site.calls or all(rule.rejection(name) for name in names):
            continue
        problems = method.problems(site.in_features, site.out_features, _with_sizes(site, config, traced, None).sizes)
        if problems and is_read_by_layers(traced.graph_module, site, traced.sites):
            return {}
        for problem in problems:
            reason = f"all-linear leaves out a head that the adapter does not fit: {problem.partition(';')[0]}"
            heads |= dict.fromkeys(names, reason)
    return heads


def _is_stack_of_layers(site: ParameterSite) -> bool:
    """Return whether a parameter is stacked matrices of layers, rather than of a convolution or other code."""
    if (site.stack or 0) < 2 or "conv" in site.path:
        return False
    from gralora_fx.base.features import parts

    return any(re.search(pattern, site.path) for pattern in parts("stacks"))


def _with_sizes(site: LinearSite, config: AdapterConfig, traced: TracedModel, parameter: str | None) -> PlannedSite:
    """Plan a site's adapter with the sizes of the configuration or of a matching pattern."""
    names = names_of_site(site, traced.tree) if parameter is None else (parameter,)

    def value_of(field: str) -> Any:
        pattern: Mapping[str, Any] = getattr(config, config.PATTERN_OF[field])
        keys = [pattern_key(pattern, name) for name in names]
        match = next((key for key in keys if key is not None), None)
        return getattr(config, field) if match is None else pattern[match]

    method = method_of(config)
    sizes, scale = method.sizes(config, value_of)
    count = method.parameter_count(site.in_features, site.out_features, sizes)
    stack = site.stack if isinstance(site, ParameterSite) else None
    return PlannedSite(site, sizes, scale, count * (stack or 1), parameter)


def _parameters_under(traced: TracedModel, path: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in traced.tree.parameters.items() if name.startswith(f"{path}.")}


def _trained_biases(config: AdapterConfig, traced: TracedModel, selected: Iterable[PlannedSite]) -> tuple[str, ...]:
    if config.bias == "all":
        return tuple(name for name in traced.tree.parameters if name.rpartition(".")[2] == "bias")
    if config.trains_adapted_biases:
        names = (traced.tree.names_of(planned.site.bias) for planned in selected if planned.site.bias is not None)
        return tuple(dict.fromkeys(bias_names[0] for bias_names in names if bias_names))
    return ()


def _joined(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n" + "\n".join(f"- {p}" for p in problems)


def planned_for(traced: TracedModel, config_or_plan: AdapterConfig | RewritePlan) -> RewritePlan:
    """Return the plan of a configuration, or a given plan after checking that it is for this model."""
    if isinstance(config_or_plan, AdapterConfig):
        return plan(traced, config_or_plan)
    if not isinstance(config_or_plan, RewritePlan):
        from gralora_fx.core.methods import not_a_config

        raise ConfigError(f"an adapter needs a configuration or a plan, not {not_a_config(config_or_plan)}")
    config_or_plan.check_fits(traced.adaptable)
    return config_or_plan
