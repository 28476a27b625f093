"""The parameters that `target_parameters` selects, by PEFT's rule: whole names, or their ends after a dot."""

from __future__ import annotations

from collections.abc import Iterable

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.graph.sites import LinearSite, ParameterSite
from gralora_fx.core.planning.problems import out_of_reach, trains_whole
from gralora_fx.core.planning.rewrite_plan import ChosenParameters
from gralora_fx.core.planning.targets import TargetRule, ends_with, nearest_names
from gralora_fx.core.tracing.traced_model import TracedModel


def chosen_parameters(
    config: AdapterConfig, rule: TargetRule, traced: TracedModel, others: Iterable[ParameterSite], saved: Iterable[str]
) -> ChosenParameters:
    """Return the parameters that a configuration names."""
    names = config.target_parameters or []
    parameters = {site.path: site for site in others}
    layers = {id(site.weight): site for site in traced.sites}
    sites: dict[str, LinearSite] = {}
    reasons: dict[str, str] = {}
    problems = []
    for name, parameter in traced.tree.parameters.items():
        if not any(ends_with(name, target) for target in names):
            continue
        site = parameters.get(name) or layers.get(id(parameter))
        if site is None or "." not in name:
            problems.append(_unfit(name, tuple(parameter.shape)))
            continue
        sites[name] = site
        if not isinstance(site, ParameterSite):
            if (problem := _unfit_layer(name, site, rule)) is not None:
                problems.append(problem)
            reason = trains_whole(site.path, saved) or out_of_reach(site, traced, config)
        else:
            reason = trains_whole(name, saved) or _unfit_values(site)
        if reason is not None:
            reasons[site.path] = reason
    gaps = [_no_match(target, traced) for target in names if not any(ends_with(name, target) for name in sites)]
    if not sites and not problems:
        problems, gaps = gaps, []
    elif sites and set(reasons) == {site.path for site in sites.values()}:
        left_out = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
        problems.append(f"every parameter that target_parameters names is left out: {left_out}")
    if config.layer_indices is not None:
        example = next(iter(sites), "layers.0.moe.down_proj")
        gaps.append(
            f"layers_to_transform={config.layers_to_transform} does not concern target_parameters, as in PEFT; name "
            f"the parameters of single layers there, such as {example!r}"
        )
    return ChosenParameters(sites, reasons, tuple(problems), tuple(gaps))


def _unfit(name: str, shape: tuple[int, ...]) -> str:
    why = f"has the shape {list(shape)}, and 2 or 3 dimensions are needed" if "." in name else "belongs to no module"
    return f"target_parameters names {name}, which {why}; leave it out"


def _unfit_layer(name: str, site: LinearSite, rule: TargetRule) -> str | None:
    """Return why a linear layer's weight cannot be named as a parameter; None if it can."""
    if site.kind == "conv1d":
        return f"target_parameters names {name}, which is stored [in, out]; name {site.path} in target_modules instead"
    if rule.rejection(site.path, is_linear_layer=site.kind == "linear") is None:
        return (
            f"target_parameters names {name}, and target_modules names {site.path}, which owns it; take it out of one "
            "(target_modules=[] names no module)"
        )
    return None


def _unfit_values(site: ParameterSite) -> str | None:
    """Return why a parameter cannot have an adapter; None if it can."""
    if site.tied_with:
        return f"it is also {', '.join(site.tied_with)}, which would change with it"
    if not site.weight.is_floating_point() or site.weight.dtype.itemsize < 2:
        return f"its values are {site.weight.dtype}, to which nothing can be added; load the model in a float dtype"
    return None


def _no_match(target: str, traced: TracedModel) -> str:
    names = [name for name, parameter in traced.tree.parameters.items() if parameter.ndim in (2, 3)]
    near = nearest_names(target, names)
    stacks = dict.fromkeys(".".join(site.path.split(".")[-3:]) for site in traced.parameter_sites if site.stack)
    hint = f"nearest names: {', '.join(near)}" if near else f"stacked parameters: {', '.join(stacks) or 'none'}"
    return f"target_parameters {target!r} matches no parameter; {hint}"
