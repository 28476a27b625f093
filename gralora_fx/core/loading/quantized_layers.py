"""The quantized layers of a model: rounded to few bits, or packed in memory."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gralora_fx.base.compat.transformers_models import should_convert_module, unquantized_modules
from gralora_fx.base.features import parts
from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.lazy_tensors import (
    copy_lazy,
    is_lazy,
    lazy_parameter,
    raw_values_of,
    values_of,
    with_source,
)
from gralora_fx.base.sources.model_files import RECORD
from gralora_fx.base.sources.packed_tensors import PackedTensor
from gralora_fx.errors import ConfigError, option


def quantized_layers(model: PreTrainedModel, quantization: BaseQuantization) -> Mapping[str, nn.Linear | Conv1D]:
    """Return the layers that transformers has bitsandbytes quantize, by path: linear ones that it does not skip."""
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
    """Round the layers that bitsandbytes quantizes, now or when files are read; record it in the configuration."""
    layers = quantized_layers(model, quantization)
    quantization.rounded(torch.zeros(1, 2).numpy(), "zeros")  # an error before any weight changes
    for path, module in layers.items():
        weight = module.get_parameter("weight")
        rounded = functools.partial(_rounded, quantization, f"{path}.weight", is_turned=isinstance(module, Conv1D))
        if is_lazy(weight):
            with_source(weight, functools.partial(rounded, copy_lazy(weight)))
        else:
            with torch.no_grad():
                weight.copy_(rounded(weight))
    record(model, quantization)


def pack_layers(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    quantization: BaseQuantization,
    stored: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Pack layers in memory, from `stored` tensors by name or by rounding; record it in the configuration."""
    packing = parts("packed weights", {quantization.sign})
    if not packing:
        raise ConfigError(f"weights of {quantization} are read as floats, and not held packed; load the base unpacked")
    (packed_weight,) = packing
    for path, layer in layers.items():
        name, is_turned = f"{path}.weight", isinstance(layer, Conv1D)
        weight = layer.get_parameter("weight")
        values = stored.get(name)
        if not isinstance(values, PackedTensor):
            floats = weight.detach().float()
            values = (floats.T if is_turned else floats).numpy()
        packed = packed_weight(values, name, quantization, is_turned=is_turned)
        layer._parameters["weight"] = lazy_parameter(packed, weight.shape, torch.float32)
        layer.forward = types.MethodType(_unpacked_forward, layer)
    record(model, quantization)


def _unpacked_forward(layer: Any, x: Tensor) -> Tensor:
    """Run a layer, unpacking its weight; in a trace, read the weight, which has a placeholder then."""
    weight: nn.Parameter = layer.weight
    if not weight.is_meta or x.is_meta:
        output: Tensor = type(layer).forward(layer, x)
        return output
    values = values_of(weight, "weight").to(x.dtype)
    return nn.functional.linear(x, values.T if isinstance(layer, Conv1D) else values, layer.bias)


def _rounded(quantization: BaseQuantization, name: str, weight: Tensor, *, is_turned: bool) -> Tensor:
    values = raw_values_of(weight, name).float()
    values = torch.from_numpy(quantization.rounded((values.T if is_turned else values).numpy(), name))
    return values.T if is_turned else values


def record(model: PreTrainedModel, quantization: BaseQuantization) -> None:
    """Record in a model's configuration how its weights were quantized, for adapters and exports of it."""
    setattr(model.config, RECORD, quantization.to_dict())
