"""The adapter tensors that an exported model takes as data: their names, shapes and meaning.

With s = r / k, an adapter adds to the output of a linear layer with the input x

    sum over input blocks n of  x[n] @ A[n][:, j*s:(j+1)*s] @ B[j][n*s:(n+1)*s]     to output block j  (GraLoRA)
    x @ A_general @ B_general                                                       to the whole       (LoRA)

Its scale is multiplied into the `B` tensors. Rank 0 on either side omits that side.

An export in LoRA's form has only the second side. It takes a GraLoRA adapter as the equal LoRA of rank k*r + hybrid_r:
a third of the nodes, and k times the values.

Layers that an adapter may replace as a whole (`modules_to_save`) have only that side too, in every export: the
difference of the trained weight to the base's is a LoRA of rank min(in, out). If a bias trains, the difference to the
base's is a vector:

    gralora_bias [out]                                                              to the whole       (trained bias)

Layers at which an adapter may scale the layer's own output, as DoRA does, have one more vector, the factor of each
output less 1, so that zeros are the base:

    x @ W.T * gralora_scale [out]                                                   to the whole       (scaled output)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

DATA, INPUTS = "data", "inputs"
AS_DATA = (DATA, INPUTS)
BASE = 0  # the id for no adapter, in batches whose rows choose one
STACKED = "stacked"  # for a graph in which each row has its own adapter
EARLIER_MODES = {"swappable": DATA, "batched": DATA}  # names that options may still have
FIELDS = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general", "gralora_bias", "gralora_scale")
BLOCKS, WHOLE, BIAS = "blocks", "whole", "bias"  # the changes that adapters may make at a layer
RANK, HYBRID_RANK, ADAPTERS_AXIS = "r", "hybrid_r", "adapters"  # symbolic axes
ADAPTER_IDS = "adapter_ids"
FIRST_ADAPTER = "first_adapter"  # `[1]` int64: the id of a stack's first adapter; the base's where it is left out

_Tensor = TypeVar("_Tensor")


@dataclass(frozen=True)
class AdapterSite:
    """A linear layer whose adapter is data of the exported model."""

    path: str  # the layer's module path
    in_features: int  # width of its input
    out_features: int  # width of its output
    # `"blocks"`: tensors of blocks and of plain LoRA; `"whole"`: of plain LoRA alone, of a layer that an adapter may
    # replace; `"bias"`: neither
    form: str = BLOCKS
    has_bias: bool = False  # whether adapters may change its bias
    has_scale: bool = False  # whether adapters may scale its output, without the bias

    def blocks(self, k: int) -> int:
        """Return the number of blocks in each direction here, in an export of `k`; 0 for none."""
        return k if self.form == BLOCKS else 0

    def names(self, k: int) -> tuple[str, ...]:
        """Return the names of its tensors, in the order of `FIELDS`."""
        return tuple(self.shapes(k, 0, 0))

    def shapes(self, k: int, r: int | str, hybrid_r: int | str) -> dict[str, tuple[int | str, ...]]:
        """Return the shapes of its tensors by name."""
        inner, outer, k = self.in_features, self.out_features, self.blocks(k)
        by_field: dict[str, tuple[int | str, ...]] = {}
        if k:
            by_field |= {FIELDS[0]: (k, inner // k, r), FIELDS[1]: (k, r, outer // k)}
        if self.form != BIAS:
            by_field |= {FIELDS[2]: (inner, hybrid_r), FIELDS[3]: (hybrid_r, outer)}
        if self.has_bias:
            by_field[FIELDS[4]] = (outer,)
        if self.has_scale:
            by_field[FIELDS[5]] = (outer,)
        return {f"{self.path}.{field}": shape for field, shape in by_field.items()}

    @property
    def without_scale(self) -> AdapterSite:
        """The same site with only those tensors whose product with the input is added to the output."""
        return replace(self, has_scale=False)

    def parts(self, tensors: Mapping[str, _Tensor]) -> tuple[_Tensor | None, ...]:
        """Return its tensors among others, in the order of `FIELDS`; None for missing ones."""
        return tuple(tensors.get(f"{self.path}.{field}") for field in FIELDS)

    def is_within(self, rank: int) -> bool:
        """Return whether a rank of plain LoRA is exempt from limits: adapters may replace this weight as a whole."""
        return self.form == WHOLE and rank <= min(self.in_features, self.out_features)


@dataclass(frozen=True)
class AdapterInputs:
    """The adapter tensors of an exported model."""

    # `"data"`: overridable initializers; `"inputs"`: required inputs; `"stacked"`, of `model_rows.onnx`: required
    # inputs with a leading adapter axis, from which `adapter_ids` chooses for each row
    mode: str
    k: int  # blocks in each direction, of every site; 0 for LoRA's form, which has none
    dtype: str  # their dtype: `"float32"`, `"float16"` or `"bfloat16"`
    sites: tuple[AdapterSite, ...] = ()  # the layers that take an adapter
    # layers that an adapter may have tensors for, though the model's forward does not call them
    uncalled: tuple[str, ...] = ()

    @property
    def scaled(self) -> tuple[AdapterSite, ...]:
        """The layers whose output an adapter may scale."""
        return tuple(site for site in self.sites if site.has_scale)

    def ranks(self, site: AdapterSite) -> tuple[str, str]:
        """Return names of the symbolic axes of a site's ranks, which an adapter may choose for each site.

        ONNX Runtime assumes that axes of one name are equal, and reuses the memory of one value for another.
        """
        return f"{site.path}.{RANK}", f"{site.path}.{HYBRID_RANK}"

    def stacked(self, shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        """Return the shape of an export's input, given the shape of one adapter's tensor."""
        return (ADAPTERS_AXIS, *shape) if self.mode == STACKED else shape

    def by_row(self) -> AdapterInputs:
        """Return the same inputs stacked and chosen by row, as in `model_rows.onnx`."""
        return replace(self, mode=STACKED)

    def within(self, names: Collection[str]) -> AdapterInputs:
        """Return the inputs of the layers in a graph, by the names of its inputs; companions have the others."""
        return replace(self, sites=tuple(site for site in self.sites if site.names(self.k)[0] in names))

    def names(self) -> Iterator[str]:
        """Return the names of all tensors."""
        for site in self.sites:
            yield from site.names(self.k)


def is_adapter_tensor(name: str) -> bool:
    """Return whether a model's input is an adapter tensor, by its name."""
    return name.rpartition(".")[2] in FIELDS


def is_adapter_input(name: str) -> bool:
    """Return whether a model's input is an adapter tensor, or says which adapter each row has."""
    return name in (ADAPTER_IDS, FIRST_ADAPTER) or is_adapter_tensor(name)
