"""Exports whose weights are wrong, for tests of what notices it; and exports as earlier versions wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from gralora_fx.format.export_directory import MANIFEST_NAME


def shift_weight(directory: Path, name: str) -> None:
    """Shift the values of the largest weight whose name holds a text by two bytes, round its end; sizes stay.

    Args:
        directory: An export.
        name: Part of the weight's name.
    """
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if name in tensor.name and tensor.external_data
    ]
    largest = max(places, key=lambda candidate: int(candidate["length"]))
    path, begin = directory / largest["location"], int(largest["offset"])
    data = bytearray(path.read_bytes())
    end = begin + int(largest["length"])
    data[begin:end] = data[begin + 2 : end] + data[begin : begin + 2]
    path.write_bytes(data)
    forget_digests(directory)


def forget_digests(directory: Path) -> None:
    """Leave the digests of its files out of a manifest: what is wrong in them was exported so."""
    path = directory / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    del manifest["files"]
    path.write_text(json.dumps(manifest))


def forget_marks(directory: Path, key: str) -> None:
    """Leave marks out of the nodes of its models, and the functions that no node calls: earlier versions had none.

    Args:
        directory: An export.
        key: The key of the marks in a node's metadata.
    """
    for path in directory.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            kept = [note for note in node.metadata_props if note.key != key]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
        called = {node.op_type for node in model.graph.node}
        kept_functions = [function for function in model.functions if function.name in called]
        del model.functions[:]
        model.functions.extend(kept_functions)
        path.write_bytes(model.SerializeToString())
    forget_digests(directory)
