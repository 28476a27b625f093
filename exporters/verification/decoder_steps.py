"""A decoder run step by step, as exported and in PyTorch: what it cached in one step goes into the next."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.conversion import base_trace
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.runtime.ort_values import as_tensor, empty_values, run_values
from gralora_fx.runtime.session_views import as_past
from gralora_fx.tracing.inputs.cache import PAST, empty_cache, positions, returned_cache
from gralora_fx.tracing.traced_model import TracedModel

Step = Callable[[Tensor, Tensor], Tensor]  # from new ids and the mask of all positions to logits


def step_inputs(ids: Tensor, mask: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """What a decoder takes of a step: new tokens, the mask of all positions, and the new ones' places.

    Args:
        ids: `[batch, new]`.
        mask: `[batch, all]`, over those that were read before too; 0 where a position is padding.
        names: The inputs that the decoder has.
    """
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask, ids.shape[1])}
    return {name: value for name, value in inputs.items() if name in names}


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
        self._names = {value.name for value in session.get_inputs()}
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
        inputs = step_inputs(ids, mask, self._names)
        results = run_values(self._session, {**inputs, **self._cache}, self._description)
        self._cache = as_past(results)
        return as_tensor(results["logits"])


class ModelSteps:
    """A traced decoder with the cache of the steps that it has taken; what `DecoderSteps` is for an export."""

    def __init__(self, model: TracedModel | GraloraModel, batch: int, description: str = "a step") -> None:
        """Begin with an empty cache.

        Args:
            model: The model, traced with a cache, in evaluation mode.
            batch: Number of rows.
            description: What is being run, for messages.
        """
        self._model, self._traced, self._description = model, base_trace(model), description
        self._cache: Any = empty_cache(self._traced.example_inputs[PAST], batch)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read new tokens.

        Args:
            ids: `[batch, new]`.
            mask: `[batch, all]`, over those that were read before too; 0 where a position is padding.

        Returns:
            Logits `[batch, new, vocabulary]`.

        Raises:
            ExportError: The model fails.
        """
        inputs = step_inputs(ids, mask, self._traced.input_names)
        try:
            with torch.no_grad():
                outputs = self._model(**self._traced.constants, **inputs, past_key_values=self._cache)
        except Exception as error:  # a model raises what it likes
            raise ExportError(f"the model itself fails on {self._description}: {first_line(error)}") from error
        self._cache = returned_cache(outputs)
        logits: Tensor = outputs["logits"]
        return logits
