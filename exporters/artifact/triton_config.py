"""`config.pbtxt`, which configures Triton's ONNX Runtime backend, made from an ONNX Runtime session."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gralora_fx.errors import ExportError

_TYPES = {  # ONNX Runtime's name: Triton's
    "tensor(bool)": "TYPE_BOOL",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(bfloat16)": "TYPE_BF16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
}


@dataclass(frozen=True)
class TritonTensor:
    """An input or output, as a client sees it."""

    name: str
    data_type: str  # its type, by Triton's name
    dims: tuple[int, ...]  # its sizes, -1 for any; without the batch if Triton batches
    is_optional: bool = False  # whether a request may leave it out
    is_reshaped: bool = False  # whether the model has no axis besides the batch; Triton then needs one of size 1
    label_file: str | None = None  # a file with the names of its classes; None for none

    def lines(self) -> Iterator[str]:
        """Return its lines of `config.pbtxt`."""
        yield f"    name: {_quoted(self.name)}"
        yield f"    data_type: {self.data_type}"
        yield f"    dims: [ {', '.join(map(str, self.dims))} ]"
        if self.is_reshaped:
            yield "    reshape { shape: [ ] }"
        if self.is_optional:
            yield "    optional: true"
        if self.label_file is not None:
            yield f"    label_filename: {_quoted(self.label_file)}"


@dataclass(frozen=True)
class TritonConfig:
    """The contents of `config.pbtxt`."""

    name: str
    max_batch: int  # the most rows of a batch; 0 if Triton does not batch, so that requests keep all axes
    inputs: tuple[TritonTensor, ...]  # the inputs of a request
    outputs: tuple[TritonTensor, ...]  # the outputs of a response
    parameters: Mapping[str, str] = field(default_factory=dict)  # parameters of the model and of the backend

    def to_text(self) -> str:
        """Return the text of the file."""
        lines = [f"name: {_quoted(self.name)}", 'backend: "onnxruntime"', f"max_batch_size: {self.max_batch}"]
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                lines += [f"{kind} [", "  {", *tensor.lines(), "  }", "]"]
        if self.max_batch:
            lines.append("dynamic_batching { }")
        lines.append("instance_group [ { count: 1 kind: KIND_AUTO } ]")
        for key, value in self.parameters.items():
            lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}")
        return "\n".join(lines) + "\n"


def tensors_of(
    values: Sequence[Any], *, batched: bool, optional: bool = False, label_files: Mapping[str, str] | None = None
) -> tuple[TritonTensor, ...]:
    """Return a session's inputs or outputs as Triton declares them."""
    return tuple(_tensor(value, batched, optional, (label_files or {}).get(value.name)) for value in values)


def _tensor(value: Any, batched: bool, optional: bool, label_file: str | None) -> TritonTensor:
    if value.type not in _TYPES:
        raise ExportError(f"the model has {value.name!r}, a {value.type}, which Triton's ONNX Runtime backend lacks")
    dims = tuple(size if isinstance(size, int) else -1 for size in value.shape)[1 if batched else 0 :]
    return TritonTensor(value.name, _TYPES[value.type], dims or (1,), optional, batched and not dims, label_file)


def _quoted(text: str) -> str:
    """Quote text for protobuf's text format; its escapes are JSON's, except for non-ASCII letters."""
    return json.dumps(text, ensure_ascii=False)
