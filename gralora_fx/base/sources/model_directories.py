"""Resolution of model and adapter names to directories, local or downloaded, and checks of saved models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gralora_fx.base.sources.model_files import (
    EXPORT_FILE,
    GENERATION_CONFIG,
    MODEL_FILE,
    check_json_objects,
    described,
    local_directory,
    read_json_object,
    usable_path,
)
from gralora_fx.errors import GraloraError, option, shown

_CONFIG_FILES = (MODEL_FILE, GENERATION_CONFIG)


def check_model_files(name: str | Path, error: type[GraloraError], *, named_by: str | None = None) -> Path | None:
    """Check that a local directory is a saved model, before anything is loaded."""
    if named_by is not None:
        try:
            return check_model_files(name, error)
        except error as problem:
            reason = str(problem).partition("; give ")[0]
            raise error(
                f"{reason}; it is the base that {named_by} names, so give where it is as {option(model=...)}"
            ) from problem
    from gralora_fx.base.sources.base_quantization import packed_quantization
    from gralora_fx.base.sources.other_formats import gguf_file, of_gguf

    if str(name).endswith(".gguf") and Path(name).is_file():
        raise error(of_gguf(Path(name).parent, Path(name).name))
    directory = local_directory(name, error)
    if directory is None:
        if Path(name).is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
            raise error(
                f"no model can be loaded from {name} (there is no such directory); give a directory or a hub id"
            )
        return None
    if (file := gguf_file(directory)) is not None:
        raise error(of_gguf(directory, file))
    if not (directory / _CONFIG_FILES[0]).is_file():
        raise error(
            f"no {_CONFIG_FILES[0]} in {directory}, which {described(directory)}; give the directory of a saved model"
        )
    if (directory / EXPORT_FILE).is_file():
        raise error(f"{directory} is an export, not a model; give the directory of the model that it was made from")
    check_json_objects(directory, _CONFIG_FILES, error)
    packed_quantization(read_json_object(directory / MODEL_FILE, error), directory, error)
    return directory


def resolve_directory(
    name_or_path: str | Path,
    error: type[GraloraError],
    *,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
) -> Path:
    """Return the local directory of `name_or_path`, downloaded if it is a hub id."""
    remedy = "give a directory or a hub id"
    path, name = usable_path(name_or_path, error, remedy=remedy), str(name_or_path)
    if path.is_dir():
        return path
    if path.is_file():
        raise error(f"{path} is a file; give the directory that holds it")
    if not name.isprintable():
        raise error(f"{shown(name_or_path)} is not a usable path; {remedy}")
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise error(f"no directory {path}; give an existing directory or a hub id")
    from huggingface_hub import snapshot_download  # the hub client is slow to import and seldom needed
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns and list(patterns)))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as failure:
        reason = str(failure).splitlines()[0]
        raise error(f"no directory {name}, and no such repository can be reached on the hub ({reason})") from failure
