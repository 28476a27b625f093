"""Checks, by PEFT's target rules and without the model, that an adapter's configuration and tensors belong together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from gralora_fx.core.adapters.parameter_keys import WEIGHT_END, is_named, names_parameter
from gralora_fx.core.config import CONFIG_NAME, AdapterConfig
from gralora_fx.core.config.checks import SAVED_MODULE, match, pattern_key, within
from gralora_fx.core.planning.targets import TargetRule, ends_with, rule_of, trains_whole_at
from gralora_fx.errors import CheckpointError, bulleted, listed, shown, warn_caller

_MOST = 3  # layers named in a message


@dataclass(frozen=True)
class KnownLayers:
    """A model's linear layers and parameters, known from an export or from the model's class."""

    paths: Collection[str]  # paths of its linear layers
    model_type: str | None = None  # the model's `model_type` in transformers, or None
    # paths of functional calls, where PEFT has no adapters, and whose weights have other names
    functional: Collection[str] = ()
    parameters: Collection[str] = ()  # names of its parameters, stacks of matrices among them


def check_agreement(
    config: AdapterConfig,
    sites: Collection[str],
    origin: object,
    known: KnownLayers | None = None,
    *,
    trained: Collection[str] = (),
) -> None:
    """Raise if a configuration and tensors do not belong together (see `disagreements`)."""
    _check(disagreements(config, sites, known, trained=trained), origin)


def check_target_names(
    config: AdapterConfig, sites: Collection[str], origin: object, *, trained: Collection[str] = ()
) -> None:
    """Raise if no name of `target_modules` fits a layer with tensors; planning warns of single names that fit none."""
    rule = _rule(config, None)
    unmet = [] if rule is None or not sites else [*_unmet_names(config, rule, {*sites, *trained})]
    _check(unmet if rule is not None and len(unmet) == len(rule.names) else [], origin)


def _check(problems: Collection[str], origin: object) -> None:
    if problems:
        raise CheckpointError(
            f"the tensors of {origin} are not what its {CONFIG_NAME} describes; copy or save both files again, or "
            f"correct {CONFIG_NAME} if it was edited:\n{bulleted(problems)}"
        )


def disagreements(
    config: AdapterConfig, sites: Collection[str], known: KnownLayers | None = None, *, trained: Collection[str] = ()
) -> list[str]:
    """Describe contradictions between a configuration and the layers that have tensors.

    A layer with tensors must be selected, and every name of `target_modules` and every pattern key must fit one; if the
    model's layers are `known`, those selected must have tensors. Layers that depend on the model are not judged.
    """
    rule = _rule(config, None if known is None else known.model_type)
    problems = [
        f"target_parameters names {shown(name)}, and no parameter of that name has tensors"
        for name in config.target_parameters or ()
        if sites and not any(is_named(path, name) for path in sites)
    ]
    at_parameters = {path for path in sites if names_parameter(config, path)}
    if known is not None and not problems:
        problems += _parameters_without_tensors(config, at_parameters, known)
    sites = [path for path in sites if path not in at_parameters]
    if rule is None or not sites:
        return problems
    problems += [*_not_selected(config, rule, sites), *_unmet_names(config, rule, {*sites, *trained})]
    if not problems and known is not None and set(sites) <= {*known.paths, *known.functional}:  # else of another model
        problems += _without_tensors(config, rule, sites, known.paths)
    return problems + [
        f"{name} key {shown(key)} applies to no layer that has tensors"
        for name, key in _unused_keys(config, sites)
        if name in config.BEYOND_PEFT
    ]


def warn_of_unused(config: AdapterConfig, sites: Collection[str], origin: str) -> None:
    """Warn of what PEFT silently ignores: pattern keys and layer indices that fit no layer with tensors."""
    unused = [f"{name} key {shown(key)}" for name, key in _unused_keys(config, sites) if name not in config.BEYOND_PEFT]
    rule = _rule(config, None)
    if rule is not None and rule.indices is not None:
        missing = sorted(rule.indices - {rule.layer_index(path) for path in sites})
        unused += [f"layers_to_transform {missing}"] if missing else []
    for what in unused:
        warn_caller(f"{origin}: {what} applies to no layer that has tensors, and is ignored, as PEFT does")


def _rule(config: AdapterConfig, model_type: str | None) -> TargetRule | None:
    """Return the configuration's target rule; None if it depends on a model type that is not known."""
    return None if config.target_modules is None and model_type is None else rule_of(config, model_type)


def _not_selected(config: AdapterConfig, rule: TargetRule, sites: Iterable[str]) -> Iterator[str]:
    """Describe layers that have tensors but are not selected, with the reason."""
    reasons: dict[str, list[str]] = {}
    for path in sites:
        if (reason := rule.rejection(path)) is not None:
            reasons.setdefault(reason, []).append(path)
    for reason, paths in reasons.items():
        targets = _targets(config) if "target_modules" in reason else ""
        yield f"there are tensors of {_named(paths)}, which the configuration does not select: {reason}{targets}"


def _unmet_names(config: AdapterConfig, rule: TargetRule, sites: Iterable[str]) -> Iterator[str]:
    """Yield target names that fit no layer with tensors and that no other field excludes."""
    if config.target_modules is None or rule.indices is not None:
        return  # a name whose layers layers_to_transform excludes has no tensors
    for name in sorted(rule.names):
        is_excluded = rule.is_excluded(name) or any(ends_with(path, name) for path in rule.excluded)
        is_left_out = is_excluded or rule.excluded_pattern is not None or _is_saved(config, name)
        if not is_left_out and not any(ends_with(path, name) for path in sites):
            yield f"target_modules names {shown(name)}, and no layer of that name has tensors"


def _is_saved(config: AdapterConfig, name: str) -> bool:
    """Return whether a name is of a module that trains whole, or lies within one."""
    saved = config.saved_module_names
    return any(match(within(SAVED_MODULE, own), name) for own in saved) or trains_whole_at(name, saved)


def _without_tensors(
    config: AdapterConfig, rule: TargetRule, sites: Collection[str], known: Iterable[str]
) -> Iterator[str]:
    """Describe layers of the model that are selected and have no tensors; `all-linear` leaves the head out."""
    own = set(sites)
    missing = [
        path
        for path in known
        if path not in own and rule.rejection(path) is None and not trains_whole_at(path, config.saved_module_names)
    ]
    if missing and not (rule.all_linear and len(missing) == 1):
        yield _missing(missing)


def _parameters_without_tensors(config: AdapterConfig, own: Collection[str], known: KnownLayers) -> Iterator[str]:
    """Describe parameters of the model that are selected and have no tensors; nothing if some names are unknown."""
    named = [
        (name, name.removesuffix(WEIGHT_END))
        for name in known.parameters
        if any(ends_with(name, target) for target in config.target_parameters or ())
        and not trains_whole_at(name, config.saved_module_names)
    ]
    missing = [name for name, layer in named if name not in own and layer not in own]
    if missing and set(own) <= {path for pair in named for path in pair}:
        yield _missing(missing)


def _missing(paths: Iterable[str]) -> str:
    return f"there are no tensors of {_named(paths)}, which the configuration selects"


def _unused_keys(config: AdapterConfig, sites: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield fields that give sizes by path, with those of their keys that fit no layer."""
    for name in config.PATTERNS:
        keys = getattr(config, name)
        used = {pattern_key(keys, path) for path in sites} if keys else set()
        yield from ((name, key) for key in keys if key not in used)


def _targets(config: AdapterConfig) -> str:
    targets = config.target_modules
    if targets is None:
        return " (it is null, which is PEFT's choice for the model's type)"
    return f"; target_modules is {shown(sorted(targets) if isinstance(targets, set) else targets)}"


def _named(paths: Iterable[str]) -> str:
    return listed(sorted(paths), _MOST)
