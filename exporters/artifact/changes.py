"""What an adapter changes of a base, as an export's data are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from gralora_fx.methods.method import Update


@dataclass(frozen=True)
class Changes:
    """What an adapter changes at layers of an export.

    Attributes:
        updates: The update of a weight by the layer's path.
        biases: The change of a bias `[out]` by the layer's path.
    """

    updates: Mapping[str, Update]
    biases: Mapping[str, NDArray[Any]] = field(default_factory=dict)
