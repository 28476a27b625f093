"""The keys of an adapter's tensors in PEFT's files."""

from __future__ import annotations

from torch import Tensor

from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.config.checks import KEY_PREFIX


def checkpoint_parameters(adapter: ModelAdapter) -> dict[str, Tensor]:
    """Return an adapter's trainable tensors by the keys of PEFT's file."""
    parameters: dict[str, Tensor] = {}
    keys = _keys_of_parameters(adapter)
    for site_path, factors in adapter.factors.items():
        for field, tensor in factors._asdict().items():
            if tensor is not None:
                parameters[f"{KEY_PREFIX}{keys.get(site_path, site_path)}.{adapter.method.keys[field]}"] = tensor
    for module, owned in adapter.copies.items():
        for base, parameter in owned.items():
            is_layers_own = module in adapter.factors and base == f"{module}.bias"
            name = f"{module}.base_layer.bias" if is_layers_own else base
            parameters[f"{KEY_PREFIX}{name}"] = parameter
    return parameters


def _keys_of_parameters(adapter: ModelAdapter) -> dict[str, str]:
    """Return what the keys of adapters of parameters begin with, by the names of the parameters."""
    names = [p.site.path for p in adapter.plan.selected if p.site.kind == "parameter"]
    if not names:
        return {}
    from gralora_fx.core.adapters.parameter_keys import parameter_keys

    return parameter_keys(names, nests=adapter.method.NESTS_PARAMETERS)
