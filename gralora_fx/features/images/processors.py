"""The processor of a model that reads images, which makes pixels of them and writes their place into texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gralora_fx.base.compat.packages import require_extra
from gralora_fx.core.loading.tokenizers import load_processor
from gralora_fx.errors import ExportError


def processor_beside(tokenizer: Any, places: Sequence[str | Path]) -> Any | None:
    """Return the processor to save: the one given, or the one beside the tokenizer; raise if it cannot be loaded."""
    if hasattr(tokenizer, "image_processor"):
        return tokenizer
    if not places:
        return None
    require_extra("vision", "a model that reads images", ExportError)
    return load_processor(places[0], ExportError)
