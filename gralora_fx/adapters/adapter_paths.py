"""Attribute paths of adapters' tensors in a graph module: `gralora.<adapter>.<site path>.gralora_A` and so on."""

from __future__ import annotations

from torch import nn

from gralora_fx.config.adapter_names import check_adapter_letters, refuse_name
from gralora_fx.errors import RewriteError
from gralora_fx.graph.overlay import ROOT
from gralora_fx.methods import AdapterMethod, AdapterTensors


def check_adapter_name(name: object) -> None:
    """Check that a name can be part of an attribute path, of code and of a file path.

    Raises:
        ConfigError: It is not a string, is empty, is an attribute of every module or a Python keyword, or holds a dot,
            a slash, a quote or an unprintable character.
    """
    check_adapter_letters(name)
    if hasattr(nn.Module(), str(name)):
        raise refuse_name(name)


def adapter_names(names: object) -> list[str]:
    """The name of an adapter, or several, as a list.

    Raises:
        RewriteError: It is neither a string nor a list of strings.
    """
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, (list, tuple, set, frozenset, dict)) or not all(isinstance(name, str) for name in listed):
        raise RewriteError(f"expected the name of an adapter or a list of names, but got {names!r}")
    return list(listed)


def put(root: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Register a parameter at a dotted path, creating missing modules."""
    *owners, attribute = path.split(".")
    module = root
    for owner in owners:
        if owner not in module._modules:
            module.add_module(owner, nn.Module())
        module = module.get_submodule(owner)
    module.register_parameter(attribute, parameter)


def drop(root: nn.Module, adapter: str) -> None:
    """Remove everything an adapter stored."""
    adapters = root._modules.get(ROOT)
    if adapters is not None:
        adapters._modules.pop(adapter, None)
        if not adapters._modules:
            del root._modules[ROOT]


def factor_paths(adapter: str, site_path: str, method: AdapterMethod, factors: AdapterTensors) -> dict[str, str]:
    """Attribute paths of an adapter's tensors at one site, by field of the method's named tuple."""
    present = {field for field, tensor in factors._asdict().items() if tensor is not None}
    return {field: f"{ROOT}.{adapter}.{site_path}.{name}" for field, name in method.names().items() if field in present}


def copy_path(adapter: str, name: str) -> str:
    """Attribute path of an adapter's own copy of the base's parameter `name`."""
    return f"{ROOT}.{adapter}.{name}"
