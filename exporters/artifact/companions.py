"""Files written with an export's models: the configuration and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gralora_fx.errors import ExportError, first_line
from gralora_fx.loading.tokenizers import load_feature_extractor, load_tokenizer, with_sentence_settings
from gralora_fx.sources.sentence_modules import SETTINGS_NAME
from gralora_fx.tracing.inputs.cache import PAST
from gralora_fx.tracing.traced_model import TracedModel


def write_companions(stage: Path, traced: TracedModel, tokenizer: Any) -> None:
    """Write `config.json`, `generation_config.json` of a model that generates, and the tokenizer's files.

    For a model that reads features of sound the feature extractor is written too, as `preprocessor_config.json`, which
    transformers.js reads: that of a processor, or the one beside the tokenizer. A sentence encoder's tokenizer
    truncates and lowercases as its directory says; its prompts are written too.

    Args:
        stage: Where to write them.
        traced: The trace that is exported.
        tokenizer: A tokenizer, a processor, or the directory of a tokenizer; None for none.

    Raises:
        ExportError: The tokenizer cannot be loaded or saved.
    """
    if traced.config is not None:
        traced.config.save_pretrained(stage)
        path = stage / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["transformers.js_config"] = {"use_external_data_format": True}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if traced.generation_config is not None and PAST in traced.example_inputs:
        traced.generation_config.save_pretrained(stage)
    if traced.sentence is not None and traced.sentence.settings:
        text = json.dumps(traced.sentence.settings, indent=2, sort_keys=True, ensure_ascii=False)
        (stage / SETTINGS_NAME).write_text(f"{text}\n", encoding="utf-8")
    if tokenizer is None:
        return
    source = tokenizer if isinstance(tokenizer, (str, Path)) else None
    if isinstance(tokenizer, (str, Path)):
        loaded = load_tokenizer(tokenizer, ExportError)
        if loaded is None:
            raise ExportError(f"no tokenizer can be loaded from {tokenizer}, which holds none; give its directory")
        tokenizer = loaded
    if traced.sentence is not None:
        tokenizer = with_sentence_settings(tokenizer, traced.sentence, traced.config)
    features = getattr(tokenizer, "feature_extractor", None) or _feature_extractor(traced, source, tokenizer)
    try:
        tokenizer.save_pretrained(stage)
        if features is not None:
            features.save_pretrained(stage)
    except Exception as error:  # the tokenizers library raises types of its own, for a full disk too
        raise ExportError(f"the tokenizer cannot be saved ({first_line(error)})") from error


def _feature_extractor(traced: TracedModel, source: str | Path | None, tokenizer: Any) -> Any | None:
    """The feature extractor beside a tokenizer that was given without one, for a model that reads features."""
    if not {"input_features", "input_values"} & set(traced.example_inputs):
        return None
    places = (source, getattr(tokenizer, "name_or_path", None), traced.tokenizer_source)
    place = next((place for place in places if place), None)
    return None if place is None else load_feature_extractor(place, ExportError)
