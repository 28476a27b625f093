"""The renaming of checkpoint tensors by transformers while loading."""

from gralora_fx.compat.versions import fenced

with fenced("transformers"):
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["WeightConverter", "WeightRenaming", "get_model_conversion_mapping", "rename_source_key"]
