"""Whether the installed packages run an export, as far as its manifest asks for more than the usual versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime
from packaging.version import InvalidVersion, Version

from gralora_fx.errors import ExportError, GraloraError
from gralora_fx.runtime.manifest import Manifest


def check_requirements(directory: Path, manifest: Manifest, error: type[GraloraError] = ExportError) -> None:
    """Check the packages that an export names.

    Args:
        directory: The export directory, for messages.
        manifest: Its manifest.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: a package is missing or too old.
    """
    for package, oldest in (manifest.requires or {}).items():
        found = _version(package)
        try:
            is_enough = found is not None and Version(found) >= Version(oldest)
        except (InvalidVersion, TypeError) as failure:
            raise error(
                f"{directory} requires {package} {oldest!r}, which is not a version; export it again"
            ) from failure
        if not is_enough:
            raise error(
                f"{directory} needs {package} {oldest} or newer, and {found or 'none'} is installed; "
                f"pip install '{package}>={oldest}'"
            )


def _version(package: str) -> str | None:
    if package == "onnxruntime":  # which other distributions bring too
        own: str = onnxruntime.__version__
        return own
    try:
        return version(package)
    except PackageNotFoundError:
        return None
