"""The versions with which the private API was tested, and the error for others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from gralora_fx.errors import VersionError

TESTED = {"torch": "2.11 to 2.13", "transformers": "5.24", "onnxruntime": "1.24 to 1.32"}


@contextmanager
def fenced(package: str) -> Iterator[None]:
    """Import private names of a package.

    Args:
        package: The package, as pip calls it.

    Raises:
        VersionError: A name is missing; the message names the package, its version and the tested ones.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise VersionError(
            f"{package} {version(package)} is not a version that gralora-fx works with ({error}); it was tested with "
            f"{package} {TESTED[package]}: install one of these, or update gralora-fx"
        ) from error
