"""Views of an adapter's tensors in a module tree, read by path at every access so that none is stale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gralora_fx.graph.overlay import ROOT
from gralora_fx.methods import AdapterMethod, AdapterTensors


class _Table:
    """Tensors of a tree by path; pickle and copies leave the tree out, and its owner rebuilds the table."""

    _root: nn.Module

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_root", "_last")}


class FactorTable(_Table, Mapping[str, AdapterTensors]):
    """An adapter's tensors by site path.

    Attributes:
        method: The adapter's method.
        paths: Their attribute paths in the tree, by site path and field of the method's named tuple.
    """

    def __init__(self, root: nn.Module, method: AdapterMethod, paths: Mapping[str, Mapping[str, str]]) -> None:
        """Read from a tree, which owns the tensors."""
        self.method = method
        self.paths = paths
        self._root = root
        self._last: dict[str, AdapterTensors] = {}

    def __getitem__(self, site_path: str) -> AdapterTensors:
        """The tensors at a site."""
        factors = self.method.tensors(**{field: self.tensor(path) for field, path in self.paths[site_path].items()})
        last = self._last.get(site_path)
        if last is None or any(a is not b for a, b in zip(last, factors, strict=True)):
            self._last[site_path] = last = factors
        return last

    def __iter__(self) -> Iterator[str]:
        """The paths of the sites."""
        return iter(self.paths)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self.paths)

    def __contains__(self, site_path: object) -> bool:
        """Whether there are tensors at a site."""
        return site_path in self.paths

    def attributes(self) -> Iterator[str]:
        """The attribute path of every tensor."""
        for paths in self.paths.values():
            yield from paths.values()

    def tensor(self, path: str) -> Tensor:
        """The tensor at an attribute path."""
        return tensor_in(self._root, path)

    def container(self, adapter: str) -> nn.Module:
        """The module that holds an adapter's tensors, its copies of base parameters included."""
        return self._root.get_submodule(f"{ROOT}.{adapter}")

    def owners(self, site_path: str) -> Iterator[tuple[nn.Module, str]]:
        """The modules that hold the tensors at a site, each with the name of the tensor in it."""
        for path in self.paths[site_path].values():
            owner, _, name = path.rpartition(".")
            yield self._root.get_submodule(owner), name


class CopyTable(_Table, Mapping[str, nn.Parameter]):
    """An adapter's own copies of a module's parameters, by the full names of the base's.

    Attributes:
        paths: Their attribute paths in the tree, by the same names.
    """

    def __init__(self, root: nn.Module, paths: Mapping[str, str]) -> None:
        """Read from a tree, which owns the tensors, at an attribute path for each name."""
        self.paths = paths
        self._root = root

    def __getitem__(self, base: str) -> nn.Parameter:
        """The copy of a parameter."""
        return tensor_in(self._root, self.paths[base])  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        """The names of the base's parameters."""
        return iter(self.paths)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self.paths)


def tensor_in(root: nn.Module, path: str) -> Tensor:
    """The tensor at an attribute path of a module tree, a parametrization's result included."""
    *owners, name = path.split(".")
    module = root
    for owner in owners:
        module = module._modules[owner]  # type: ignore[assignment]
    tensor: Tensor = getattr(module, name)
    return tensor
