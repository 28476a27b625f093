"""A PyTorch decoder run step by step: what it cached in one step goes into the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.conversion import base_trace
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.tracing.inputs.decoder_cache import PAST, empty_cache, positions, returned_cache
from gralora_fx.tracing.traced_model import TracedModel


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
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask, ids.shape[1])}
        taken = {name: value for name, value in inputs.items() if name in self._traced.input_names}
        try:
            with torch.no_grad():
                outputs = self._model(**self._traced.constants, **taken, past_key_values=self._cache)
        except Exception as error:  # a model raises what it likes
            raise ExportError(f"the model itself fails on {self._description}: {first_line(error)}") from error
        self._cache = returned_cache(outputs)
        logits: Tensor = outputs["logits"]
        return logits
