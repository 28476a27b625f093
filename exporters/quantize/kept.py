"""The integers of a quantized checkpoint as blocks of an export, none of them rounded anew.

A group of inputs becomes one or several blocks with the same scale. Where a layer's groups are not contiguous (GPTQ's
`desc_act`), its inputs are first reordered so that they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from gralora_fx.base.progress.stages import counted
from gralora_fx.base.sources.lazy_tensors import source_of, stored_form_of, values_of
from gralora_fx.base.sources.packed_tensors import PackedTensor
from gralora_fx.base.sources.rewriting import as_tensor
from gralora_fx.base.sources.stored_integers import StoredIntegers
from gralora_fx.core.graph.sites import LinearSite, other_readers
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.formats import BLOCK_BITS, LEAST_BLOCK, Blocks, InputOrder
from gralora_fx.exporters.quantize.block_arrays import BlockArrays
from gralora_fx.exporters.quantize.block_search import packed
from gralora_fx.exporters.quantize.quantized_arrays import order_of
from gralora_fx.format.quantized_weights import WIDEST_EXACT

_WIDEST = 256  # ONNX Runtime's widest block


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """A weight whose stored integers an export keeps."""

    stored: PackedTensor
    form: Blocks

    def blocks(self) -> BlockArrays:
        """Read the weight and return its blocks."""
        integers = self.stored.integers()
        assert integers is not None
        return _blocks(integers, self.form)


def kept_form(integers: StoredIntegers, block_size: int | None, accuracy_level: int) -> Blocks | str:
    """Return the blocks that hold stored integers as they are, or why there are none.

    A `block_size` of None means the checkpoint's groups, or the widest exact block for a group of a whole row.
    """
    largest = int(integers.zeros.max())
    bits = next((bits for bits in BLOCK_BITS.values() if bits >= integers.bits and largest < 2**bits), None)
    if bits is None or int(integers.zeros.min()) < 0:
        return f"its zero points, up to {largest}, do not fit in 8 bits"
    if not np.isfinite(integers.scales.astype(np.float32)).all():
        return "its scales are not finite"
    order = np.argsort(integers.groups, kind="stable")
    _, counts = np.unique(integers.groups, return_counts=True)
    widest = min(_WIDEST, block_size or (WIDEST_EXACT[bits] if len(counts) == 1 else _WIDEST))
    size = widest
    while size >= LEAST_BLOCK and (counts[:-1] % size).any():  # behind the last group, the last block is filled up
        size //= 2
    if size < LEAST_BLOCK:
        return f"no block of {LEAST_BLOCK} inputs or more has one scale (groups of {int(counts.min())})"
    scale = integers.scales.dtype.name
    return Blocks(
        bits,
        size,
        accuracy_level,
        zero_points=bool((integers.zeros != 1 << (bits - 1)).any()),
        rounding="kept",
        scale_bits=32 if scale == "float32" else 16,
        scale_dtype="float16" if scale == "float16" else "bfloat16",
        order=None if (order == np.arange(len(order))).all() else InputOrder(order.astype(np.int64).tobytes()),
    )


def _blocks(integers: StoredIntegers, form: Blocks) -> BlockArrays:
    codes, groups = integers.codes(), integers.groups
    if form.order is not None:
        places = order_of(form.order)
        codes, groups = codes[:, places], groups[places]
    count = -(-codes.shape[1] // form.block_size)
    firsts = groups[np.arange(count) * form.block_size]
    zeros = integers.zeros[:, firsts].astype(np.uint8)
    whole = np.repeat(zeros, form.block_size, axis=1)  # what is behind the last input stands for zero
    whole[:, : codes.shape[1]] = codes
    zero_points = None
    if form.zero_points:
        zero_points = packed(np.pad(zeros, ((0, 0), (0, -count % (8 // form.bits)))), form.bits)
    blocks = packed(whole.reshape(len(whole), count, form.block_size), form.bits)
    return BlockArrays(blocks, integers.scales[:, firsts].astype(np.float32), zero_points)


@dataclass(frozen=True, eq=False)
class StoredLayers:
    """The layers of a base whose weights its checkpoint holds in few bits."""

    base: TracedModel
    exported: TracedModel  # the base, or the base with adapters merged into some weights

    @cached_property
    def stored(self) -> Mapping[str, PackedTensor]:
        """The quantized weights by the paths of the layers."""
        sites = [site for site in self.base.sites if site.calls and site.weight.ndim == 2]
        found = {site.path: stored_form_of(site.weight) for site in sites}
        return {path: stored for path, stored in found.items() if stored is not None}

    @property
    def stacks(self) -> set[str]:
        """The names of parameters that stack quantized matrices."""
        named = self.base.tree.parameters.items()
        return {name for name, weight in named if weight.ndim > 2 and stored_form_of(weight) is not None}

    def forms(self, block_size: int | None, accuracy_level: int) -> Iterator[tuple[LinearSite, KeptWeight | str]]:
        """Yield each layer with its weight's blocks, or the reason why its integers are not kept."""
        sites = [site for site in self.exported.sites if site.calls and site.path in self.stored]
        own = {site.path: site.weight for site in self.base.sites}
        others = other_readers(self.exported.graph_module, sites)
        for site in counted(sites, "reading integers", "layers"):
            stored = self.stored[site.path]
            integers = stored.integers()
            form: Blocks | str
            if integers is None:
                form = f"{stored.quantization} has no integers to keep in it"
            elif site.weight is not own[site.path]:
                form = "an adapter is merged into it"
            elif site.tied_with or others[site.path]:
                form = "other operators read its weight too"
            elif not _is_unchanged(site, stored):
                form = "its weight has changed since it was loaded"
            else:
                form = kept_form(integers, block_size, accuracy_level)
            yield site, form if isinstance(form, str) else KeptWeight(stored, form)


def _is_unchanged(site: LinearSite, stored: PackedTensor) -> bool:
    """Return whether a layer's weight has the values of its file, in its own dtype."""
    if source_of(site.weight) is stored:
        return True
    weight = values_of(site.weight, f"{site.path}.weight")
    return torch.equal(weight.cpu(), as_tensor(stored.array()).to(weight.dtype))
