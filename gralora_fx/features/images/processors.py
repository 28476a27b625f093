"""The processor of a model that reads images, which makes pixels of them and writes their place into texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gralora_fx.base.compat.packages import require_extra
from gralora_fx.core.loading.tokenizers import load_processor
from gralora_fx.errors import ExportError, GraloraError, first_line, option


def processor_beside(tokenizer: Any, places: Sequence[str | Path]) -> Any | None:
    """Return the processor to save: the one given, or the one beside the tokenizer; raise if it cannot be loaded."""
    if hasattr(tokenizer, "image_processor"):
        return tokenizer
    if not places:
        return None
    require_extra("vision", "a model that reads images", ExportError)
    found = load_processor(places[0], ExportError)
    if found is None or hasattr(found, "image_processor"):
        return found
    return _Beside(tokenizer, load_image_processor(places[0], ExportError))


@dataclass(frozen=True)
class _Beside:
    """A tokenizer and an image processor of a model without a class for both."""

    tokenizer: Any
    image_processor: Any

    def save_pretrained(self, directory: Path) -> None:
        """Save the files of both."""
        self.tokenizer.save_pretrained(directory)
        self.image_processor.save_pretrained(directory)


def load_image_processor(place: str | Path, error: type[GraloraError]) -> Any:
    """Load what makes pixels of images, of a processor or by itself; raise the error if there is none."""
    require_extra("vision", "a model that reads images", error)
    from transformers import AutoImageProcessor

    own = getattr(load_processor(place, error), "image_processor", None)
    try:
        return own or AutoImageProcessor.from_pretrained(place)
    except Exception as failure:  # transformers raises types of its own
        raise error(
            f"{place} holds no image processor that can be loaded, which makes pixels of images "
            f"({first_line(failure)}); export with {option(tokenizer=...)} where the model's processor is"
        ) from failure
