"""Steps of a batched decoder over caches in shared buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.errors import GraloraError, ServingError, first_line
from gralora_fx.runtime.adapter_inputs import ADAPTER_IDS
from gralora_fx.runtime.names import PAST_SEQLENS, QUERY_SEQLENS
from gralora_fx.runtime.ort_values import as_tensor, empty_values
from gralora_fx.runtime.session import quiet_run

_PAST = "past_key_values."


class BatchedSteps:
    """A session over a batched decoder, with the caches of its rows: each a buffer that is input and output at once.

    Attributes:
        rows: How many rows there are.
        capacity: How many positions a row has room for; the buffers have room for a padded chunk beyond.
        chunk: The most tokens that a row may read in a step.
    """

    def __init__(
        self, session: Any, *, rows: int, capacity: int, chunk: int, error: type[GraloraError] = ServingError
    ) -> None:
        """Make the buffers, on the CPU.

        Args:
            session: The session.
            rows: How many rows there are.
            capacity: How many positions a row has room for.
            chunk: The most tokens that a row may read in a step.
            error: The error type to raise.
        """
        self.rows, self.capacity, self.chunk = rows, capacity, chunk
        self._session, self._error = session, error
        # the operator writes a chunk as long as the longest one, wherever a row is
        self.caches: dict[str, Any] = empty_values(session, rows, capacity + chunk)

    def __call__(
        self,
        ids: NDArray[np.int64],
        query: NDArray[np.int32],
        past: NDArray[np.int32],
        adapter_ids: NDArray[np.int64],
        adapters: Mapping[str, Any],
    ) -> Tensor:
        """Let rows read tokens.

        Args:
            ids: `[rows, length]`, padded on the right.
            query: `[rows]`, how many tokens of each row count; 0 for an idle row. At least one row reads.
            past: `[rows]`, how many each row has read before.
            adapter_ids: `[rows]`, the adapter of each.
            adapters: The stacked tensors by name.

        Returns:
            Logits `[rows, 1, vocabulary]`, or `[rows, length, vocabulary]` of an export that gives all.

        Raises:
            GraloraError: Of the type given at first: ONNX Runtime fails.
        """
        binding = self._session.io_binding()
        feed = {"input_ids": ids, QUERY_SEQLENS: query, PAST_SEQLENS: past, ADAPTER_IDS: adapter_ids}
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        for name, value in (*self.caches.items(), *adapters.items()):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name, value in self.caches.items():
            binding.bind_ortvalue_output(name.replace(_PAST, "present."), value)
        try:
            self._session.run_with_iobinding(binding, quiet_run())
        except Exception as failure:  # ONNX Runtime raises types of its own
            raise self._error(
                f"ONNX Runtime fails on rows of {query.tolist()} tokens: {first_line(failure)}"
            ) from failure
        return as_tensor(binding.get_outputs()[0])
