"""A copy of a model, of which passes make another graph over the same weights."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.adapter_groups import FlatTokens


def copied(model: ir.Model) -> ir.Model:
    """A copy that shares the tensors, with what passes have noted of the model; names of values are its own.

    Args:
        model: The model, whose values have names that differ.
    """
    copy = model.clone()
    copy.meta.update(model.meta)
    flat: dict[str, FlatTokens] = model.meta.get(FlatTokens.META, {})
    if flat:
        values = {value.name: value for node in copy.graph for value in node.outputs}
        values |= {value.name: value for value in (*copy.graph.inputs, *copy.graph.initializers.values())}

        def of_copy(value: ir.Value) -> ir.Value:
            return values.get(value.name, value)  # what passes have removed since is in neither graph

        copy.meta[FlatTokens.META] = {
            axis: dataclasses.replace(
                noted,
                tokens=None if noted.tokens is None else of_copy(noted.tokens),
                places=None if noted.places is None else of_copy(noted.places),
                sizes=of_copy(noted.sizes),
            )
            for axis, noted in flat.items()
        }
    return copy
