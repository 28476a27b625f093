"""Private API for loading and running transformers' models: tensor names, quantized layers, caches, masks."""

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gralora_fx.base.compat.packages import fenced

with fenced("transformers"):
    from transformers.cache_utils import (
        DummyLayer,
        DynamicIndexedLayer,
        DynamicLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionLayer,
    )
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )
    from transformers.integrations import moe as _  # noqa: F401  # it defines the operator of `grouped_product`
    from transformers.masking_utils import (
        AttentionMaskInterface,
        blockwise_overlay,
        causal_mask_function,
        eager_mask,
        or_masks,
        sliding_window_causal_mask_function,
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

__all__ = [
    "ROPE_INIT_FUNCTIONS",
    "AttentionMaskInterface",
    "Concatenate",
    "DummyLayer",
    "DynamicIndexedLayer",
    "DynamicLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionLayer",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "blockwise_overlay",
    "causal_mask_function",
    "eager_mask",
    "get_model_conversion_mapping",
    "grouped_product",
    "has_class",
    "or_masks",
    "rename_source_key",
    "should_convert_module",
    "sliding_window_causal_mask_function",
    "unquantized_modules",
]


def has_class(auto_class: str, config: PreTrainedConfig) -> bool:
    """Return whether an auto class of transformers, by its name, has a class for models of a configuration."""
    return type(config) in getattr(transformers, auto_class)._model_mapping


def unquantized_modules(model: PreTrainedModel, names: Sequence[str] | None) -> list[str]:
    """Return the modules that transformers keeps in floats when it quantizes a model, plus the given ones."""
    given = None if names is None else list(names)
    modules: list[str] = HfQuantizer.get_modules_to_not_convert(model, given, model._keep_in_fp32_modules)
    return modules


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply groups of rows `x [rows, in]`, each by its own matrix of `weight [groups, in, out]`: `[rows, out]`.

    `ends [groups]` are the groups' ends. Tensors with values take one product per non-empty group, which computes only
    the gradients needed; in a compiled graph it is transformers' operator.
    """
    x = x.to(weight.dtype)
    if type(x) not in (Tensor, nn.Parameter):
        result: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, ends.to(torch.int32))
        return result
    parts = zip(x.tensor_split(ends[:-1].cpu()), weight.unbind(), strict=True)
    products = [part @ matrix for part, matrix in parts if len(part)]
    return torch.cat(products) if products else x.new_empty(0, weight.shape[2])
