"""What `generate` and schedulers ask of a decoder, however its cache is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from gralora_fx.serving.decoder_limits import DecoderLimits
from gralora_fx.serving.token_choice import Choice, TokenChooser


class DecoderRows(Protocol):
    """Prompts that run as one batch, a row each."""

    def step(self, choosers: Mapping[int, TokenChooser]) -> dict[int, Choice]:
        """Choose the next token of some rows.

        Args:
            choosers: Of each row that goes on, what chooses its tokens. A row that is left out is over.

        Raises:
            ServingError: The runtime fails.
        """
        ...


class Decoder(Protocol):
    """A decoder of prompts."""

    @property
    def limits(self) -> DecoderLimits:
        """What it can take."""
        ...

    def rows(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, adapter: str | Sequence[str | None] | None
    ) -> DecoderRows:
        """Read prompts as one batch.

        Args:
            prompts: Token ids of each, within the limits.
            new_tokens: The most tokens that a row may add.
            adapter: The adapter to run with, None for the base; of a batched export also one for each row.

        Raises:
            ServingError: There is no such adapter, or the runtime fails.
        """
        ...
