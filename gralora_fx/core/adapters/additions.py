"""Tensors and modules that the user's passes register in a module tree, each at one place."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any, NamedTuple

from torch import nn

from gralora_fx.core.graph.pipeline import GraphPass
from gralora_fx.core.graph.surgery import container_at


class Addition(NamedTuple):
    """A tensor or a module that a pass registered."""

    owner: str  # path of the container
    table: str  # the container's table that holds it
    name: str
    is_persistent: bool = True

    @property
    def path(self) -> str:
        """Its path."""
        return f"{self.owner}.{self.name}".lstrip(".")

    def within(self, root: nn.Module) -> Any:
        """Return what a tree has at this place, or None."""
        try:
            return root.get_submodule(self.owner).__dict__[self.table].get(self.name)
        except AttributeError:
            return None

    def put(self, root: nn.Module, value: Any) -> None:
        """Register a value in a tree."""
        container = container_at(root, self.owner)
        container.__dict__[self.table][self.name] = value
        if not self.is_persistent:
            container._non_persistent_buffers_set.add(self.name)

    def remove(self, root: nn.Module) -> None:
        """Remove it from a tree."""
        container = root.get_submodule(self.owner)
        container.__dict__[self.table].pop(self.name, None)
        container._non_persistent_buffers_set.discard(self.name)


Additions = MutableMapping[Addition, GraphPass]  # each with the pass that made it


def put_additions(root: nn.Module, tree: nn.Module, known: Additions, *, shares: bool) -> None:
    """Register in another module what passes added to a tree: the same tensors, or frozen copies."""
    for addition in known:
        value = addition.within(tree)
        if not shares:
            value = copy.deepcopy(value).requires_grad_(False) if addition.table != "_buffers" else value.clone()
        addition.put(root, value)
