"""Recognition of sentence-transformers models by their files, before any of their modules are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gralora_fx.base.sources.model_directories import resolve_directory
from gralora_fx.base.sources.model_files import read_json_object
from gralora_fx.errors import TraceError, shown
from gralora_fx.format.tasks import Task

SENTENCE_TASK = "sentence-similarity"
TASKS = (Task(SENTENCE_TASK, inputs=("input_ids",), adapters=("FEATURE_EXTRACTION",), encoder_alone=True),)


MODULES_NAME = "modules.json"
SETTINGS_NAME = "config_sentence_transformers.json"

_FILES = (MODULES_NAME, "*sentence*.json", "*_*/config.json", "*_*/model.safetensors")


def inferred_task(names: Iterable[str]) -> tuple[str, dict[str, Any]] | None:
    """Return a sentence encoder's task and the directory of its `modules.json`; None for other directories."""
    directories = map(find_sentence_directory, names)
    directory = next((path for path in directories if path is not None), None)
    return None if directory is None else (SENTENCE_TASK, {"sentence_modules": directory})


def find_sentence_directory(name: str | Path) -> Path | None:
    """Return the directory of a sentence encoder; None without `modules.json`, and for other kinds of models."""
    directory = resolve_directory(name, TraceError, patterns=_FILES)
    if not (directory / MODULES_NAME).is_file():
        return None
    kind = _settings(directory).get("model_type", "SentenceTransformer")
    return directory if kind == "SentenceTransformer" else None


def note_score_function(config: Any, name: str | Path) -> None:
    """Record a cross-encoder's score function in its configuration, where sentence-transformers reads it too."""
    if (function := score_function(name)) is not None:
        config.sentence_transformers = {"activation_fn": function}


def score_function(name: str | Path) -> str | None:
    """Return a cross-encoder's score function as a path, such as `torch.nn.Identity`."""
    path = resolve_directory(name, TraceError, patterns=(SETTINGS_NAME,)) / SETTINGS_NAME
    settings = _settings(path.parent)
    function = settings.get("activation_fn") if settings.get("model_type") == "CrossEncoder" else None
    if not (function is None or isinstance(function, str)):
        raise TraceError(f"activation_fn is {shown(function)} in {path}, not a name; repair or copy the file")
    return function


def _settings(directory: Path) -> dict[str, Any]:
    """Return sentence-transformers' settings of a model; empty if there is no such file."""
    path = directory / SETTINGS_NAME
    return read_json_object(path, TraceError) if path.is_file() else {}
