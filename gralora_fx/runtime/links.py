"""Links in an export directory: none may lead out of it, apart from those of the Hugging Face hub's cache.

The cache keeps a repository's files in `blobs/`, and a directory `snapshots/<revision>/` of symbolic links to them. A
file with several hard links is refused wherever it is, since nothing tells whether another of its names is outside.
"""

from __future__ import annotations

from pathlib import Path

from gralora_fx.errors import GraloraError, first_line


def check_own_file(path: Path, error: type[GraloraError]) -> None:
    """Check that a file is a directory's own: a regular file of one name, not a link, or a snapshot's link to its blob.

    Args:
        path: The file; one that is missing is left to its reader.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: it is a link, or not a regular file.
    """
    try:
        if path.is_symlink() and not _is_snapshot_link(path):
            raise error(f"{path} is a link; copy the file itself into the export directory")
        if not path.exists():
            return
        if not path.is_file():
            raise error(f"{path} is not a regular file; export the model again")
        names = path.stat().st_nlink
    except (OSError, RuntimeError) as failure:
        raise error(f"{path} cannot be read ({first_line(failure)}); export the model again") from failure
    if names > 1:
        raise error(f"{path} is a link; copy the file itself into the export directory (it has {names} names)")


def _is_snapshot_link(path: Path) -> bool:
    """Whether a link in `<repository>/snapshots/<revision>/` leads straight to a file in `<repository>/blobs/`."""
    absolute = path.absolute()
    repositories = [folder.parent.parent for folder in absolute.parents if folder.parent.name == "snapshots"]
    return any(
        not (repository / "blobs").is_symlink() and path.resolve().parent == (repository / "blobs").resolve()
        for repository in repositories
    )
