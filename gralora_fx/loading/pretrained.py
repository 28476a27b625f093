"""Loading of what transformers saves beside a model, such as a tokenizer, where it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from gralora_fx.errors import GraloraError, first_line
from gralora_fx.progress.stages import quiet
from gralora_fx.sources.model_files import check_json_objects, local_directory


def load_pretrained(
    load: Callable[..., Any],
    name: str | Path,
    error: type[GraloraError],
    *,
    what: str,
    files: Sequence[str],
    configs: Sequence[str],
    remedy: str,
) -> Any | None:
    """What a local directory or a hub id holds of a kind, or None if it has none of its files.

    Args:
        load: A class's `from_pretrained`.
        name: Local directory or hub id.
        error: The error type to raise.
        what: What is loaded, for messages.
        files: The files that it may be in.
        configs: The JSON files that determine how it is read.
        remedy: What to do about files that cannot be loaded.

    Raises:
        GraloraError: Of the given type: a file is damaged or cannot be loaded.
    """
    directory = local_directory(name, error)
    if directory is not None:
        present = [file for file in files if (directory / file).is_file()]
        if not present:
            return None
        check_json_objects(directory, configs, error)
        if empty := [file for file in present if not (directory / file).stat().st_size]:
            raise error(f"{directory / empty[0]} is empty; copy it again")
    try:
        with quiet():
            return load(name, trust_remote_code=False)
    except Exception as failure:  # transformers and tokenizers raise types of their own
        if directory is None:
            present = _downloaded(str(name), files)
        if not present:
            return None
        raise error(
            f"the {what} of {name} cannot be loaded from {', '.join(present)} ({first_line(failure)}); {remedy}"
        ) from failure


def _downloaded(name: str, files: Sequence[str]) -> list[str]:
    """Those of some files of a hub repository that are in the cache, after an attempt to load them."""
    try:
        return [file for file in files if isinstance(try_to_load_from_cache(name, file), str)]
    except HFValidationError:  # neither a directory nor a hub id
        return []
