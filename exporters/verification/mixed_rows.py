"""A graph without a cache whose rows have adapters of their own, seen as one with a single adapter.

Each row that a comparison gives is run beside a copy of itself with another adapter, or none. So what is compared of an
export with one adapter is compared of a batch of several, and a row that gets a wrong adapter shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from gralora_fx.engine.adapters import Adapters
from gralora_fx.errors import ExportError
from gralora_fx.runtime.adapter_inputs import ADAPTER_IDS, is_adapter_input
from gralora_fx.runtime.joined_adapters import BASE
from gralora_fx.runtime.ort_values import as_tensor, as_value, own_value
from gralora_fx.runtime.session_views import SessionView


class MixedRows(SessionView):
    """A session over `model_rows.onnx` with the interface of one whose rows all have one adapter."""

    def __init__(self, session: Any, adapters: Adapters, name: str | None, names: Sequence[str]) -> None:
        """Stack the adapters.

        Args:
            session: The session.
            adapters: Those of the export, as the session takes them.
            name: The adapter of the rows that are given; None for the base.
            names: The adapters that rows and their copies have.
        """
        super().__init__(session)
        stack = adapters.stack_of([adapters[other] for other in names])
        self.count, self.tensors = 1 + len(names), stack.values
        self.number = BASE if name is None else stack.ids[name]

    def get_inputs(self) -> list[Any]:
        """The inputs of the model."""
        return [value for value in self.session.get_inputs() if not is_adapter_input(value.name)]

    def ids(self, rows: int) -> NDArray[np.int64]:
        """`[2 * rows]`: the adapter of every row and, after it, of its copy: the others in turn."""
        others = [number for number in range(self.count) if number != self.number] or [self.number]
        return np.array([number for row in range(rows) for number in (self.number, others[row % len(others)])])

    def run_with_ort_values(self, names: Sequence[str], feed: Mapping[str, Any], options: Any = None) -> list[Any]:
        """Run on the rows and their copies; outputs are those of the rows.

        Raises:
            ExportError: An output is not made of rows.
        """
        types = {value.name: (value.type, value.shape) for value in self.session.get_inputs()}
        batch_axis = types[ADAPTER_IDS][1][0]
        rows, doubled = 0, {}
        for name, value in feed.items():
            kind, shape = types[name]
            if shape and shape[0] == batch_axis:
                rows = value.shape()[0]
                value = as_value(as_tensor(value).repeat_interleave(2, dim=0), kind)
            doubled[name] = value
        ids = OrtValue.ortvalue_from_numpy(self.ids(rows))
        results = self.session.run_with_ort_values(names, {**doubled, **self.tensors, ADAPTER_IDS: ids}, options)
        outputs = zip(names, results, self.session.get_outputs(), strict=True)
        return [_own_rows(name, value, rows, described.type) for name, value, described in outputs]


def _own_rows(name: str, value: Any, rows: int, kind: str) -> Any:
    tensor = as_tensor(value)
    if tensor.ndim == 0 or tensor.shape[0] != 2 * rows:
        raise ExportError(
            f"the output {name} of shape {list(tensor.shape)} is not made of {2 * rows} rows, so adapters cannot be "
            "chosen by row; export the model with adapters='inputs'"
        )
    return own_value(tensor[::2], kind)
