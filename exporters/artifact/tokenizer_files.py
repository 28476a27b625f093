"""The files of an export's tokenizer, and of processors for the model's other inputs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, first_line
from gralora_fx.format.tasks import is_encoder_decoder


def write_tokenizer(stage: Path, traced: TracedModel, tokenizer: Any, companions: Collection[str] = ()) -> None:
    """Write the tokenizer's files, adjusted for the modules that the task appends, and any processor of prompts.

    For a model that reads sound features, transformers.js reads the feature extractor, as `preprocessor_config.json`.
    """
    source = tokenizer if isinstance(tokenizer, (str, Path)) else None
    tokenizer = loaded_tokenizer(tokenizer)
    if companions or is_encoder_decoder(traced.task):
        from gralora_fx.base.features import parts

        for reader_of in parts("companion files", companions or [str(traced.task)]):
            tokenizer = reader_of(tokenizer, _places(traced, source, tokenizer)) or tokenizer
    if traced.appended is not None:
        tokenizer = traced.appended.told_to(tokenizer, traced.config)
    features = getattr(tokenizer, "feature_extractor", None) or _feature_extractor(traced, source, tokenizer)
    try:
        tokenizer.save_pretrained(stage)
        if features is not None:
            features.save_pretrained(stage)
    except Exception as error:  # the tokenizers library raises its own types, for a full disk too
        raise ExportError(f"the tokenizer cannot be saved ({first_line(error)})") from error


def loaded_tokenizer(tokenizer: Any) -> Any:
    """Return a given tokenizer, loaded if a directory was given."""
    from gralora_fx.core.loading.tokenizers import load_tokenizer

    loaded = load_tokenizer(tokenizer, ExportError) if isinstance(tokenizer, (str, Path)) else tokenizer
    if loaded is None:
        raise ExportError(f"no tokenizer can be loaded from {tokenizer}, which holds none; give its directory")
    return loaded


def _places(traced: TracedModel, source: str | Path | None, tokenizer: Any) -> list[str | Path]:
    """Return the directories or hub ids that a tokenizer may come from, the likeliest first."""
    places = (source, getattr(tokenizer, "name_or_path", None), traced.tokenizer_source)
    return [place for place in places if place]


def _feature_extractor(traced: TracedModel, source: str | Path | None, tokenizer: Any) -> Any | None:
    """Return the feature extractor beside a tokenizer without one, if the model reads sound features."""
    if not {"input_features", "input_values"} & set(traced.example_inputs):
        return None
    places = _places(traced, source, tokenizer)
    from gralora_fx.core.loading.tokenizers import load_feature_extractor

    return load_feature_extractor(places[0], ExportError) if places else None
