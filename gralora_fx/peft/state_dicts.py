"""Adapter state dicts with the keys of PEFT's files, and preparation of a base for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gralora_fx.core.adapters.adapter import checkpoint_parameters
from gralora_fx.core.adapters.checkpoint import check_state_dict, gathered, load_tensors
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.errors import ConfigError, RewriteError


class LoadedKeys(NamedTuple):
    """Result of loading tensors; both lists are empty, since keys that do not fit raise an error."""

    missing_keys: list[str]  # keys that were not given
    unexpected_keys: list[str]  # keys that fit nothing


def get_peft_model_state_dict(
    model: GraloraModel,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors by the keys of PEFT's files, gathered if FSDP2 shards them.

    Args:
        model: The rewritten model.
        state_dict: The model's current state dict, if available.
        adapter_name: Name of the adapter.
        unwrap_compiled: Whether the model was returned by `torch.compile`.
        save_embedding_layers: "auto" or False.

    Raises:
        CheckpointError: The state dict's values are not the model's.
        RewriteError: The adapter does not exist.
    """
    if save_embedding_layers not in ("auto", False):
        raise ConfigError("save_embedding_layers=True is not supported; name the embedding in modules_to_save")
    adapter = _unwrapped(model, unwrap_compiled).adapter(adapter_name)
    if state_dict is not None:
        check_state_dict(adapter, state_dict)
    return {key: tensor.detach() for key, tensor in gathered(checkpoint_parameters(adapter)).items()}


def set_peft_model_state_dict(
    model: GraloraModel,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadedKeys:
    """Load an adapter's tensors, all or none.

    Args:
        model: The rewritten model.
        peft_model_state_dict: The tensors by the keys of PEFT's files.
        adapter_name: Name of the adapter.
        ignore_mismatched_sizes: Must be False.
        low_cpu_mem_usage: Accepted, and ignored.

    Raises:
        CheckpointError: A key is missing or fits nothing, or a shape differs; nothing has changed.
        RewriteError: The adapter does not exist.
    """
    if ignore_mismatched_sizes:
        raise ConfigError("ignore_mismatched_sizes=True would leave tensors as they are; give those of this adapter")
    state = model._state
    with state.writing():
        state.check_not_merged("load tensors")
        load_tensors(state[adapter_name], peft_model_state_dict, state.traced.tree, "the state dict")
    return LoadedKeys([], [])


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Freeze a base model, cast its half-precision parameters to float32, and enable gradient checkpointing.

    Args:
        model: The base model, before `get_peft_model`.
        use_gradient_checkpointing: Whether blocks are recomputed in the backward pass.
        gradient_checkpointing_kwargs: Options of `torch.utils.checkpoint.checkpoint`.

    Raises:
        RewriteError: The model has adapters already.
    """
    if isinstance(model, GraloraModel):
        raise RewriteError("the model has adapters already; prepare the base, then call get_peft_model")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.float()
    if use_gradient_checkpointing:
        older = getattr(model, "gradient_checkpointing_enable", None)  # its name until transformers 5.24
        enable: Any = getattr(model, "activation_checkpointing_enable", older)
        enable(gradient_checkpointing_kwargs)
    return model


def _unwrapped(model: Any, unwrap_compiled: bool) -> GraloraModel:
    """Return the model inside a `torch.compile` wrapper."""
    unwrapped: GraloraModel = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    return unwrapped
