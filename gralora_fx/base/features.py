"""Features, and the points at which stages take what they add.

A feature is a capability in a folder of `gralora_fx/features/`, found by its folder. A stage asks for the parts of a
point, whose contract `POINTS` states, and imports no feature itself.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

_PACKAGE = f"{__name__.partition('.')[0]}.features"
# what a feature may add, by point: what a part is, and who asks for it
POINTS: dict[str, str] = {}


@dataclass(frozen=True)
class Feature:
    """A capability in a folder of its own.

    Attributes:
        name: Name of its folder.
        parts: What it adds, by point: `"module:name"` below its folder, or `"module"` for a module whose import is all.
    """

    name: str
    parts: Mapping[str, str] = field(default_factory=dict)

    def part(self, point: str) -> Any:
        """Import what the feature adds at a point."""
        module, _, name = self.parts[point].partition(":")
        found = import_module(f"{_PACKAGE}.{self.name}.{module}")
        return getattr(found, name) if name else found


@cache
def features() -> tuple[Feature, ...]:
    """Return the features whose folders are there, by name."""
    folders = import_module(_PACKAGE).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(folders) if module.ispkg)
    return tuple(import_module(f"{_PACKAGE}.{name}").FEATURE for name in names)


def parts(point: str) -> list[Any]:
    """Import what features add at a point."""
    return [feature.part(point) for feature in features() if point in feature.parts]
