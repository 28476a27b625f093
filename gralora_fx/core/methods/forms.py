"""Updates in other forms: as GraLoRA, with other blocks, summed, truncated to a rank, as dense matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from gralora_fx.core.methods.arrays import (
    Array,
    accumulator_of,
    cast,
    contiguous,
    identity,
    to_numpy,
    without_gradients,
    zeros,
)
from gralora_fx.core.methods.fold import fold
from gralora_fx.core.methods.gralora import Factors
from gralora_fx.core.methods.lora import LoraFactors
from gralora_fx.core.methods.method import AdapterTensors, Update, WeightTensors, first_tensor, is_low_rank

if TYPE_CHECKING:
    from torch import Tensor


class RowScalingTensors(WeightTensors, Protocol):
    """Tensors of an update that is of low rank beside a factor for each row of the weight, which depends on it."""

    def scaled_form(self, weight: Callable[[slice], Array], scale: float) -> tuple[Array, Array, Array]:
        """Return the new weight as `(1 + change) * weight + B @ A`: `A [R, in]`, `B [out, R]` and `change [out]`.

        Args:
            weight: Returns some rows of the layer's weight `[out, in]`, in float32 or better, as numpy arrays.
            scale: Factor of the update.
        """
        ...


def scales_rows(factors: AdapterTensors) -> TypeGuard[RowScalingTensors]:
    """Return whether tensors scale the rows of the weight beside an update of low rank, by their type."""
    return hasattr(type(factors), "scaled_form")


def as_gralora(factors: AdapterTensors) -> Factors:
    """Return the same update in GraLoRA's form, exactly; other methods become a plain LoRA beside blocks of rank 0."""
    if isinstance(factors, Factors):
        return factors
    assert is_low_rank(factors)
    A, B = factors.lora_form()
    return Factors(zeros((1, A.shape[1], 0), A), zeros((1, 0, B.shape[0]), B), A, B)


def with_blocks(factors: Factors, k: int) -> tuple[Tensor, Tensor]:
    """Return the blocks of the same update for another `k`, exactly: a multiple of the current one, or 1.

    For a multiple `K = m*k` every block pair is cut into `m*m`, each with the rank of the whole one: block column `n*m
    + a` takes rows a of `A[n]` in every column group `j*m + b` that belongs to group j. The result is `A [k, in/k, R]`
    and `B [k, R, out/k]`, with `R = r * k / (current k)`, or `R = r * (current k)` for 1.
    """
    r, old_k, _ = factors.sizes
    if k == old_k:
        return factors.A, factors.B
    if k == 1:
        A, B = Factors(factors.A, factors.B).lora_form()
        return A.t().unsqueeze(0), B.t().unsqueeze(0)
    m, s = k // old_k, r // old_k
    ins, outs = old_k * factors.A.shape[1], old_k * factors.B.shape[2]
    A = factors.A.reshape(old_k, m, ins // k, old_k, 1, s).expand(-1, -1, -1, -1, m, -1)  # [n, a, in/K, j, b, s]
    B = factors.B.reshape(old_k, old_k, s, m, outs // k).permute(0, 3, 1, 2, 4).unsqueeze(3)  # [j, b, n, 1, s, out/K]
    return A.reshape(k, ins // k, k * s), B.expand(-1, -1, -1, m, -1, -1).reshape(k, k * s, outs // k)


@without_gradients
def summed(updates: Sequence[Update], *, k: int | None = None, r: int = 0, hybrid_r: int = 0) -> Factors:
    """Return factors of scale 1 whose update is the sum of several, exactly (up to the rounding of `scale * B`).

    Updates are converted to one `k`, with which ranks add up: each block pair `(j, n)` has its own `s` columns of
    `A[n]` and rows of `B[j]`, which are concatenated.
    """
    import torch

    dtype = accumulator_of(*(first_tensor(update.factors) for update in updates))
    parts = [(Factors(*(None if t is None else t.to(dtype) for t in as_gralora(u.factors))), u.scale) for u in updates]  # type: ignore[arg-type]
    ks = {factors.sizes.k for factors, _ in parts}
    k = k or (ks.pop() if len(ks) == 1 else 1)
    blocks = [(*with_blocks(factors, k), scale) for factors, scale in parts]
    ins, outs = k * blocks[0][0].shape[1], k * blocks[0][1].shape[2]
    missing = max(0, r - sum(A.shape[2] for A, _, _ in blocks))
    blocks.append((blocks[0][0].new_zeros(k, ins // k, missing), blocks[0][1].new_zeros(k, missing, outs // k), 1.0))
    A = torch.cat([A.reshape(k, ins // k, k, A.shape[2] // k) for A, _, _ in blocks], dim=3)  # [n, in/k, j, s]
    B = torch.cat([(B * scale).reshape(k, k, B.shape[1] // k, outs // k) for _, B, scale in blocks], dim=2)
    A, B = A.flatten(2), B.flatten(1, 2)  # [k, in/k, r], [k, r, out/k]
    generals = [(f.A_general, f.B_general * scale) for f, scale in parts if f.B_general is not None]
    missing = hybrid_r - sum(f.sizes.hybrid_r for f, _ in parts)
    if missing > 0:
        generals.append((A.new_zeros(missing, ins), B.new_zeros(outs, missing)))
    A, B = A.clone(memory_format=torch.contiguous_format), B.clone(memory_format=torch.contiguous_format)
    if not generals:
        return Factors(A, B)
    return Factors(A, B, torch.cat([a for a, _ in generals]), torch.cat([b for _, b in generals], dim=1))  # type: ignore[misc]


@without_gradients
def summed_lora(updates: Sequence[Update], *, r: int) -> tuple[Tensor, Tensor]:
    """Return the sum of several updates, exactly, as LoRA of scale 1: `A [R, in]`, `B [out, R]`, float32 or better.

    R is the sum of the ranks, or `r` if that is more; only `scale * B` is rounded.
    """
    import torch

    pairs = [(*update.lora_form(), update.scale) for update in updates]
    dtype = accumulator_of(*(A for A, _, _ in pairs))
    A = torch.cat([A.to(dtype) for A, _, _ in pairs])
    B = torch.cat([B.to(dtype) * scale for _, B, scale in pairs], dim=1)
    missing = max(0, r - A.shape[0])
    return torch.cat([A, A.new_zeros(missing, A.shape[1])]), torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1)


@without_gradients
def as_update(difference: Array) -> Update:
    """Return a change `[out, in]` of a whole weight as an equal LoRA of rank `min(in, out)`, one factor an identity."""
    outs, ins = difference.shape
    if outs <= ins:
        return Update(LoraFactors(difference, identity(outs, difference)), 1.0)
    return Update(LoraFactors(identity(ins, difference), difference), 1.0)


@without_gradients
def as_data(update: Update, k: int) -> tuple[Array, ...]:
    """Return the same update as tensors for an exported model, in float32 or better (see `format.adapter_inputs`).

    They are `A [k, in/k, r]`, `B [k, r, out/k]`, `A_general [in, hybrid_r]` and `B_general [hybrid_r, out]`, of rank 0
    where the update lacks a part. In LoRA's form (`k = 0`) only the last two, of rank `k*r + hybrid_r`.
    """
    if k == 0:
        A, B = update.lora_form()
        dtype = accumulator_of(A)
        return contiguous(cast(A, dtype).T), contiguous(cast(B, dtype).T * update.scale)
    factors = as_gralora(update.factors)
    (r, own_k, _), (ins, outs) = factors.sizes, factors.features
    if r and own_k != k:
        raise ValueError(f"gralora_k is {own_k}, this export has {k}")
    dtype = accumulator_of(factors.A)
    A, B = cast(factors.A, dtype), cast(factors.B, dtype) * update.scale
    if not r:
        A, B = zeros((k, ins // k, 0), A), zeros((k, 0, outs // k), B)
    A_general, B_general = zeros((ins, 0), A), zeros((0, outs), B)
    if factors.A_general is not None and factors.B_general is not None:
        A_general, B_general = cast(factors.A_general, dtype).T, cast(factors.B_general, dtype).T * update.scale
    return contiguous(A), contiguous(B), contiguous(A_general), contiguous(B_general)


@without_gradients
def block_norms(tensors: AdapterTensors, scale: float) -> Tensor:
    """Return Frobenius norms `[k output blocks, k input blocks]` of a weight update, without the dense update.

    Block (j, n) is `L @ R`, with `L` the columns of `B[j]` that meet input block n beside the rows of `B_general`, and
    `R` the matching columns of `A[n]` above those of `A_general`. Its squared norm is the sum over `(L.T @ L) * (R @
    R.T)`, two matrices of side `r/k + hybrid_r`, in float64 on the CPU, since their entries are squares.
    """
    import torch

    factors = as_gralora(tensors)
    r, k, hybrid_r = factors.sizes
    s, in_block, out_block = r // k, factors.A.shape[1], factors.B.shape[2]
    A = factors.A.to("cpu", torch.float64).view(k, in_block, k, s).permute(2, 0, 3, 1)  # [j, n, s, in/k]
    B = factors.B.to("cpu", torch.float64).view(k, k, s, out_block)  # [j, n, s, out/k]
    if factors.A_general is not None and factors.B_general is not None:
        A_general = factors.A_general.to("cpu", torch.float64).view(hybrid_r, k, in_block).transpose(0, 1)
        B_general = factors.B_general.to("cpu", torch.float64).view(k, out_block, hybrid_r).transpose(1, 2)
    rows = []
    for j in range(k):  # one output block at a time, so that the general factors are spread k times and not k*k times
        left, right = B[j], A[j]
        if hybrid_r:
            left = torch.cat([left, B_general[j].expand(k, -1, -1)], dim=1)  # [n, s + hybrid_r, out/k]
            right = torch.cat([right, A_general], dim=1)  # [n, s + hybrid_r, in/k]
        squares = ((left @ left.mT) * (right @ right.mT)).sum(dim=(1, 2))
        rows.append(squares.clamp(min=0).sqrt())  # rounding may leave a negative square where the parts cancel
    return abs(scale) * torch.stack(rows)


class Truncated(NamedTuple):
    """An update truncated to a rank."""

    A: NDArray[np.float32]  # `[rank, in]`
    B: NDArray[np.float32]  # `[out, rank]`; `B @ A` is the approximation
    lost: float  # Frobenius norm of the truncated part
    norm: float  # Frobenius norm of the whole update


def truncate(A: Array, B: Array, scale: float, rank: int) -> Truncated:
    """Return the update of `rank`, or of its own if less, nearest to `scale * B @ A` in the Frobenius norm; in float64.

    With `B = Q R` and `A.T = P S` the singular values of `B @ A` are those of the small `R @ S.T` (truncating them is
    best by Eckart and Young, 1936). `A` is `[R, in]` and `B` `[out, R]`.
    """
    Q, left = np.linalg.qr(_float64(B) * scale)
    P, right = np.linalg.qr(_float64(A).T)
    U, values, Vh = np.linalg.svd(left @ right.T, full_matrices=False)
    rank = min(rank, values.shape[0])
    roots = np.sqrt(values[:rank])  # shared between the factors, so that neither is much larger than the other
    U, Vh = U[:, :rank], Vh[:rank]
    return Truncated(
        ((roots[:, None] * Vh) @ P.T).astype(np.float32),
        (Q @ (U * roots)).astype(np.float32),
        float(np.linalg.norm(values[rank:])),
        float(np.linalg.norm(values)),
    )


def update_norm(A: Array, B: Array, scale: float) -> float:
    """Return the Frobenius norm of `scale * B @ A`, in float64, without the dense update."""
    left, right = _float64(B), _float64(A)
    squared = ((left.T @ left) * (right @ right.T)).sum()
    return abs(scale) * float(np.sqrt(max(squared, 0.0)))


def _float64(array: Array) -> NDArray[Any]:
    found: NDArray[Any] = cast(to_numpy(array), np.float64)
    return found


@without_gradients
def delta_weight(update: Update, *, transposed: bool = False, weight: Tensor | None = None) -> Tensor:
    """Return the dense matrix that an update adds to a weight or stack: `[out, in]`, or `[in, out]` if `transposed`.

    An update that depends on the layer's weight needs it, as it is stored.
    """
    import torch

    tensor = first_tensor(update.factors)
    if not update.is_low_rank:
        assert weight is not None
        wide = weight.detach().to(torch.promote_types(weight.dtype, tensor.dtype))
        return fold(wide, [update], transposed=transposed) - wide
    in_features, out_features = update.factors.features
    matrix = (in_features, out_features) if transposed else (out_features, in_features)
    shape = matrix if update.stack is None else (update.stack, *matrix)
    zero = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return fold(zero, [update], transposed=transposed, out=zero)
