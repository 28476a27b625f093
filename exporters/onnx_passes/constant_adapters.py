"""Adapter tensors that a model takes as inputs, made constants of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.graph.pipeline import PassResult


@dataclass(frozen=True)
class ConstantAdapters:
    """Gives the stacked adapter tensors of a model their values, so that rows choose among fixed adapters.

    Before:
        graph(input_ids, adapter_ids, query.gralora_A, ...)
    After:
        graph(input_ids, adapter_ids)      with initializers query.gralora_A, ...

    Attributes:
        arrays: The tensors of all adapters, stacked, by the names of the inputs.
    """

    arrays: Mapping[str, NDArray[Any]]

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Change the model."""
        graph = model.graph
        values = {value.name: value for value in graph.inputs}
        for name, array in self.arrays.items():
            value = values[name]
            graph.inputs.remove(value)
            value.const_value = ir.Tensor(array, name=name)
            value.shape = ir.Shape(array.shape)
            graph.register_initializer(value)
        return PassResult(len(self.arrays))
