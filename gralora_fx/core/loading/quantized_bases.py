"""A base as a QLoRA adapter was trained on it: the layers that bitsandbytes would quantize hold the rounded values."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gralora_fx.base.compat.transformers_models import should_convert_module, unquantized_modules
from gralora_fx.base.sources.base_quantization import BaseQuantization, check_not_packed, packed_quantization
from gralora_fx.base.sources.lazy_tensors import copy_lazy, is_lazy, raw_values_of, with_source
from gralora_fx.base.sources.model_files import RECORD
from gralora_fx.errors import ConfigError, TraceError, option


def quantization_of(
    fields: Mapping[str, Any], name: str | Path, asked: BaseQuantization | None
) -> BaseQuantization | None:
    """How the weights in a checkpoint's files are quantized; None of floats."""
    if asked is not None:
        check_not_packed(fields, name, asked, TraceError)
    return packed_quantization(fields, name, TraceError)


def quantized_layers(model: PreTrainedModel, quantization: BaseQuantization) -> Mapping[str, nn.Linear | Conv1D]:
    """The layers that transformers has bitsandbytes quantize, by path: linear ones, but for those that it skips."""
    skipped = unquantized_modules(model, quantization.skip_modules)
    layers = {
        path: module
        for path, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, skipped)
    }
    if not layers:
        raise ConfigError(
            f"{option(base_quantization=str(quantization))} has no effect: transformers finds no linear layer to "
            f"quantize in {type(model).__name__}; leave it out"
        )
    return layers


def round_layers(model: PreTrainedModel, quantization: BaseQuantization) -> None:
    """Give the layers that bitsandbytes quantizes the values that it multiplies by, and record it in the configuration.

    Weights that are left in their files are rounded when they are read.
    """
    layers = quantized_layers(model, quantization)
    quantization.rounded(torch.zeros(1, 2).numpy())  # an error before any weight changes
    for module in layers.values():
        weight = module.get_parameter("weight")
        rounded = functools.partial(_rounded, quantization, is_turned=isinstance(module, Conv1D))
        if is_lazy(weight):
            with_source(weight, functools.partial(rounded, copy_lazy(weight)))
        else:
            with torch.no_grad():
                weight.copy_(rounded(weight))
    record(model, quantization)


def _rounded(quantization: BaseQuantization, weight: Tensor, *, is_turned: bool) -> Tensor:
    values = raw_values_of(weight, "weight").float()
    values = torch.from_numpy(quantization.rounded((values.T if is_turned else values).numpy()))
    return values.T if is_turned else values


def record(model: PreTrainedModel, quantization: BaseQuantization) -> None:
    """Have a model's configuration say how its weights were quantized, for adapters and exports of it."""
    setattr(model.config, RECORD, quantization.to_dict())
