"""Attributes and methods that PEFT and transformers expect of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from gralora_fx.config import AdapterConfig
from gralora_fx.errors import RewriteError
from gralora_fx.model.inspection import AdapterInspection
from gralora_fx.passes.adapter_paths import adapter_names as as_names
from gralora_fx.tracing.as_transformers import TransformersView, view_of


class PeftAttributes(AdapterInspection, nn.Module):
    """PEFT's and transformers' attributes of a model."""

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
        return self.traced.main_input_name

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The generation configuration; None if the model does not generate."""
        return self.traced.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.traced.generation_config = value

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The configuration of each adapter, by name."""
        return self.configs

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter; a list where several or none are active."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def base_model(self) -> TransformersView:
        """The model as a transformers model, adapters included, as in PEFT."""
        parameters = dict(self.traced.tree.parameters)
        for name in self.active_adapters:
            for copies in self.installed(name).copies.values():
                parameters |= copies
        return view_of(self.traced, self.forward, parameters, labels=True)

    @property
    def loss_type(self) -> str | None:
        """Name of the loss in transformers."""
        return self.base_model.loss_type

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss takes `num_items_in_batch`."""
        return self.base_model.accepts_loss_kwargs

    def get_base_model(self) -> TransformersView:
        """The model as a transformers model, adapters included, as in PEFT; `traced` is the base without them."""
        return self.base_model

    def can_generate(self) -> bool:
        """Whether the model generates."""
        return self.traced.can_generate()

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

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels shifted right, for collators that feed an encoder-decoder's decoder."""
        return self.base_model.prepare_decoder_input_ids_from_labels(labels)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters of the base model and all adapters, tied ones counted once.

        Args:
            only_trainable: Whether to count only trainable ones.
            exclude_embeddings: Whether to leave embedding tables out.
        """
        tree = self.traced.tree
        tables = {f"{path}.weight" for path, kind in tree.types.items() if kind.endswith("Embedding")}
        left_out = {id(p) for name, p in tree.parameters.items() if name in tables} if exclude_embeddings else set()
        return sum(
            parameter.numel()
            for parameter in self.all_parameters()
            if id(parameter) not in left_out and (parameter.requires_grad or not only_trainable)
        )

    def all_parameters(self) -> list[nn.Parameter]:
        """The base model's parameters and those of every adapter, each once."""
        adapters = [p for adapter in self._state.adapters.values() for p in adapter.parameters()]
        return list({id(p): p for p in (*self.traced.tree.parameters.values(), *adapters)}.values())

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings, as a module over the parameter that the graph reads.

        Raises:
            TraceError: The model has none, or the module is more than a table.
        """
        return self.base_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The language-model head, as a module over the parameters that the graph reads; None where there is none.

        Raises:
            TraceError: It is more than a linear layer.
        """
        return self.base_model.get_output_embeddings()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set whether adapters train, whether active or not.

        Raises:
            RewriteError: An adapter does not exist.
        """
        for adapter in [self.installed(name) for name in as_names(adapter_names)]:
            adapter.requires_grad_(requires_grad)

    # -- recomputing activations ------------------------------------------------------------------------------------

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Not supported: a graph has no blocks to recompute.

        Raises:
            RewriteError: Always.
        """
        raise RewriteError(
            "gradient checkpointing is not supported: a graph has no blocks to recompute; leave "
            "gradient_checkpointing=True out, and save memory with a smaller per_device_train_batch_size and more "
            "gradient_accumulation_steps"
        )

    gradient_checkpointing_enable = activation_checkpointing_enable
    enable_input_require_grads = activation_checkpointing_enable

    def activation_checkpointing_disable(self) -> None:
        """Do nothing: it is never on."""

    gradient_checkpointing_disable = activation_checkpointing_disable
    disable_input_require_grads = activation_checkpointing_disable

    @property
    def is_activation_checkpointing(self) -> bool:
        """Never."""
        return False

    is_gradient_checkpointing = is_activation_checkpointing
