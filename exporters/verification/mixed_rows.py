"""A graph whose rows have lengths or adapters of their own, seen as one with a single adapter and a mask.

Each row that a comparison gives is run beside a copy of itself with another adapter, or none. So what is compared of an
export with one adapter is compared of a batch of several, and a row that gets a wrong adapter shows. Rows of a decoder
read in chunks and single tokens, beside others that are idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime import OrtValue
from torch import Tensor

from gralora_fx.errors import ExportError, first_line
from gralora_fx.runtime.adapter_inputs import ADAPTER_IDS, AdapterInputs, is_adapter_tensor
from gralora_fx.runtime.adapter_session import SessionView
from gralora_fx.runtime.adapter_stack import BASE, AdapterStack
from gralora_fx.runtime.names import PAST_SEQLENS, QUERY_SEQLENS
from gralora_fx.runtime.ort_values import as_tensor, as_value, empty_values, own_value
from gralora_fx.runtime.session import quiet_run

_ROW_INPUTS = (ADAPTER_IDS, QUERY_SEQLENS, PAST_SEQLENS)
_PAST, _PRESENT = "past_key_values.", "present."
_BYSTANDER = 3  # positions in the cache of the row that is idle in all steps

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Input:
    """An input of a session, as ONNX Runtime describes one."""

    name: str
    type: str
    shape: Sequence[int | str]


def is_row_input(name: str) -> bool:
    """Whether an input of `model_rows.onnx` says something of its rows that the model's own inputs do not."""
    return name in _ROW_INPUTS or is_adapter_tensor(name)


class MixedRows(SessionView):
    """A session over `model_rows.onnx` without a cache, with the interface of one whose rows all have one adapter."""

    def __init__(
        self, session: Any, inputs: AdapterInputs | None, adapters: Mapping[str, Arrays], name: str | None
    ) -> None:
        """Stack the adapters.

        Args:
            session: The session.
            inputs: The adapter tensors of the export; None where it takes no adapters.
            adapters: The tensors of each adapter, by its name.
            name: The adapter of the rows that are given; None for the base.
        """
        super().__init__(session)
        self.number, self.count = BASE, 1 + len(adapters)
        self.tensors: dict[str, Any] = {}
        if inputs is None:
            return
        types = {value.name: value.type for value in session.get_inputs()}
        stack = AdapterStack(inputs)
        for adapter, tensors in adapters.items():
            stack.add(adapter, tensors)
        self._stack = stack.current()  # kept: its arrays are the memory of the values
        self.number = BASE if name is None else self._stack.ids[name]
        self.tensors = {key: _as_type(value, types[key]) for key, value in self._stack.values.items()}

    def get_inputs(self) -> list[Any]:
        """The inputs of the model."""
        return [value for value in self.session.get_inputs() if not is_row_input(value.name)]

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


class MixedSteps(MixedRows):
    """A session over a decoder by rows, with the interface of one that takes a mask and returns a grown cache.

    New tokens are read in steps: some rows read theirs at once, some in two chunks, some are idle first. One more row
    is idle in every step, and its cache has to stay as it is.
    """

    def get_inputs(self) -> list[Any]:
        """The inputs of a decoder of one length."""
        own = super().get_inputs()
        mask = Input("attention_mask", "tensor(int64)", ["batch_size", "total_sequence_length"])
        axes = ["batch_size", "heads", "past_sequence_length", "size"]
        return [
            Input(v.name, v.type, [axes[0], v.shape[1], axes[2], v.shape[3]]) if v.name.startswith(_PAST) else v
            for v in (*own, mask)
        ]

    def run_with_ort_values(self, names: Sequence[str], feed: Mapping[str, Any], options: Any = None) -> list[Any]:
        """Run on the rows and their copies; outputs are those of the rows.

        Raises:
            ExportError: The cache of an idle row changes.
        """
        ids, mask = (as_tensor(feed[name]).repeat_interleave(2, dim=0) for name in ("input_ids", "attention_mask"))
        pasts = {name: as_tensor(value) for name, value in feed.items() if name.startswith(_PAST)}
        past_mask, new_mask = mask[:, : -ids.shape[1]].bool(), mask[:, -ids.shape[1] :].bool()
        run = _Reading(self, ids, new_mask, {n: v.repeat_interleave(2, dim=0) for n, v in pasts.items()}, past_mask)
        outputs = {"logits": run.logits()[::2], **run.presents(mask.bool())}
        types = {value.name: value.type for value in self.session.get_outputs()}
        return [own_value(outputs[name], types[name]) for name in names]


class _Reading:
    """New tokens of rows read in steps."""

    def __init__(
        self, owner: MixedSteps, ids: Tensor, is_new: Tensor, pasts: Mapping[str, Tensor], is_past: Tensor
    ) -> None:
        self.owner, self.ids, self.is_new = owner, ids, is_new
        self.counts = is_new.sum(1).tolist()
        self.past = [*is_past.sum(1).tolist(), _BYSTANDER]
        rows, longest = len(self.past), max(*self.counts, 1)
        # the operator writes a chunk as long as the longest one, wherever a row is
        self.caches: dict[str, Any] = empty_values(owner.session, rows, max(self.past) + 2 * longest)
        self.takes = {value.name for value in owner.session.get_inputs()}
        generator = torch.Generator().manual_seed(0)
        for name, value in self.caches.items():
            buffer = as_tensor(value)
            for row, kept in enumerate(is_past):
                buffer[row, :, : int(kept.sum())] = pasts[name][row][:, kept]
            buffer[-1] = torch.randn(buffer[-1].shape, generator=generator).to(buffer.dtype)
        self.adapter_ids = np.array([*owner.ids(len(self.counts) // 2), owner.number], dtype=np.int64)

    def logits(self) -> Tensor:
        """Logits of the last token of each row, `[rows, 1, vocabulary]`, or of every position; zeros at padding."""
        found: dict[int, Tensor] = {}
        done = [0] * len(self.counts)
        gives_last = True
        for counts in self._plan():
            if not any(counts):
                continue
            logits = self._step(done, counts)
            gives_last = logits.shape[1] == 1 < max(counts) or (gives_last and logits.shape[1] == 1)
            for row, count in enumerate(counts):
                own = logits[row, : min(count, logits.shape[1])]
                if count:
                    found[row] = own if row not in found or gives_last else torch.cat([found[row], own])
                done[row] += count
        vocabulary = next(iter(found.values())).shape[-1]
        length = 1 if gives_last and max(self.counts) > 1 else self.ids.shape[1]
        result = torch.zeros(len(self.counts), length, vocabulary)
        for row, own in found.items():
            places = slice(-1, None) if length == 1 else self.is_new[row]
            result[row, places] = own[-1:].float() if length == 1 else own.float()
        return result

    def _plan(self) -> tuple[list[int], list[int]]:
        """How many tokens each row reads in the first step and in the second."""
        first = [(count, count // 2, 0)[row % 3] for row, count in enumerate(self.counts)]
        return first, [count - read for count, read in zip(self.counts, first, strict=True)]

    def _step(self, done: Sequence[int], counts: Sequence[int]) -> Tensor:
        rows = len(self.past)
        ids = np.zeros((rows, max(counts)), dtype=np.int64)
        for row, (read, count) in enumerate(zip(done, counts, strict=True)):
            ids[row, :count] = self.ids[row][self.is_new[row]][read : read + count].numpy()
        query = np.array([*counts, 0], dtype=np.int32)
        past = np.array([*(p + read for p, read in zip(self.past, done, strict=False)), _BYSTANDER], dtype=np.int32)
        idle = np.flatnonzero(query == 0)
        before = {name: as_tensor(value)[idle].clone() for name, value in self.caches.items()}
        feed: Arrays = {"input_ids": ids, QUERY_SEQLENS: query, PAST_SEQLENS: past, ADAPTER_IDS: self.adapter_ids}
        logits = self._run({name: array for name, array in feed.items() if name in self.takes})
        changed = [n for n, value in self.caches.items() if not torch.equal(as_tensor(value)[idle], before[n])]
        if changed:
            raise ExportError(f"a step changes {changed[0]} of a row that reads nothing; export the model again")
        return logits[:-1].clone()

    def _run(self, feed: Mapping[str, NDArray[Any]]) -> Tensor:
        """One run over the caches, which are input and output at once; its logits."""
        binding = self.owner.session.io_binding()
        values = {name: OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
        for name, value in {**values, **self.caches, **self.owner.tensors}.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name, value in self.caches.items():
            binding.bind_ortvalue_output(name.replace(_PAST, _PRESENT), value)
        try:
            self.owner.session.run_with_iobinding(binding, quiet_run())
        except Exception as failure:  # ONNX Runtime raises types of its own
            counts = feed[QUERY_SEQLENS].tolist()
            raise ExportError(f"ONNX Runtime fails on rows of {counts} tokens: {first_line(failure)}") from failure
        return as_tensor(binding.get_outputs()[0])

    def presents(self, is_kept: Tensor) -> dict[str, Tensor]:
        """The caches as a decoder of one length returns them, `[rows, heads, total, size]`, zeros at padding."""
        found = {}
        for name, value in self.caches.items():
            buffer = as_tensor(value)
            present = buffer.new_zeros(len(self.counts), buffer.shape[1], is_kept.shape[1], buffer.shape[3])
            for row, kept in enumerate(is_kept):
                present[row][:, kept] = buffer[row, :, : int(kept.sum())]
            found[name.replace(_PAST, _PRESENT)] = present[::2].contiguous()
        return found


def _own_rows(name: str, value: Any, rows: int, kind: str) -> Any:
    tensor = as_tensor(value)
    if tensor.ndim == 0 or tensor.shape[0] != 2 * rows:
        raise ExportError(
            f"the output {name} of shape {list(tensor.shape)} is not made of {2 * rows} rows, so adapters cannot be "
            "chosen by row; export the model with adapters='inputs'"
        )
    return own_value(tensor[::2], kind)


def _as_type(value: Any, kind: str) -> Any:
    """An adapter tensor in the type that a session takes, of a float32 copy of a bfloat16 export."""
    return as_value(as_tensor(value), kind)
