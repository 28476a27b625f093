"""Gradient checkpointing of a rewritten model: blocks whose activations the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.errors import RewriteError

if TYPE_CHECKING:
    from gralora_fx.core.graph.block_modules import GraphBlock

_NO_BLOCKS = (
    "gradient checkpointing recomputes blocks, and the trace found none: no ModuleList or Sequential whose members "
    "share a class and run on their own. Name the modules to recompute, as in trace(model, blocks=['encoder.layers.*'])"
)


class Checkpointed:
    """A model whose blocks can be recomputed in the backward pass, and its blocks.

    Attributes:
        _state: The graph and its adapters, of the model.
    """

    _state: AdapterGraph

    @property
    def blocks(self) -> dict[str, GraphBlock]:
        """The blocks by the source model's path: modules for `fully_shard`, hooks and inspection.

        They compute what the model's current graph computes. Tensors of adapters are arguments of theirs, and belong
        to the model itself.
        """
        tree = self._state.base.tree
        return {path: tree.get_submodule(path) for path in self._state.traced.blocks}  # type: ignore[misc]

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, *, every: int = 1
    ) -> None:
        """Keep no activations within blocks while training; the backward pass recomputes them.

        Outputs and gradients are bit for bit the same, dropout included. The blocks are nodes
        `checkpoint(self.model.layers.0, x, ..., use_reentrant=False)` of the graph that runs, in training mode alone.

        Args:
            gradient_checkpointing_kwargs: Options of `torch.utils.checkpoint.checkpoint`; `use_reentrant` is False
                unless it is given.
            every: 1 for every block, n for the first of each n.

        Raises:
            RewriteError: The model has no blocks, or an option is unknown.
        """
        self._checkpoint(gradient_checkpointing_kwargs, every, offload=False)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep no activations within blocks: the name of `gradient_checkpointing_enable` in transformers.

        Args:
            activation_checkpointing_kwargs: Options of `torch.utils.checkpoint.checkpoint`.
            every_n_layers: 1 for every block, n for the first of each n.
            offload: Whether the blocks' inputs are kept in the host's memory.

        Raises:
            RewriteError: The model has no blocks, or an option is unknown.
        """
        self._checkpoint(activation_checkpointing_kwargs, every_n_layers, offload=offload)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._state.set_checkpointing(None)

    activation_checkpointing_disable = gradient_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass of training."""
        return self._state.state.checkpointing is not None

    is_activation_checkpointing = is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Do nothing: adapters' tensors are inputs of their block, so gradients reach them in any case."""

    def disable_input_require_grads(self) -> None:
        """Do nothing, as `enable_input_require_grads` does."""

    def _checkpoint(self, given: Mapping[str, Any] | None, every: int, *, offload: bool) -> None:
        if not self._state.traced.blocks:
            raise RewriteError(_NO_BLOCKS)
        from gralora_fx.core.graph.block_modules import Checkpointing

        self._state.set_checkpointing(Checkpointing.of(given, every, offload=offload))
