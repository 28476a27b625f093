"""The state of a rewritten graph, and the graph built for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from gralora_fx.errors import MergeError
from gralora_fx.graph.pipeline import GraphPass


@dataclass(frozen=True)
class GraphState:
    """A state of a rewritten graph.

    Attributes:
        active: Names of the adapters whose outputs are added, merged ones included.
        merged: Names of those that are folded into `weights`.
        weights: The folded weights by site path.
        unties: Whether tied weights were untied for that.
        passes: The user's passes, which run over every graph.
        training: The mode.
    """

    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    weights: Mapping[str, nn.Parameter] = field(default_factory=dict)
    unties: bool = False
    passes: tuple[GraphPass, ...] = ()
    training: bool = False

    @property
    def identity(self) -> Hashable:
        """What tells it from other states, the mode apart: the names, and which weights and passes these are."""
        return (self.active, self.merged, *map(id, self.weights.values()), *map(id, self.passes))

    @property
    def is_repeatable(self) -> bool:
        """Whether its graph is the same whenever it is built: nothing is merged, and no pass of the user runs."""
        return not self.merged and not self.passes


class Source(NamedTuple):
    """A tensor that a merged weight was computed from or is stored beside, as it was then."""

    table: Mapping[str, Tensor | None]
    key: str
    tensor: Tensor | None
    values: tuple[int, int] | None

    @classmethod
    def of(cls, module: nn.Module, key: str, *, with_values: bool = True) -> Source:
        """Record a module's parameter as it is now, with the version of its values or only its identity."""
        tensor = module._parameters[key]
        return cls(module._parameters, key, tensor, _values(tensor) if with_values else None)

    @property
    def is_unchanged(self) -> bool:
        """Whether it is the same tensor with the same values as when recorded."""
        tensor = self.table.get(self.key)
        return tensor is self.tensor and (self.values is None or self.values == _values(tensor))


class Running:
    """A state and its graph, which no later switch changes for a thread that runs it.

    Attributes:
        state: The state.
        graph_module: The graph, over tensors of the parameter tree and the merged weights.
        casts: The dtypes of adapters and layers for which it was built.
        is_lent: Whether someone else may hold the merged weights (a caller that was given the graph, autograd, a
            compiled program), so that their memory must not be written again.
    """

    def __init__(
        self,
        state: GraphState,
        graph_module: fx.GraphModule,
        casts: tuple[tuple[torch.dtype, torch.dtype], ...],
        sources: Iterable[Source],
    ) -> None:
        """Pair a state with its graph."""
        self.state = state
        self.graph_module = graph_module
        self.casts = casts
        self.is_lent = False
        self._code = graph_module.code
        self._sources = tuple(sources)

    def with_mode(self, training: bool, graph_module: fx.GraphModule) -> Running:
        """The same state in the other mode, with its graph, over the same merged weights; it is edited if this is."""
        other = Running(dataclasses.replace(self.state, training=training), graph_module, self.casts, self._sources)
        other._code = other._code if not self.is_edited else ""
        self.is_lent = other.is_lent = True
        return other

    @property
    def is_edited(self) -> bool:
        """Whether the graph was recompiled since it was built, as after an edit."""
        return self.graph_module.code is not self._code

    @property
    def is_fresh(self) -> bool:
        """Whether the merged weights are up to date with the tensors they were computed from."""
        return all(source.is_unchanged for source in self._sources)

    def check_fresh(self) -> None:
        """Check that the tensors behind the merged weights have not changed.

        Raises:
            MergeError: A tensor that was folded, or a folded weight, was replaced or written to.
        """
        if not self.is_fresh:
            changed = next(source.key for source in self._sources if not source.is_unchanged)
            raise MergeError(
                f"a tensor ({changed}) changed after {', '.join(self.state.merged)} was merged, so the merged weights "
                "are not those of the model any more; call unmerge_adapter(), and merge again"
            )


def _values(tensor: Tensor | None) -> tuple[int, int] | None:
    """A tensor's address and version counter; the version of an inference tensor counts as 0."""
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
