"""What transformers' models are loaded and run with: names of tensors, layers that are quantized, masks."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from gralora_fx.compat.versions import fenced

with fenced("transformers"):
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.masking_utils import (
        AttentionMaskInterface,
        blockwise_overlay,
        causal_mask_function,
        eager_mask,
        or_masks,
        sliding_window_causal_mask_function,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

__all__ = [
    "AttentionMaskInterface",
    "WeightConverter",
    "WeightRenaming",
    "blockwise_overlay",
    "causal_mask_function",
    "eager_mask",
    "get_model_conversion_mapping",
    "or_masks",
    "rename_source_key",
    "should_convert_module",
    "sliding_window_causal_mask_function",
    "unquantized_modules",
]


def unquantized_modules(model: PreTrainedModel, names: Sequence[str] | None) -> list[str]:
    """Names of the modules that transformers leaves in floats when it quantizes a model, and the given ones."""
    given = None if names is None else list(names)
    modules: list[str] = HfQuantizer.get_modules_to_not_convert(model, given, model._keep_in_fp32_modules)
    return modules
