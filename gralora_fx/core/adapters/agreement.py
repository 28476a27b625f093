"""Whether an adapter's configuration and its tensors are of one adapter, by PEFT's target rules and no model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from gralora_fx.core.adapters.parameter_keys import WEIGHT_END, is_named, names_parameter
from gralora_fx.core.config import CONFIG_NAME, AdapterConfig
from gralora_fx.core.config.checks import SAVED_MODULE, match, pattern_key, within
from gralora_fx.core.planning.targets import TargetRule, ends_with, rule_of, trains_whole_at
from gralora_fx.errors import CheckpointError, bulleted, listed, shown, warn_caller

_MOST = 3  # layers that a message names


@dataclass(frozen=True)
class KnownLayers:
    """The linear layers and the parameters of a model, as an export or a model's class tells them.

    Attributes:
        paths: Paths of its linear layers.
        model_type: transformers' type of the model, or None.
        functional: Paths of functional calls, which PEFT has no adapter at, and whose weights have other names.
        parameters: Names of its parameters, stacks of matrices among them.
    """

    paths: Collection[str]
    model_type: str | None = None
    functional: Collection[str] = ()
    parameters: Collection[str] = ()


def check_agreement(
    config: AdapterConfig,
    sites: Collection[str],
    origin: object,
    known: KnownLayers | None = None,
    *,
    trained: Collection[str] = (),
) -> None:
    """Check that a configuration and tensors are of one adapter (see `disagreements`)."""
    _check(disagreements(config, sites, known, trained=trained), origin)


def check_target_names(
    config: AdapterConfig, sites: Collection[str], origin: object, *, trained: Collection[str] = ()
) -> None:
    """Check that tensors are of layers that `target_modules` names, where a model's own layers tell what is missing.

    PEFT takes a list of names of which the model has some, so a plan warns of the others.
    """
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
    config: AdapterConfig,
    sites: Collection[str],
    known: KnownLayers | None = None,
    *,
    trained: Collection[str] = (),
) -> list[str]:
    """What a configuration says of layers that the tensors do not, or the other way round.

    Every layer that has tensors must be one that the configuration selects, and every name of `target_modules` and
    every key of a pattern must be of a layer that has some. Where the layers and parameters of the model are known,
    each that the configuration selects must have tensors too. Names that other fields leave out, and layers that only
    the model would tell, are not judged.
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
        f"{name} key {shown(key)} counts for no layer that has tensors"
        for name, key in _unused_keys(config, sites)
        if name in config.BEYOND_PEFT
    ]


def warn_of_unused(config: AdapterConfig, sites: Collection[str], origin: str) -> None:
    """Warn of what PEFT ignores in silence: pattern keys and layer indices of no layer that has tensors."""
    unused = [f"{name} key {shown(key)}" for name, key in _unused_keys(config, sites) if name not in config.BEYOND_PEFT]
    rule = _rule(config, None)
    if rule is not None and rule.indices is not None:
        missing = sorted(rule.indices - {rule.layer_index(path) for path in sites})
        unused += [f"layers_to_transform {missing}"] if missing else []
    for what in unused:
        warn_caller(f"{origin}: {what} counts for no layer that has tensors, and is ignored, as PEFT does")


def _rule(config: AdapterConfig, model_type: str | None) -> TargetRule | None:
    """The configuration's choice of layers; None where it depends on a type of model that is not known."""
    return None if config.target_modules is None and model_type is None else rule_of(config, model_type)


def _not_selected(config: AdapterConfig, rule: TargetRule, sites: Iterable[str]) -> Iterator[str]:
    """Layers that have tensors though the configuration does not select them, with the reason."""
    reasons: dict[str, list[str]] = {}
    for path in sites:
        if (reason := rule.rejection(path)) is not None:
            reasons.setdefault(reason, []).append(path)
    for reason, paths in reasons.items():
        targets = _targets(config) if "target_modules" in reason else ""
        yield f"there are tensors of {_named(paths)}, which the configuration does not select: {reason}{targets}"


def _unmet_names(config: AdapterConfig, rule: TargetRule, sites: Iterable[str]) -> Iterator[str]:
    """Names in a list of targets that no layer with tensors has, and no other field leaves out."""
    if config.target_modules is None or rule.indices is not None:
        return  # a name of layers that layers_to_transform leaves out has no tensors
    for name in sorted(rule.names):
        is_excluded = rule.is_excluded(name) or any(ends_with(path, name) for path in rule.excluded)
        is_left_out = is_excluded or rule.excluded_pattern is not None or _is_saved(config, name)
        if not is_left_out and not any(ends_with(path, name) for path in sites):
            yield f"target_modules names {shown(name)}, and no layer of that name has tensors"


def _is_saved(config: AdapterConfig, name: str) -> bool:
    """Whether a name is of modules that train whole, or lies within one."""
    saved = config.saved_module_names
    return any(match(within(SAVED_MODULE, own), name) for own in saved) or trains_whole_at(name, saved)


def _without_tensors(
    config: AdapterConfig, rule: TargetRule, sites: Collection[str], known: Iterable[str]
) -> Iterator[str]:
    """Layers of the model that the configuration selects and that have no tensors.

    `all-linear` leaves one layer out, the output embedding or the head, which only the model tells.
    """
    own = set(sites)
    missing = [
        path
        for path in known
        if path not in own and rule.rejection(path) is None and not trains_whole_at(path, config.saved_module_names)
    ]
    if missing and not (rule.all_linear and len(missing) == 1):
        yield _missing(missing)


def _parameters_without_tensors(config: AdapterConfig, own: Collection[str], known: KnownLayers) -> Iterator[str]:
    """Parameters of the model that the configuration selects and that have no tensors; none if others are unknown."""
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
    """Fields that give sizes by path, and their keys that count for no layer."""
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
