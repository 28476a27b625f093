"""The adapter tensors that an exported model takes as data: their names, shapes and meaning.

With s = r / k, an adapter adds to the output of a linear layer with the input x

    sum over input blocks n of  x[n] @ A[n][:, j*s:(j+1)*s] @ B[j][n*s:(n+1)*s]     to output block j  (GraLoRA)
    x @ A_general @ B_general                                                       to the whole       (LoRA)

Its scale is part of the `B` tensors. Rank 0 on either side leaves that side out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SWAPPABLE, INPUTS, BATCHED = "swappable", "inputs", "batched"
AS_DATA = (SWAPPABLE, INPUTS, BATCHED)
FIELDS = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
RANK, HYBRID_RANK = "r", "hybrid_r"  # ends of the names of symbolic axes
ADAPTER_IDS = "adapter_ids"


@dataclass(frozen=True)
class AdapterSite:
    """A linear layer whose adapter is data of the exported model.

    Attributes:
        path: The layer's module path.
        in_features: Width of its input.
        out_features: Width of its output.
    """

    path: str
    in_features: int
    out_features: int

    def names(self) -> tuple[str, ...]:
        """Names of its tensors, in the order of `FIELDS`."""
        return tuple(f"{self.path}.{field}" for field in FIELDS)

    def shapes(self, k: int, r: int | str, hybrid_r: int | str) -> dict[str, tuple[int | str, ...]]:
        """Shapes of its tensors by name.

        Args:
            k: Blocks in each direction.
            r: Rank of the blocks, or the name of a symbolic axis.
            hybrid_r: Rank of the plain LoRA part, or the name of a symbolic axis.
        """
        inner, outer = self.in_features, self.out_features
        shapes = ((k, inner // k, r), (k, r, outer // k), (inner, hybrid_r), (hybrid_r, outer))
        return dict(zip(self.names(), shapes, strict=True))


@dataclass(frozen=True)
class AdapterInputs:
    """The adapter tensors of an exported model.

    Attributes:
        mode: `"swappable"`: overridable initializers; `"inputs"`: required inputs; `"batched"`: required inputs with a
            leading adapter axis, from which `adapter_ids` chooses for each row.
        k: Blocks in each direction, of every site.
        dtype: Their dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        sites: The layers that take an adapter.
        uncalled: Layers that an adapter may have tensors for, though the model's forward does not call them.
    """

    mode: str
    k: int
    dtype: str
    sites: tuple[AdapterSite, ...]
    uncalled: tuple[str, ...] = ()

    @staticmethod
    def ranks(site: AdapterSite) -> tuple[str, str]:
        """Names of the symbolic axes of a site's ranks, its own: ONNX Runtime takes axes of one name to be equal."""
        return f"{site.path}.{RANK}", f"{site.path}.{HYBRID_RANK}"

    def names(self) -> Iterator[str]:
        """Names of all tensors."""
        for site in self.sites:
            yield from site.names()


def is_adapter_tensor(name: str) -> bool:
    """Whether the name of a model's input is that of an adapter tensor."""
    return name.rpartition(".")[2] in FIELDS
