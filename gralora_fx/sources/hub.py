"""Resolution of model and adapter names: a local directory, or a repository on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gralora_fx.errors import GraloraError, shown
from gralora_fx.sources.paths import usable_path


def resolve_directory(
    name_or_path: str | Path,
    error: type[GraloraError],
    *,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
) -> Path:
    """The local directory for `name_or_path`, downloaded from the hub if it is a hub id.

    Args:
        name_or_path: A local directory, or a hub id such as `owner/name`.
        error: The error type to raise.
        revision: Revision of the hub repository.
        patterns: Files to download, as glob patterns; None for all.

    Raises:
        GraloraError: Of the given type, when neither such a directory nor a reachable repository exists.
    """
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
