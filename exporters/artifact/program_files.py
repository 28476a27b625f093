"""Files for other programs beside an export's models: configurations, `genai_config.json` among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PreTrainedConfig

from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.format.cache_slots import KINDS, CacheSlot, keeps_state, past_slots, slot_of
from gralora_fx.format.export_directory import GENAI_CONFIG, MODEL, MODEL_NAME
from gralora_fx.format.input_names import PAST, PAST_PREFIX, PRESENT_PREFIX
from gralora_fx.run.engine.limits import UNLIMITED, context_length


def write_program_files(stage: Path, traced: TracedModel) -> None:
    """Write `config.json`, and if the model has them `generation_config.json` and files on its task's modules."""
    if traced.config is not None:
        traced.config.save_pretrained(stage)
        path = stage / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["transformers.js_config"] = {"use_external_data_format": True}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if traced.generation_config is not None and PAST in traced.example_inputs:
        traced.generation_config.save_pretrained(stage)
    if traced.appended is not None:
        traced.appended.write(stage)


def write_genai_config(directory: Path, config: PreTrainedConfig, models: Mapping[str, ir.Model]) -> None:
    """Write `genai_config.json` beside a decoder's models, with the additions of its companions."""
    from gralora_fx.base.features import parts

    fields = genai_config(config, models[MODEL])
    for write in parts("program files", models):
        write(directory, config, models, fields)
    (directory / GENAI_CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def genai_config(config: PreTrainedConfig, model: ir.Model) -> dict[str, Any]:
    """Return the contents of `genai_config.json`; sizes of the cache are read from the graph."""
    text = config.get_text_config()
    inputs = {str(value.name): value for value in model.graph.inputs}
    slots = {str(value.name): slot_of(str(value.name)) for value in model.graph.outputs}
    presents = [value for value in model.graph.outputs if (slot := slots[str(value.name)]) and slot.kind.grows]
    pasts = past_slots(model.graph.inputs)
    kinds = list(dict.fromkeys(slot.kind.name for slot in pasts))
    layers = 1 + max(slot.layer for slot in pasts)
    key_heads, head_size = _attention_sizes(pasts)
    growing = [value for slot, value in pasts.items() if slot.kind.grows is not None]
    is_shared = all(map(_is_in_place, presents)) and all(map(_is_attentions_own, growing))
    heads = getattr(text, "num_attention_heads", None) or getattr(text, "n_head", None) or key_heads
    context = context_length(text.to_dict()) or UNLIMITED
    start, end, padding = (getattr(text, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    ends = end if isinstance(end, list) else [end]
    ends = [token for token in ends if _is_token(token, text)] or [0]
    start, padding = (token if _is_token(token, text) else ends[0] for token in (start, padding))
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "gralora-fx", "provider_options": []},
        "filename": MODEL_NAME,
        "head_size": head_size,
        "hidden_size": int(getattr(text, "hidden_size", 0)),
        "num_attention_heads": int(heads),
        "num_key_value_heads": key_heads,
        "num_hidden_layers": layers,
        "inputs": {**names, **{f"past_{kind}_names": f"{PAST_PREFIX}%d.{kind}" for kind in kinds}},
        "outputs": {"logits": "logits", **{f"present_{kind}_names": f"{PRESENT_PREFIX}%d.{kind}" for kind in kinds}},
    }
    windows = {slot.layer: value for slot, value in pasts.items() if slot.kind.is_window}
    if windows and not any(slot.kind.sums_up for slot in pasts):  # onnxruntime-genai needs both then
        decoder["layer_types"] = ["conv" if layer in windows else "full_attention" for layer in range(layers)]
        decoder["conv_cache_size"] = int(next(iter(windows.values())).shape[2])
    return {
        "model": {
            "type": _model_type(config) if keeps_state(pasts) else "decoder",
            "bos_token_id": start,
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": padding,
            "vocab_size": text.vocab_size,
            "context_length": context,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": is_shared,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def _attention_sizes(pasts: Mapping[CacheSlot, ir.Value]) -> tuple[int, int]:
    """Return the number of key heads and their size in the first layer with attention; 1 and 1 without any."""
    shapes = (value.shape for slot, value in pasts.items() if slot.kind is KINDS["key"])
    shape = next(shapes, None)
    return (1, 1) if shape is None else (int(shape[1]), int(shape[3]))  # type: ignore[arg-type]


def _model_type(config: PreTrainedConfig) -> str:
    """Return onnxruntime-genai's name for a model with states, from its class or a text model's `model_type`."""
    named = getattr(config, "architectures", None) or [str(config.model_type)]
    if str(config.model_type).endswith("_text"):
        return str(config.model_type)
    return str(named[0]).partition("For")[0].lower()


def _is_in_place(present: ir.Value) -> bool:
    """Return whether an operator can update a layer's cache in place: fused attention can, a concatenation cannot."""
    producer = present.producer()
    return producer is not None and producer.op_type == "GroupQueryAttention"


def _is_attentions_own(past: ir.Value) -> bool:
    """Return whether only fused attention reads a cache; others would take the buffer's length for the content's."""
    return all(usage.node.op_type == "GroupQueryAttention" for usage in past.uses())


def _is_token(token: object, config: Any) -> bool:
    """Return whether a token id lies within the configuration's vocabulary; onnxruntime-genai refuses others."""
    return isinstance(token, int) and 0 <= token < config.vocab_size
