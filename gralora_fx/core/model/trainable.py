"""The interface of transformers, PEFT and TRL to a model in training: checkpoints, generation, losses, tags."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.errors import RewriteError

if TYPE_CHECKING:
    from gralora_fx.core.graph.block_modules import GraphBlock
    from gralora_fx.core.tracing.as_transformers import TransformersView

_NO_BLOCKS = (
    "gradient checkpointing recomputes blocks, and the trace found none: no ModuleList or Sequential whose members "
    "share a class and run on their own. Name the modules to recompute, as in trace(model, blocks=['encoder.layers.*'])"
)


class Checkpointed:
    """A model's blocks, and their recomputation in the backward pass.

    Attributes:
        _state: The model's graph and adapters.
    """

    _state: AdapterGraph

    @property
    def blocks(self) -> dict[str, GraphBlock]:
        """The blocks by the source model's path: modules for `fully_shard`, hooks and inspection.

        They run the model's current graph. Tensors of adapters are their arguments, and belong to the model itself.
        """
        tree = self._state.base.tree
        return {path: tree.get_submodule(path) for path in self._state.traced.blocks}  # type: ignore[misc]

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the blocks' classes, which accelerate shards one by one."""
        return sorted({type(block).__name__.removeprefix("FSDP") for block in self.blocks.values()})

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, *, every: int = 1
    ) -> None:
        """Keep no activations within blocks while training; the backward pass recomputes them.

        Outputs and gradients are bit for bit the same, dropout included. The blocks are nodes
        `checkpoint(self.model.layers.0, x, ..., use_reentrant=False)` of the graph that runs, in training mode alone.

        Args:
            gradient_checkpointing_kwargs: Options of `torch.utils.checkpoint.checkpoint`; `use_reentrant` is False by
                default.
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
        """True if blocks are recomputed in the backward pass of training."""
        return self._state.state.checkpointing is not None

    is_activation_checkpointing = is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Do nothing: adapters' tensors are inputs of their block, so gradients reach them in any case."""

    def disable_input_require_grads(self) -> None:
        """Do nothing, as `enable_input_require_grads` does."""

    def _checkpoint(self, given: Mapping[str, Any] | None, every: int, *, offload: bool) -> None:
        if not self._state.traced.blocks:
            raise RewriteError(_NO_BLOCKS)
        from gralora_fx.core.graph.checkpointing import Checkpointing

        self._state.set_checkpointing(Checkpointing.of(given, every, offload=offload))


class Trainable(Checkpointed):
    """The interface of a model with adapters for transformers, PEFT and TRL.

    Attributes:
        _state: The model's graph and adapters.
        model_tags: Tags for the model's card on the hub; None without any.
    """

    _state: AdapterGraph
    config: Any
    training: bool
    _view: Any = None
    _other_forward: Callable[..., Any] | None = None
    model_tags: list[str] | None = None
    __call__: Callable[..., Any]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with transformers' own loop and the active adapters, in the model's current mode.

        Args:
            *args: As in transformers' `generate`: the prompt's token ids `[batch, length]`.
            **kwargs: As in transformers' `generate`: `attention_mask`, `max_new_tokens`, `do_sample`, `num_beams`,
                `streamer`, `generation_config` and the others.

        Returns:
            The result of transformers' `generate`: token ids `[batch, length]`, the prompt included.

        Raises:
            TraceError: The model does not generate, or an option is not supported over a trace.
        """
        if hasattr(self, "unshard"):  # FSDP2's hooks gather parameters only in calls of the model itself
            self.unshard()
        return self.base_model.generate(*args, **kwargs)

    def losses_by_adapter(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> dict[str, Tensor]:
        """Run a batch in which rows have different adapters, and compute the loss of each adapter's rows.

        Each loss, and each adapter's gradients from their sum, equal those of a batch of its rows alone. Call a wrapper
        such as DistributedDataParallel itself instead, with `by_adapter=True`.

        Args:
            *args: Inputs by position.
            adapter_names: The adapter of each row; rows of None are in no loss.
            **kwargs: Inputs by name, labels among them.

        Returns:
            The losses by name.

        Raises:
            TraceError: As in `forward`.
            RewriteError: As in `forward`; there are no labels; or an adapter of the batch does not train, in training.
        """
        losses: dict[str, Tensor] = self(*args, **kwargs, adapter_names=adapter_names, by_adapter=True)
        return losses

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings as a module over the parameter that the graph reads.

        Raises:
            TraceError: The model has none, or the module is more than a table.
        """
        return _with_root(self.base_model.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language model's head as a module over the parameters that the graph reads; None without one.

        Raises:
            TraceError: It is more than a linear layer.
        """
        head = self.base_model.get_output_embeddings()
        return None if head is None else _with_root(head)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels right, for collators that make an encoder-decoder's decoder inputs.

        Args:
            labels: Token ids `[batch, length]`, -100 where there is no loss.
        """
        return self.base_model.prepare_decoder_input_ids_from_labels(labels)

    @property
    def base_model(self) -> TransformersView:
        """The model as a transformers model, adapters included, as in PEFT; always the same object.

        Assigning its `forward`, as TRL does to compute losses without logits, replaces the model's own. Its
        `base_model` is the model up to the language model's head.
        """
        from gralora_fx.core.model.forward import compute, run_to_head, starts_of_prompts
        from gralora_fx.core.tracing.as_transformers import Viewed, view_of

        if self._view is None:
            viewed = Viewed(
                traced=lambda: self._state.base.traced,
                run=functools.partial(compute, self),
                parameters=self._parameters_read,
                assign=functools.partial(setattr, self, "generation_config"),
                run_to_head=functools.partial(run_to_head, self),
                starts=functools.partial(starts_of_prompts, self),
                replace_forward=functools.partial(self.__dict__.__setitem__, "_other_forward"),
            )
            self.__dict__["_view"] = view_of(viewed, labels=True)  # no submodule, which it would be as an attribute
        view: TransformersView = self._view
        view.model_tags = self.model_tags
        return view

    def get_base_model(self) -> TransformersView:
        """Return the model as a transformers model, adapters included, as in PEFT; `traced` is the base."""
        return self.base_model

    def can_generate(self) -> bool:
        """Return whether the model can generate."""
        return self._state.traced.can_generate()

    def _parameters_read(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the graph reads, by the names of the source model."""
        adapters, parameters = self._state, self._state.base.parameters_now()
        for name in adapters.state.active:
            for copies in adapters[name].copies.values():
                parameters |= copies
        return parameters

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
        """True if the loss takes `num_items_in_batch`."""
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

        `save_pretrained` and `push_to_hub`, of the model and of Trainer, write them into the card.

        Args:
            tags: A tag, or several; existing ones are kept.
        """
        wanted = [*(self.model_tags or ()), *([tags] if isinstance(tags, str) else tags)]
        self.model_tags = list(dict.fromkeys(wanted))


def _with_root(module: nn.Module) -> nn.Module:
    """Mark a module that no graph calls as sharded already, in a distributed run, so that it stays in the root group.

    accelerate would give embeddings and heads groups of their own, which are gathered only when they are called.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        module.__class__ = type(type(module).__name__, (FSDPModule, type(module)), {})
    return module


class GraphDropout(nn.Dropout):
    """The dropout of a graph, as a module for code that turns dropout off by setting `p` of every such module to 0."""

    def __init__(self, state: AdapterGraph) -> None:
        nn.Module.__init__(self)
        self.inplace = False
        self._state = state

    @property
    def p(self) -> float:
        """The largest probability in the graph's training mode."""
        return self._state.largest_dropout()

    @p.setter
    def p(self, value: float) -> None:
        if value:
            raise RewriteError(
                f"the graph's dropout probabilities are those of the model and its adapters; {value} cannot be set. "
                "Set 0, or set the probabilities before the model is traced"
            )
        self._state.set_dropout(False)
