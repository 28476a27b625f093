"""What schedulers tell about their work, for metrics."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Is told what a scheduler does; called from its thread."""

    def waited(self, seconds: float) -> None:
        """A request, or a row of one, waited before the first of its tokens was read."""

    def began(self, seconds: float, waited: float) -> None:
        """The first token of an answer was chosen, so long after its request, which waited so much of that."""

    def ran(self, seconds: float, rows: int) -> None:
        """A batch ran."""

    def read(self, tokens: int) -> None:
        """Tokens of prompts or texts were read."""

    def generated(self, tokens: int) -> None:
        """New tokens were chosen."""

    def failed(self) -> None:
        """A run failed, other than for a request that is wrong."""
