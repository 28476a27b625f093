"""What transformers, PEFT and TRL ask of a model that they train: checkpoints, generation, embeddings, losses, tags."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.errors import RewriteError

if TYPE_CHECKING:
    from gralora_fx.core.tracing.as_transformers import TransformersView
from collections.abc import Mapping

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


_FUSED_HEAD = "fused_lm_head"  # TRL's argument of a forward that it has replaced
_PACKED = "cu_seq_lens_q"  # where the texts of a row begin, of collators that pack


class Trainable(Checkpointed):
    """A model with adapters as transformers, PEFT and TRL see it.

    Attributes:
        _state: The graph and its adapters, of the model.
        model_tags: Tags for the model's card on the hub; None where there are none.
    """

    _state: AdapterGraph
    forward: Callable[..., Any]
    model_tags: list[str] | None = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate by transformers' own loop, with the active adapters, in the model's current mode.

        Args:
            *args: As of transformers' `generate`: the prompt's token ids `[batch, length]`.
            **kwargs: As of transformers' `generate`: `attention_mask`, `max_new_tokens`, `do_sample`, `num_beams`,
                `streamer`, `generation_config` and the others.

        Returns:
            What transformers' `generate` returns: token ids `[batch, length]`, the prompt included.

        Raises:
            TraceError: The model does not generate, or an option is not supported over a trace.
        """
        return self.base_model.generate(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings, as a module over the parameter that the graph reads.

        Raises:
            TraceError: The model has none, or the module is more than a table.
        """
        return self.base_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language-model head, as a module over the parameters that the graph reads; None without one.

        Raises:
            TraceError: It is more than a linear layer.
        """
        return self.base_model.get_output_embeddings()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels right, for collators that feed an encoder-decoder's decoder.

        Args:
            labels: Token ids `[batch, length]`, -100 where the loss leaves one out.
        """
        return self.base_model.prepare_decoder_input_ids_from_labels(labels)

    @property
    def base_model(self) -> TransformersView:
        """The model as a transformers model, adapters included, as in PEFT."""
        from gralora_fx.core.tracing.as_transformers import view_of

        traced, adapters = self._state.traced, self._state
        parameters = dict(traced.tree.parameters)
        for name in adapters.state.active:
            for copies in adapters[name].copies.values():
                parameters |= copies
        assign = functools.partial(setattr, self, "generation_config")
        view = view_of(traced, self.forward, parameters, labels=True, assign=assign)
        view.model_tags = self.model_tags
        return view

    def get_base_model(self) -> TransformersView:
        """The model as a transformers model, adapters included, as in PEFT; `traced` is the base without them."""
        return self.base_model

    def can_generate(self) -> bool:
        """Whether the model generates."""
        return self._state.traced.can_generate()

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model's parameters."""
        return self.base_model.dtype

    @property
    def main_input_name(self) -> str:
        """Name of the main input."""
        return self._state.traced.main_input_name

    @property
    def loss_type(self) -> str | None:
        """Name of the loss in transformers."""
        return self.base_model.loss_type

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss takes `num_items_in_batch`."""
        return self.base_model.accepts_loss_kwargs

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The generation configuration; None if the model does not generate."""
        return self._state.traced.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._state.base.traced = dataclasses.replace(self._state.traced, generation_config=value)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags for the model's card on the hub, as transformers' models do.

        `push_to_hub`, of the model and of Trainer, writes them into the card; `save_pretrained` writes no card.

        Args:
            tags: A tag, or several; those that are there already stay as they are.
        """
        wanted = [*(self.model_tags or ()), *([tags] if isinstance(tags, str) else tags)]
        self.model_tags = list(dict.fromkeys(wanted))


def check_arguments(names: Container[str]) -> None:
    """Check that no argument is one of TRL's for what a graph does not do."""
    if _FUSED_HEAD in names:
        raise RewriteError(
            "TRL's trainers compute their loss from the hidden states before the language model's head "
            f"({_FUSED_HEAD}=True), which a graph does not return. Train with transformers' Trainer; or give "
            "SFTTrainer its loss: `class SFT(SFTTrainer): compute_loss = Trainer.compute_loss`"
        )
    if _PACKED in names:
        raise RewriteError(
            f"packed rows ({_PACKED}) hold several texts, which the attention of a graph does not keep apart; set "
            "packing=False and padding_free=False"
        )
