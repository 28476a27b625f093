"""Steps of a decoder over caches in buffers, each of which is input and output at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.runtime.encoder_decoder_session import PAST, PRESENT
from gralora_fx.runtime.ort_values import as_tensor, empty_values
from gralora_fx.runtime.session import CPU, quiet_run


class BufferedSteps:
    """A session over a decoder, with the caches of its rows and what else stays bound from step to step.

    Attributes:
        caches: The buffers, `[rows, heads, length, size]`, by the names of the inputs.
    """

    def __init__(self, session: Any, *, rows: int, length: int) -> None:
        """Make the buffers, on the CPU.

        Args:
            session: The session.
            rows: How many rows there are.
            length: How many positions a row has room for.
        """
        self._session = session
        self.caches: dict[str, Any] = empty_values(session, rows, length)
        self._copies = session.get_providers() != [CPU]  # a binding copies an input to the device when it is bound
        self._binding = session.io_binding()
        for name, value in self.caches.items():
            self._binding.bind_ortvalue_output(name.replace(PAST, PRESENT, 1), value)
        self._bind(self.caches)
        self._adapters: Mapping[str, Any] = {}  # that are bound

    def __call__(self, arrays: Mapping[str, NDArray[Any]], adapters: Mapping[str, Any]) -> Tensor:
        """Take a step.

        Args:
            arrays: What the step reads, by the names of the inputs.
            adapters: The adapters' tensors by name, as `OrtValue`s; the very same mapping is bound once.

        Returns:
            The logits.
        """
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
        if adapters is not self._adapters:
            values |= adapters
            self._adapters = adapters
        if self._copies:
            values |= self.caches
        self._bind(values)
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding, quiet_run())
        return as_tensor(self._binding.get_outputs()[-1])  # the last that was bound

    def forget_adapters(self) -> None:
        """Let the adapters go that are bound."""
        if self._adapters:
            self._adapters = {}
            self._binding.clear_binding_inputs()
            self._bind(self.caches)

    def _bind(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
