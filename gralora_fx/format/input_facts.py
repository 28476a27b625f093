"""What features know of the inputs of a trace or an export, as signatures and manifests hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

OtherValues = Callable[[Any, Any], Any]  # of an input's value and a generator of random numbers


class InputFacts(Protocol):
    """A frozen record of what one input has to be; a part of the point "input facts" names its class.

    A manifest has its fields under the record's name. `str` of it says in words what the input has to be.

    Attributes:
        input: The input that it is of.
        title: What a line that shows the record begins with.
    """

    input: ClassVar[str]
    title: ClassVar[str]

    @property
    def trace_options(self) -> Mapping[str, Any]:
        """Options of `trace` that make such a trace again."""

    @property
    def smallest(self) -> Sequence[int]:
        """The sizes of the last axes of the smallest input that is taken."""

    def problem(self, shape: Sequence[int], sizes: Sequence[Any]) -> str | None:
        """What is wrong with an input of a shape, and what to do; None if it is taken.

        Args:
            shape: Its shape.
            sizes: The graph's own; anything but a number is an axis that varies.
        """

    def others(self, example: Any) -> Iterator[tuple[str, OtherValues]]:
        """Yield other inputs to compare an export on, each in words, and what makes one of an input's value."""

    def wrong_field(self) -> str | None:
        """Return the name of a field whose value no export writes; None if all are right."""
