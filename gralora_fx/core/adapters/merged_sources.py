"""The tensors that merged weights were computed from; while they are unchanged, the merged weights are valid."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor, fx, nn

from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.adapters.base import Base


class Source(NamedTuple):
    """A tensor that a merged weight was computed from or is stored beside, as it was at the merge."""

    table: Mapping[str, Tensor | None]
    key: str
    tensor: Tensor | None
    values: tuple[int, int] | None

    @classmethod
    def of(cls, module: nn.Module, key: str, *, with_values: bool = True) -> Source:
        """Record a module's parameter with its address and version, or its identity only."""
        tensor = module._parameters[key]
        return cls(module._parameters, key, tensor, _values(tensor) if with_values else None)

    @property
    def is_unchanged(self) -> bool:
        """True if the tensor and its recorded values are unchanged."""
        tensor = self.table.get(self.key)
        return tensor is self.tensor and (self.values is None or self.values == _values(tensor))


def sources_of(
    weights: Mapping[str, nn.Parameter], merged: Collection[ModelAdapter], graph_module: fx.GraphModule, base: Base
) -> list[Source]:
    """Return the sources of merged weights, by site path, and of the modules copied to hold them."""
    sources = []
    modules = base.modules
    for site in base.traced.adaptable:
        if site.path in weights:
            sources += [Source.of(*modules[id(site.weight)])] if id(site.weight) in modules else []
            for adapter in merged:
                owners = adapter.factors.owners(site.path) if site.path in adapter.factors else ()
                sources += [source for owner, key in owners for source in _tensor_sources(owner, key)]
    folded = {id(weight) for weight in weights.values()}
    for path, parameter in graph_module.named_parameters(remove_duplicate=False):
        if id(parameter) not in folded:
            continue
        owner, _, key = path.rpartition(".")
        sources.append(Source.of(graph_module.get_submodule(owner), key))
        if (module := _module_at(base.tree, owner)) is not None:
            sources += [Source.of(module, other, with_values=False) for other in module._parameters]
    return sources


def _tensor_sources(module: nn.Module, key: str) -> list[Source]:
    """Return the parameters behind an attribute of a module: itself, or the originals of its parametrization."""
    if key in module._parameters:
        return [Source.of(module, key)]
    behind = module.get_submodule(f"parametrizations.{key}")
    return [Source.of(inner, name) for inner in behind.modules() for name in inner._parameters]


def _module_at(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _values(tensor: Tensor | None) -> tuple[int, int] | None:
    """Return a tensor's address and version counter; inference tensors have version 0."""
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
