"""Other exact forms of a weight update: as plain LoRA, and several updates as one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from gralora_fx.methods.gralora import Factors, Update


def lora_factors(factors: Factors) -> tuple[Tensor, Tensor]:
    """The same update as a plain LoRA pair of rank `k*r + hybrid_r` with block-sparse factors, exactly.

    Row `n*r + j*s + i` of the result's `A` is column `j*s + i` of `A[n]`, placed on input block n; the matching column
    of `B` is row `n*s + i` of `B[j]`, placed on output block j.

    Returns:
        `A [k*r + hybrid_r, in]` and `B [out, k*r + hybrid_r]`, with `B @ A` the unscaled update.
    """
    r, k, _ = factors.rank
    s, in_block, out_block = r // k, factors.A.shape[1], factors.B.shape[2]
    A = factors.A.new_zeros(k * r, k * in_block)
    B = factors.B.new_zeros(k * out_block, k * r)
    for n, j in product(range(k), range(k)):
        rows = slice(n * r + j * s, n * r + (j + 1) * s)
        A[rows, n * in_block : (n + 1) * in_block] = factors.A[n][:, j * s : (j + 1) * s].t()
        B[j * out_block : (j + 1) * out_block, rows] = factors.B[j][n * s : (n + 1) * s].t()
    if factors.A_general is None or factors.B_general is None:
        return A, B
    return torch.cat([A, factors.A_general]), torch.cat([B, factors.B_general], dim=1)


def with_blocks(factors: Factors, k: int) -> tuple[Tensor, Tensor]:
    """The blocks of the same update for another `k`, exactly: a multiple of the present one, or 1.

    For a multiple `K = m*k` every block pair is cut into `m*m`, each with the rank that the whole one had: block column
    `n*m + a` takes rows a of `A[n]` in every column group `j*m + b` that stands for group j.

    Args:
        factors: The adapter's tensors at a site; the plain LoRA part is left out.
        k: The wanted number of blocks in each direction; divides the widths.

    Returns:
        `A [k, in/k, R]` and `B [k, R, out/k]`, with `R = r * k / (present k)`, or `R = r * (present k)` for 1.
    """
    r, own, _ = factors.rank
    if k == own:
        return factors.A, factors.B
    if k == 1:
        A, B = lora_factors(Factors(factors.A, factors.B))
        return A.t().unsqueeze(0), B.t().unsqueeze(0)
    m, s = k // own, r // own
    ins, outs = own * factors.A.shape[1], own * factors.B.shape[2]
    A = factors.A.reshape(own, m, ins // k, own, 1, s).expand(-1, -1, -1, -1, m, -1)  # [n, a, in/K, j, b, s]
    B = factors.B.reshape(own, own, s, m, outs // k).permute(0, 3, 1, 2, 4).unsqueeze(3)  # [j, b, n, 1, s, out/K]
    return A.reshape(k, ins // k, k * s), B.expand(-1, -1, -1, m, -1, -1).reshape(k, k * s, outs // k)


@torch.no_grad()
def summed(updates: Sequence[Update], *, k: int | None = None, r: int = 0, hybrid_r: int = 0) -> Factors:
    """One adapter of scale 1 whose update is the sum of several, exactly (up to the rounding of `scale * B`).

    With the same `k` the ranks of the block pairs add up: each pair `(j, n)` has its own `s` columns of `A[n]` and rows
    of `B[j]`, which are laid side by side. Updates of another `k` are written with this one first.

    Args:
        updates: At least one.
        k: Number of blocks of the sum; None for that of the updates, or 1 (plain LoRA) where they differ.
        r: Least rank of the blocks; missing columns and rows are zero.
        hybrid_r: Least rank of the plain LoRA part; missing rows are zero.

    Returns:
        Tensors of the sum of the ranks, in float32 or better.
    """
    dtype = torch.float32
    for update in updates:
        dtype = torch.promote_types(dtype, update.factors.A.dtype)
    parts = [(Factors(*(None if t is None else t.to(dtype) for t in u.factors)), u.scale) for u in updates]  # type: ignore[arg-type]
    ks = {factors.rank.k for factors, _ in parts}
    k = k or (ks.pop() if len(ks) == 1 else 1)
    blocks = [(*with_blocks(factors, k), scale) for factors, scale in parts]
    ins, outs = k * blocks[0][0].shape[1], k * blocks[0][1].shape[2]
    missing = max(0, r - sum(A.shape[2] for A, _, _ in blocks))
    blocks.append((blocks[0][0].new_zeros(k, ins // k, missing), blocks[0][1].new_zeros(k, missing, outs // k), 1.0))
    A = torch.cat([A.reshape(k, ins // k, k, -1) for A, _, _ in blocks if A.numel()], dim=3)  # [n, in/k, j, s]
    B = torch.cat([(B * scale).reshape(k, k, -1, outs // k) for _, B, scale in blocks if B.numel()], dim=2)
    A, B = A.reshape(k, ins // k, -1), B.reshape(k, -1, outs // k)  # [k, in/k, r], [k, r, out/k]
    generals = [(f.A_general, f.B_general * scale) for f, scale in parts if f.B_general is not None]
    missing = hybrid_r - sum(f.rank.hybrid_r for f, _ in parts)
    if missing > 0:
        generals.append((A.new_zeros(missing, ins), B.new_zeros(outs, missing)))
    A, B = A.clone(memory_format=torch.contiguous_format), B.clone(memory_format=torch.contiguous_format)
    if not generals:
        return Factors(A, B)
    return Factors(A, B, torch.cat([a for a, _ in generals]), torch.cat([b for _, b in generals], dim=1))  # type: ignore[misc]


@torch.no_grad()
def block_norms(factors: Factors, scale: float) -> Tensor:
    """Frobenius norms of the `k x k` blocks of a weight update, without the dense update.

    Block (j, n) is `L @ R`, with `L` the columns of `B[j]` that meet input block n beside the rows of `B_general`, and
    `R` the matching columns of `A[n]` above those of `A_general`. Its squared norm is the sum over `(L.T @ L) * (R @
    R.T)`, two matrices of side `r/k + hybrid_r`. They are float64, for their entries are squares.

    Args:
        factors: The adapter's tensors at a site.
        scale: Factor of the update.

    Returns:
        `[k, k]` float64 on the CPU: row j is an output block, column n an input block.
    """
    r, k, hybrid_r = factors.rank
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
