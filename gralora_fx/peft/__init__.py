"""PEFT's names for traced models: a script that trains with PEFT changes only its import."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from gralora_fx.core.config import GraloraConfig
from gralora_fx.core.methods.lora import LoraConfig
from gralora_fx.peft.auto_models import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from gralora_fx.peft.callbacks import StopAtNonFinite
from gralora_fx.peft.peft_configs import PeftConfig, PeftType, TaskType, get_peft_config
from gralora_fx.peft.peft_model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from gralora_fx.peft.state_dicts import (
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "GraloraConfig",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "StopAtNonFinite",
    "TaskType",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]

_INSTEAD = {
    "inject_adapter_in_model": "call get_peft_model, which returns a model with adapters in its graph",
    "PeftMixedModel": "get_peft_model takes adapters of all methods in one model",
    "cast_mixed_precision_params": "convert the model before get_peft_model; adapters of half precision are float32",
    "get_layer_status": "the model's adapters_at(path) and active_adapters say it",
    "get_model_status": "the model's active_adapters, merged_adapters and plans say it",
    "replace_lora_weights_loftq": "load the base with base_quantization (gralora_fx.loading.load_model)",
    "bloom_model_postprocess_past_key_value": "the graph's cache is transformers' DynamicCache",
    "shift_tokens_right": "the model's prepare_decoder_input_ids_from_labels does it",
    "load_peft_weights": "PeftModel.from_pretrained reads an adapter's files",
}


def __getattr__(name: str) -> Any:
    """Raise for a name of PEFT's that this package lacks, saying what to use instead."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _INSTEAD:
        raise ImportError(f"gralora_fx.peft has no {name}: {_INSTEAD[name]}")
    if name.endswith(("Config", "Model")):
        from gralora_fx.core.methods.registry import known_methods

        known = ", ".join(method.config.TITLE for method in known_methods())
        raise ImportError(
            f"gralora_fx.peft has no {name}: the methods here are {known}; train another one with peft itself, or add "
            "it with gralora_fx.methods.register"
        )
    if find_spec("peft") is None or not hasattr(import_module("peft"), name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor has PEFT")
    raise ImportError(f"gralora_fx.peft has no {name}; it has {', '.join(__all__)}. Import others from peft itself")
