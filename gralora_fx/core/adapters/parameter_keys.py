"""PEFT's keys for adapters of parameters, which encode the order of a module's parameters instead of their names.

PEFT wraps a module once for each adapted parameter, in the order in which the module defines them. The last one has the
module's key, `moe.lora_A.weight`, and each one before it has one more `base_layer`: `moe.base_layer.lora_A.weight`. For
a method whose adapters of parameters PEFT does not have (GraLoRA), the key has the parameter's name:
`moe.down_proj.gralora_A`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.planning.targets import ends_with, rule_of

WEIGHT_END = ".weight"  # of the name of a layer's weight, behind the layer's path
_WRAPPED = ".base_layer"


def parameter_keys(names: Iterable[str], *, nests: bool) -> dict[str, str]:
    """Return the key prefixes for adapters of parameters, by parameter name."""
    if not nests:
        return {name: name for name in names}
    by_module: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: module + _WRAPPED * (len(own) - 1 - index)
        for module, own in by_module.items()
        for index, name in enumerate(own)
    }


def names_parameter(config: AdapterConfig, path: str) -> bool:
    """Return whether `target_parameters` names the parameter, or the weight of the layer, at a path."""
    return any(is_named(path, name) for name in config.target_parameters or ())


def is_named(path: str, name: str) -> bool:
    """Return whether a name of `target_parameters` fits the parameter at a path, or the weight of a layer there."""
    return ends_with(path, name) or ends_with(f"{path}{WEIGHT_END}", name)


def parameters_in(paths: Iterable[str], config: AdapterConfig) -> dict[str, list[str]]:
    """Return the paths in keys that may be of adapters of parameters, by module, outermost wrapper last."""
    rule = rule_of(config, None)
    modules: dict[str, list[str]] = {}
    for path in paths:
        module = path
        while module.endswith(_WRAPPED):
            module = module.removesuffix(_WRAPPED)
        if module != path or (rule.rejection(path) is not None and _leaves(module, config)):
            modules.setdefault(module, []).append(path)
    return {module: sorted(own, key=len, reverse=True) for module, own in modules.items()}


def names_of_parameters(
    modules: Mapping[str, Sequence[str]], config: AdapterConfig, order: Sequence[str] | None
) -> dict[str, str | None]:
    """Return parameter names by the paths in their keys; None where the order of parameters is not known."""
    names: dict[str, str | None] = {}
    for module, paths in modules.items():
        if order is None:
            own = [f"{module}.{leaf}" for leaf in _leaves(module, config)]
            own = own if len(own) == 1 else []
        else:
            own = [n for n in order if n.rpartition(".")[0] == module and names_parameter(config, n)]
        names |= zip(paths, own if len(own) == len(paths) else [None] * len(paths), strict=True)
    return names


def _leaves(module: str, config: AdapterConfig) -> list[str]:
    """Return the names, without the module's path, that `target_parameters` may mean in a module."""
    split = [name.rpartition(".") for name in config.target_parameters or ()]
    return list(dict.fromkeys(leaf for owner, _, leaf in split if not owner or ends_with(module, owner)))
