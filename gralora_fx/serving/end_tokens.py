"""The tokens that end an answer, from the files beside a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gralora_fx.errors import ServingError, shown
from gralora_fx.sources.model_files import GENERATION_CONFIG, read_json_object

_FIELD = "eos_token_id"


def end_tokens(directory: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """Ids of the tokens that end an answer: those of `generation_config.json`, else those of `config.json`.

    Args:
        directory: The export directory.
        config: Fields of the model's `config.json`.

    Returns:
        The ids; none for a model that answers until it is stopped.

    Raises:
        ServingError: The field is not an id or a list of ids.
    """
    path = directory / GENERATION_CONFIG
    found = read_json_object(path, ServingError).get(_FIELD) if path.is_file() else None
    if found is None:
        text = config.get("text_config")
        found = config.get(_FIELD, text.get(_FIELD) if isinstance(text, Mapping) else None)
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if wrong := [end for end in ends if type(end) is not int or end < 0]:
        raise ServingError(
            f"{_FIELD} of {directory} has {shown(wrong[0])}, not an id of a token; export the model again"
        )
    return frozenset(ends)
