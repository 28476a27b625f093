"""Inputs of a decoder's step that a caller may leave out: those with which drafts are verified."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.format.export_directory import ATTENTION_SEQLENS, LOGITS_INDICES


def optional_draft_inputs(model: ir.Model) -> PassResult[ir.Model]:
    """Give the inputs of a rows' graph with which drafts are verified a value that stands for none.

    Before: `graph(input_ids, query_seqlens, past_seqlens, attention_seqlens, logits_indices, ...)`
    After:  the same with `attention_seqlens = [0]` and `logits_indices = []` where they are not given

    So a program that knows the first three inputs gets the logits after the last token of each row.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    defaults: dict[str, NDArray[Any]] = {
        ATTENTION_SEQLENS: np.zeros(1, np.int32),
        LOGITS_INDICES: np.zeros(0, np.int64),
    }
    given = {name: array for name, array in defaults.items() if name in inputs}
    for name, array in given.items():
        give_default(model.graph, inputs[name], array)
    return PassResult(len(given))


def give_default(graph: ir.Graph, value: ir.Value, array: NDArray[Any]) -> None:
    """Make an input an initializer too, which a caller may override."""
    assert value.dtype is not None
    value.const_value = ir.tensor(array, dtype=value.dtype, name=str(value.name))
    graph.initializers[str(value.name)] = value
