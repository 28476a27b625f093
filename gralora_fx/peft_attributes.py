"""What users of PEFT and transformers ask a model, and methods of theirs that a graph cannot follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from gralora_fx.config import GraloraConfig
from gralora_fx.errors import RewriteError
from gralora_fx.queries import AdapterQueries
from gralora_fx.store import adapter_names as as_names
from gralora_fx.tracing.as_transformers import TransformersView, device_of, dtype_of, view_of

_EMBEDDING, _LINEAR = "torch.nn.modules.sparse.Embedding", "torch.nn.modules.linear.Linear"


class PeftAttributes(AdapterQueries, nn.Module):
    """PEFT's and transformers' names for what the model has."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return device_of(self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The type of the base model's parameters."""
        return dtype_of(self.traced.graph_module.parameters())

    @property
    def main_input_name(self) -> str:
        """Name of the input that the model is about."""
        return self.traced.main_input_name

    @property
    def generation_config(self) -> GenerationConfig | None:
        """How the model generates; None where it does not."""
        return self.traced.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.traced.generation_config = value

    @property
    def peft_config(self) -> dict[str, GraloraConfig]:
        """The configuration of each adapter, by name."""
        return self.configs

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter; a list where several or none are active."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def base_model(self) -> TransformersView:
        """The model as transformers sees it, its adapters within, as PEFT's is."""
        return view_of(self.traced, self.forward, self, labels=True)

    def get_base_model(self) -> TransformersView:
        """The model as transformers sees it, its adapters within, as PEFT's is; `traced` is the base without them."""
        return self.base_model

    def can_generate(self) -> bool:
        """Whether the model generates."""
        return self.traced.can_generate()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate by transformers' own loop, with the active adapters, in the mode that the model stands in.

        Args:
            *args: As of transformers' `generate`: the prompt's token ids `[batch, length]`.
            **kwargs: As of transformers' `generate`: `attention_mask`, `max_new_tokens`, `do_sample`, `num_beams`,
                `streamer`, `generation_config` and the others.

        Returns:
            What transformers' `generate` returns: token ids `[batch, length]`, the prompt included.

        Raises:
            TraceError: The model does not generate, or an option needs what a trace does not have.
        """
        return self.base_model.generate(*args, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels shifted right, for collators that feed the decoder of an encoder-decoder."""
        return self.base_model.prepare_decoder_input_ids_from_labels(labels)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of values in the base model and all adapters, each counted once.

        Args:
            only_trainable: Whether to count only those that train.
            exclude_embeddings: Whether to leave tables of embeddings out.
        """
        tree = self.traced.tree
        tables = {f"{path}.weight" for path, kind in tree.types.items() if kind == _EMBEDDING}
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
        """The table of token embeddings, as a module over the parameter that the graph reads.

        Raises:
            RewriteError: The model has none, or it is more than a table.
        """
        return self._module_at(self.traced.tree.input_embedding, "input embeddings", _EMBEDDING)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language-model head, as a module over the parameters that the graph reads; None where there is none.

        Raises:
            RewriteError: It is more than a linear layer.
        """
        path = self.traced.tree.output_embedding
        return None if path is None else self._module_at(path, "output embeddings", _LINEAR)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train or not, active or not.

        Raises:
            RewriteError: There is no such adapter.
        """
        for adapter in [self.installed(name) for name in as_names(adapter_names)]:
            adapter.requires_grad_(requires_grad)

    # -- recomputing activations ------------------------------------------------------------------------------------

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Refuse: a graph has no blocks to recompute.

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
        """Nothing to do: it is never on."""

    gradient_checkpointing_disable = activation_checkpointing_disable
    disable_input_require_grads = activation_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Never."""
        return False

    def _module_at(self, path: str | None, what: str, kind: str) -> nn.Module:
        """A module of torch's over the parameters that the graph reads at a path."""
        tree = self.traced.tree
        if path is None:
            raise RewriteError(f"the traced model has no {what} by a path; traced.tree.parameters has its parameters")
        if tree.types[path] != kind:
            raise RewriteError(
                f"the {what} at {path} are a {tree.types[path].rpartition('.')[2]}, not a plain module; its parameters "
                f"are traced.tree.parameters['{path}.weight'] and its kin"
            )
        own = {
            n: p for name in self.active_adapters for c in self.installed(name).copies.values() for n, p in c.items()
        }
        found = {name: own.get(f"{path}.{name}", tree.parameters.get(f"{path}.{name}")) for name in ("weight", "bias")}
        weight = found["weight"]
        assert weight is not None
        shape = weight.shape
        if kind == _EMBEDDING:
            module: nn.Module = nn.Embedding(shape[0], shape[1], device="meta")
        else:
            module = nn.Linear(shape[1], shape[0], bias=found["bias"] is not None, device="meta")
        for name, parameter in found.items():
            if parameter is not None:
                module.register_parameter(name, parameter)
        return module.train(self.training)
