"""Atomic writing of pictures and pages."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gralora_fx.picture.layout import PictureError
from gralora_fx.sources.paths import usable_file


def save(text: str, path: str | Path) -> Path:
    """Write a picture or page atomically, creating missing folders.

    Args:
        text: What `svg_of` or `html_of` returned.
        path: The file.

    Returns:
        The file.

    Raises:
        PictureError: It cannot be written.
    """
    target = usable_file(path, PictureError, writes=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            draft = Path(folder) / "draft"
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, target)
    except OSError as error:
        raise PictureError(f"cannot write {target} ({error.strerror}); give the path of a file") from error
    return target
