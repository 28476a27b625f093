"""Memory sizes as text, such as `512MiB`."""

from __future__ import annotations

import re

from gralora_fx.errors import option, shown

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z]*)")


def read_size(text: object) -> int | None:
    """Parse a size such as `512MiB`, `1.5 GB` or `1048576` into bytes; None if it is invalid or below 1."""
    match = _SIZE.fullmatch(text) if isinstance(text, str) and text.isascii() else None
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None:
        return None
    return int(float(match[1]) * unit) or None


def size_problem(name: str, text: object) -> str | None:
    """Describe why an option's size is invalid; None if it is valid."""
    if read_size(text) is not None:
        return None
    return f"{option(name)} must be a number of bytes above 0, such as 512MiB or 2GB, but got {shown(text)}"


def shown_size(size: int) -> str:
    """Format a number of bytes for a message: `19.5 MiB`."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size:,} bytes"
