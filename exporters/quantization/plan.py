"""The plan of an export's quantization: the format of every matrix that a product reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gralora_fx.exporters.quantization.formats import Format


@dataclass(frozen=True)
class QuantizationPlan:
    """The format of each constant matrix; it is chosen before the conversion.

    Attributes:
        default: The format of every matrix that has none of its own.
        by_matrix: Formats of their own by the names of the parameters; None for one that stays float. Of a parameter
            with several names each is in it.
    """

    default: Format
    by_matrix: Mapping[str, Format | None] = field(default_factory=dict)

    def format_of(self, names: Iterable[str]) -> Format | None:
        """The format of a matrix, or None for one that stays float.

        Args:
            names: Names of the parameters that it holds side by side, which have one format.
        """
        return next((self.by_matrix[name] for name in names if name in self.by_matrix), self.default)
