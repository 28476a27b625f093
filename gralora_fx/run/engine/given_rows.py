"""What stands in the place of the first tokens of a decoder's rows, where the graph takes embeddings beside ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, option
from gralora_fx.run.sessions.ort_values import optional_arguments


class GivenRows:
    """What rows begin with in the place of tokens: nothing, of a decoder that takes ids alone.

    A feature's subclass, a part of the point "given rows", is made of the session. Its `prompts_with` takes prompts and
    the embeddings that `generate` was given, and returns the prompts with them.
    """

    def begin(self, row: int, source: Mapping[str, Any] | None) -> None:
        """Note that a row is opened, or closed.

        Args:
            row: Its number.
            source: What stands in the place of its first tokens, by name, as `model.onnx` takes it of one row. None for
                a row of text alone.

        Raises:
            ServingError: The model does not take it.
        """
        if source is None:
            return
        from gralora_fx.format.tasks import tasks_beside_ids

        others = [f", or export the model with {option(task=task)}" for task in tasks_beside_ids()]
        raise ServingError(
            "the export takes ids alone, so nothing can be put in their place; leave inputs_embeds out"
            + "".join(others)
        )

    def names(self, row: int) -> Mapping[int, int] | None:
        """Return what tells a row's given tokens from others, by position, as token ids tell the rest.

        Rows share what they read where these are alike. None if nothing tells what the row begins with.
        """
        return {}

    def arrays(
        self, read: Mapping[int, NDArray[np.int64]], before: Mapping[int, int], rows: range, ids: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Return what a step is fed beside the ids: of text alone, arrays that stand for any number of tokens.

        Args:
            read: The tokens of each row that reads.
            before: How many it had read before.
            rows: The rows of the step.
            ids: `[rows, length]`, the tokens as the step reads them; those whose embeddings are given become `GIVEN`.
        """
        return {}


def given_rows(session: Any) -> GivenRows:
    """Return what the rows of a session begin with."""
    taken = [value.name for value in optional_arguments(session)]
    if not taken:
        return GivenRows()
    from gralora_fx.base.features import parts

    (kind,) = parts("given rows", taken)
    rows: GivenRows = kind(session)
    return rows
