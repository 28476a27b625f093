"""The mathematics of GraLoRA: shapes, initial values, forward, weight update and exact LoRA form.

GraLoRA (Jung et al., 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning") cuts the
weight update into `k x k` blocks, each of rank `s = r/k`, from

    A [k, in/k, r]     one factor for each input block n
    B [k, r, out/k]    one factor for each output block j

    dW[out block j, in block n] = scale * B[j][n*s:(n+1)*s].T @ A[n][:, j*s:(j+1)*s].T

so it has the parameters of a LoRA of rank r, and rank up to k*r. The hybrid form adds `B_general @ A_general`.
Everything else in the package (graph nodes, merging, export, conversion) is made from the functions of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from gralora_fx.core.config import AdapterConfig, GraloraConfig
from gralora_fx.core.methods.arrays import concatenated, zeros
from gralora_fx.core.methods.method import AdapterMethod, LayerCall

if TYPE_CHECKING:
    from torch import Tensor


class GraloraSizes(NamedTuple):
    """Sizes of an adapter: rank `r`, `k` blocks in each direction, and the rank of a plain LoRA beside them."""

    r: int
    k: int = 1
    hybrid_r: int = 0


class Factors(NamedTuple):
    """Tensors of an adapter at one site."""

    A: Tensor  # `[k, in/k, r]`
    B: Tensor  # `[k, r, out/k]`
    A_general: Tensor | None = None  # `[hybrid_r, in]`, or None
    B_general: Tensor | None = None  # `[out, hybrid_r]`, or None

    @property
    def sizes(self) -> GraloraSizes:
        """The adapter's sizes."""
        return GraloraSizes(self.A.shape[2], self.A.shape[0], 0 if self.A_general is None else self.A_general.shape[0])

    @property
    def features(self) -> tuple[int, int]:
        """Widths `in` and `out` of the layer."""
        k = self.A.shape[-3]
        return k * self.A.shape[-2], k * self.B.shape[-1]

    @property
    def grid(self) -> int:
        """Number of blocks in each direction."""
        return self.A.shape[0]

    @property
    def is_zero(self) -> bool:
        """True if the update is zero because one factor of each product is, as before training."""
        pairs = ((self.A, self.B), (self.A_general, self.B_general))
        return not any(all(tensor is not None and bool(tensor.any()) for tensor in pair) for pair in pairs)

    def products(self, rows: slice, columns: slice, shape: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs whose products add up to the unscaled update on a block within one output and one input block."""
        r, k, _ = self.sizes
        s, out_block, in_block = r // k, shape[0] // k, shape[1] // k
        j, n = rows.start // out_block, columns.start // in_block
        local_rows = slice(rows.start - j * out_block, rows.stop - j * out_block)
        local_columns = slice(columns.start - n * in_block, columns.stop - n * in_block)
        if r:
            yield self.B[j][n * s : (n + 1) * s, local_rows].T, self.A[n][local_columns, j * s : (j + 1) * s].T
        if self.A_general is not None and self.B_general is not None:
            yield self.B_general[rows], self.A_general[:, columns]

    def lora_form(self) -> tuple[Tensor, Tensor]:
        """Return the same update, exactly, as a LoRA pair: `A [k*r + hybrid_r, in]` and `B [out, k*r + hybrid_r]`.

        Row `n*r + j*s + i` of the result's `A` is column `j*s + i` of `A[n]`, placed on input block n; the matching
        column of `B` is row `n*s + i` of `B[j]`, placed on output block j; the rest is zero. `B @ A` is unscaled.
        """
        r, k, _ = self.sizes
        s, in_block, out_block = r // k, self.A.shape[1], self.B.shape[2]
        A = zeros((k * r, k * in_block), self.A)
        B = zeros((k * out_block, k * r), self.B)
        for n, j in product(range(k), range(k)):
            rows = slice(n * r + j * s, n * r + (j + 1) * s)
            A[rows, n * in_block : (n + 1) * in_block] = self.A[n][:, j * s : (j + 1) * s].T
            B[j * out_block : (j + 1) * out_block, rows] = self.B[j][n * s : (n + 1) * s].T
        if self.A_general is None or self.B_general is None:
            return A, B
        return concatenated([A, self.A_general]), concatenated([B, self.B_general], 1)


def initial_factors(in_features: int, out_features: int, sizes: GraloraSizes, *, zero_update: bool = True) -> Factors:
    """Return new tensors: `A` uniform as in a linear layer of `in/k` inputs, `B` zero so that the update is zero.

    The draws are those of `peft.tuners.gralora`, in its order: the same seed gives the same tensors.
    """
    import torch
    from torch import nn

    r, k, hybrid_r = sizes

    def draw_pair(inputs: int, width: int, outputs: int) -> tuple[Tensor, Tensor]:
        a, b = torch.empty(width, inputs), torch.zeros(outputs, width)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if not zero_update:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        return a, b

    pairs = [draw_pair(in_features // k, r, out_features // k) for _ in range(k)]
    A, B = (torch.stack(tensors).transpose(1, 2).contiguous() for tensors in zip(*pairs, strict=True))
    A_general = B_general = None
    if hybrid_r:
        # PEFT makes two linear layers first, whose own initial draws advance the generator
        nn.Linear(in_features, hybrid_r, bias=False), nn.Linear(hybrid_r, out_features, bias=False)
        A_general, B_general = draw_pair(in_features, hybrid_r, out_features)
    return Factors(A, B, A_general, B_general)


class Gralora(AdapterMethod):
    """The GraLoRA method, with the fields of PEFT's `GraloraConfig`."""

    config = GraloraConfig
    tensors = Factors
    keys = {  # noqa: RUF012  # typed in the base class
        "A": "gralora_A",
        "B": "gralora_B",
        "A_general": "gralora_A_general.weight",
        "B_general": "gralora_B_general.weight",
    }
    RUNS_ON_NUMPY = True

    def sizes(self, config: GraloraConfig, value_of: Callable[[str], Any]) -> tuple[GraloraSizes, float]:
        """Return sizes and scale, `alpha / (r + hybrid_r)`, of the adapter at a site."""
        sizes = GraloraSizes(value_of("r"), value_of("gralora_k"), config.hybrid_r)
        return sizes, value_of("alpha") / (sizes.r + sizes.hybrid_r)

    def shapes(self, in_features: int, out_features: int, sizes: GraloraSizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors at a layer."""
        r, k, hybrid_r = sizes
        shapes: dict[str, tuple[int, ...]] = {"A": (k, in_features // k, r), "B": (k, r, out_features // k)}
        if hybrid_r:
            shapes |= {"A_general": (hybrid_r, in_features), "B_general": (out_features, hybrid_r)}
        return shapes

    def initial(self, features: tuple[int, int], sizes: GraloraSizes, config: GraloraConfig, **_: Any) -> Factors:
        """Return new tensors; `init_weights=False` draws `B` at random too."""
        return initial_factors(*features, sizes, zero_update=config.init_weights)

    def forward(
        self, call: LayerCall, factors: Factors, scale: float, *, sizes: GraloraSizes, dropout: float = 0.0
    ) -> Tensor:
        """Return `y + scale * adapter(x)`; see `accumulate` for when `y` is overwritten."""
        import torch

        from gralora_fx.core.methods.low_rank import accumulate, add_low_rank, drop_inputs, project

        hidden = project(drop_inputs(call.x, dropout), factors.A)  # [k (output block), T, r]
        if call.rows is None:
            y = accumulate(call.y, hidden, factors.B, scale)
        else:
            output = torch.bmm(hidden, factors.B).transpose(0, 1).reshape(-1, call.features[1])[:, slice(*call.rows)]
            y = torch.add(call.y, output.reshape_as(call.y), alpha=scale)
        if factors.A_general is None or factors.B_general is None:
            return y
        general = factors.A_general, factors.B_general
        return add_low_rank(call._replace(y=y), *general, scale, dropout=dropout)

    def new_weight(
        self,
        weight: Tensor,
        factors: Factors,
        scale: float,
        *,
        features: tuple[int, int],
        sizes: GraloraSizes,
        stack: int | None = None,
    ) -> Tensor:
        """Return `weight + scale * dW`, with dW as one matrix; for a stack, that of each matrix [e]."""
        import torch

        r, k, _ = sizes
        in_block, out_block, s = features[0] // k, features[1] // k, r // k
        e, pairs = (() if stack is None else (stack,)), (stack or 1) * k * k
        order = (*range(len(e)), *(len(e) + axis for axis in (2, 0, 3, 1)))
        left = factors.B.view(*e, k, k, s, out_block).transpose(-2, -1)
        right = factors.A.view(*e, k, in_block, k, s).permute(*order)
        left = left.reshape(pairs, out_block, s)  # [(e, j, n), out/k, s]
        right = right.reshape(pairs, s, in_block)  # [(e, j, n), s, in/k]
        blocks = torch.bmm(left, right).view(*e, k, k, out_block, in_block).transpose(-3, -2)  # [e, j, out/k, n, in/k]
        update = blocks.reshape(*e, features[1], features[0])
        if factors.A_general is not None and factors.B_general is not None:
            product = torch.mm if stack is None else torch.bmm
            update = update + product(factors.B_general, factors.A_general)
        return torch.add(weight, update, alpha=scale)

    def problems(self, in_features: int, out_features: int, sizes: GraloraSizes) -> list[str]:
        """Describe where `k` does not divide the rank or the widths."""
        r, k, _ = sizes
        problems = []
        if r % k:
            problems.append(
                f"r should be divisible by gralora_k, but got {r} and {k}; change rank_pattern or gralora_k_pattern"
            )
        if in_features % k or out_features % k:
            problems.append(
                f"in_features={in_features}, out_features={out_features} must both be divisible by gralora_k={k}; "
                "take another gralora_k or gralora_k_pattern, or leave the layer out with exclude_modules"
            )
        return problems

    def text(self, sizes: GraloraSizes) -> str:
        """Return the sizes in words, such as `r=32 k=2 hybrid_r=8`."""
        return f"r={sizes.r} k={sizes.k}" + (f" hybrid_r={sizes.hybrid_r}" if sizes.hybrid_r else "")

    def config_of(self, config: AdapterConfig, sizes: GraloraSizes) -> GraloraConfig:
        """Return a configuration with these sizes at every site and scale 1, and the other fields of a given one."""
        values = {
            field.name: getattr(config, field.name) for field in fields(GraloraConfig) if hasattr(config, field.name)
        }
        values |= {name: {} for name in GraloraConfig.PATTERNS}
        values |= {"r": sizes.r, "gralora_k": sizes.k, "hybrid_r": sizes.hybrid_r, "alpha": sizes.r + sizes.hybrid_r}
        return GraloraConfig().changed(**values | {"gralora_dropout": config.dropout})
