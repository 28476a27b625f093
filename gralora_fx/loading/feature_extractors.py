"""Loading of feature extractors, which turn recordings into what a model of speech reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor

from gralora_fx.errors import CheckpointError, GraloraError
from gralora_fx.loading.pretrained import load_pretrained

CONFIG = "preprocessor_config.json"
_FILES = (CONFIG, "processor_config.json")


def load_feature_extractor(name: str | Path, error: type[GraloraError] = CheckpointError) -> Any | None:
    """The feature extractor of a local directory or a hub id, or None if it has none.

    Args:
        name: Local directory or hub id.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: its file is damaged or cannot be loaded.
    """
    return load_pretrained(
        AutoFeatureExtractor.from_pretrained,
        name,
        error,
        what="feature extractor",
        files=_FILES,
        configs=_FILES,
        remedy="repair these files",
    )
