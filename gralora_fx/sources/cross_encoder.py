"""What sentence-transformers' files of a cross-encoder say beside its model."""

from __future__ import annotations

from pathlib import Path

from gralora_fx.errors import GraloraError, shown
from gralora_fx.sources.hub import resolve_directory
from gralora_fx.sources.model_files import read_json_object
from gralora_fx.sources.sentence_modules import SETTINGS_NAME


def score_function(name: str | Path, error: type[GraloraError]) -> str | None:
    """The function that makes a score of a cross-encoder's output, as a path such as `torch.nn.Identity`.

    Args:
        name: Local directory or hub id; of the latter only a small file is downloaded.
        error: The error type to raise.

    Returns:
        The path; None if it is not a cross-encoder's directory, or names none.

    Raises:
        GraloraError: Of the given type: the file is damaged.
    """
    path = resolve_directory(name, error, patterns=(SETTINGS_NAME,)) / SETTINGS_NAME
    if not path.is_file():
        return None
    settings = read_json_object(path, error)
    function = settings.get("activation_fn") if settings.get("model_type") == "CrossEncoder" else None
    if not (function is None or isinstance(function, str)):
        raise error(f"activation_fn is {shown(function)} in {path}, not a name; repair or copy the file")
    return function
