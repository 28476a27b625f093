"""An exported decoder run step by step: what it cached in one step goes into the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gralora_fx.runtime.ort_values import as_tensor, empty_values, run_values
from gralora_fx.runtime.session_views import as_past
from gralora_fx.tracing.inputs.decoder_cache import positions

Step = Callable[[Tensor, Tensor], Tensor]  # from new ids and the mask of all positions to logits


class DecoderSteps:
    """A decoder of one graph, with the cache of the steps that it has taken."""

    def __init__(self, session: Any, batch: int, description: str = "a step") -> None:
        """Begin with an empty cache.

        Args:
            session: A session over an export with a cache.
            batch: Number of rows.
            description: What is being run, for messages.
        """
        self._session, self._description = session, description
        self._takes = {value.name for value in session.get_inputs()}
        self._cache = empty_values(session, batch)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read new tokens.

        Args:
            ids: `[batch, new]`.
            mask: `[batch, all]`, over those that were read before too; 0 where a position is padding.

        Returns:
            Logits `[batch, new, vocabulary]`, or `[batch, 1, vocabulary]` of an export that gives the last alone.

        Raises:
            ExportError: ONNX Runtime fails.
        """
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask, ids.shape[1])}
        feed = {name: value for name, value in inputs.items() if name in self._takes}
        results = run_values(self._session, {**feed, **self._cache}, self._description)
        self._cache = as_past(results)
        return as_tensor(results["logits"])
