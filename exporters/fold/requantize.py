"""Folding into quantized weights: dequantized, updated and quantized again by the export's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.rewriting import RowEdit
from gralora_fx.errors import ExportError, MergeError, command, option
from gralora_fx.exporters.fold.edits import LayerEdit, check_finite
from gralora_fx.exporters.formats import Blocks, InputOrder
from gralora_fx.exporters.rules.products.initializers import ProductWeight
from gralora_fx.exporters.rules.products.quantized_products import EARLIER
from gralora_fx.exporters.rules.products.stored_rows import read_rows

if TYPE_CHECKING:
    from gralora_fx.exporters.quantize.block_arrays import BlockArrays

_COLUMNS = 1024  # output features that are quantized at once
_VALUES = 2**17  # values that a thread compares at once
# Square of a row's error over that of rounding to the nearest; a search makes it up to eight times larger.
_LARGEST_ERROR = 10.0
_SAME = 1e-4  # what a scale may differ by from that of the largest value, which a fold computes in another order
LEAST_SHARE = 0.5  # the least share of an update that must survive at every layer


@dataclass
class Survival:
    """The share of a layer's update that is left after rounding: `<after - before, dW> / <dW, dW>`.

    `before` and `after` are dequantized weights. It is 1 if rounding changes nothing, 0 if it removes the update, and
    about 1 on average if it affects only the base's own weights.
    """

    kept: float = 0.0  # `<after - before, dW>`, summed over all values
    whole: float = 0.0  # `<dW, dW>`

    @property
    def share(self) -> float:
        """The share; 1 for an update of zeros."""
        return self.kept / self.whole if self.whole else 1.0

    def add(self, before: NDArray[Any], after: NDArray[Any], update: NDArray[Any]) -> None:
        """Add a part of the weight, given its update."""
        self.kept += float(((after - before) * update).sum(dtype=np.float64))
        self.whole += float((update * update).sum(dtype=np.float64))


@dataclass
class QuantizedEdit:
    """The edit of a quantized matrix: all values of the changed layers are quantized again, no others."""

    weight: ProductWeight  # the initializer of the integers
    layers: tuple[LayerEdit, ...]  # the edit of each layer
    # the base's float weight `[out, in]` of a layer by its path, to quantize from; None to quantize from the
    # dequantized values
    base: Callable[[str], NDArray[Any]] | None
    survival: dict[str, Survival] = field(default_factory=dict)  # how much of each update survives, by path
    _computed: dict[int, NDArray[Any]] = field(default_factory=dict, init=False)

    @property
    def parts(self) -> tuple[PartEdit, ...]:
        """The edit of each of `weight.parts`."""
        return tuple(PartEdit(self, index) for index in range(len(self.weight.parts)))

    def take(self, index: int) -> NDArray[Any]:
        """Return new values of one of `weight.parts`; all are computed together, and cached until taken."""
        if index not in self._computed:
            self._computed = dict(enumerate(self._compute()))
        return self._computed.pop(index)

    def _compute(self) -> tuple[NDArray[Any], ...]:
        self.survival.clear()
        stored = stored_values(self.weight)
        for layer in self.layers:
            change = layer.prepare(self.weight.in_features)
            step = _COLUMNS if layer.takes_parts else layer.stop - layer.start
            for start in range(layer.start, layer.stop, step):
                self._change(stored, layer, change, slice(start, min(start + step, layer.stop)))
        return stored.parts

    def _change(
        self,
        stored: StoredValues,
        layer: LayerEdit,
        change: Callable[[NDArray[Any], slice, slice], None],
        outputs: slice,
    ) -> None:
        """Quantize some output features of a layer again."""
        rows = slice(outputs.start - layer.start, outputs.stop - layer.start)
        before = stored.values(outputs)
        source = before
        if self.base is not None and layer.values is None:
            source = self.base(layer.name)[rows].astype(np.float32)
            if not stored.is_rounded(source, outputs):
                raise MergeError(
                    f"{layer.name}: {self.weight.name} is not what the base's weight is rounded to; give the base that "
                    f"was exported, or leave {option(base=...)} out"
                )
        result = source.copy()
        change(result, rows, slice(0, self.weight.in_features))
        stored.store(outputs, result, layer.name, is_near=source is before)
        survival = self.survival.setdefault(layer.name, Survival())
        if layer.values is None:
            survival.add(before, stored.values(outputs), result - source)


@dataclass(frozen=True)
class PartEdit:
    """The edit of one tensor of a quantized matrix."""

    matrix: QuantizedEdit  # the edit of the matrix
    index: int  # number of the tensor among `weight.parts`
    takes_rows: bool = field(default=True, init=False)

    def prepare(self) -> RowEdit:
        """Compute the matrix' new values, unless they are cached; return a function that replaces rows."""
        values = self.matrix.take(self.index)

        def change(rows: NDArray[Any], first: int) -> None:
            rows[...] = values.reshape(-1, rows.shape[1])[first : first + len(rows)]

        return change


@dataclass(frozen=True)
class _StoredBlocks:
    """Blocks of `MatMulNBits`: integers `[out, bytes]`, scales `[out, blocks]`, packed zero points `[out, bytes]`."""

    weight: ProductWeight
    integers: NDArray[Any]
    all_scales: NDArray[Any]
    all_zero_points: NDArray[Any] | None
    order: InputOrder | None

    @property
    def parts(self) -> tuple[NDArray[Any], ...]:
        """The tensors of `weight.parts`."""
        parts = (self.integers, self.all_scales)
        return parts if self.all_zero_points is None else (*parts, self.all_zero_points)

    def values(self, outputs: slice) -> NDArray[Any]:
        """Return dequantized values `[n, in]`."""
        from gralora_fx.exporters.quantize.block_arrays import dequantize_blocks
        from gralora_fx.exporters.quantize.quantized_arrays import in_usual_order

        values = dequantize_blocks(self._arrays(outputs), self.weight.bits, self.weight.in_features)
        return in_usual_order(values, self.order)

    def _arrays(self, outputs: slice) -> BlockArrays:
        """Return the blocks of output features, with scales in float32."""
        from gralora_fx.exporters.quantize.block_arrays import BlockArrays

        scales = self.all_scales[outputs]
        packed = self.integers[outputs].reshape(len(scales), scales.shape[1], -1)
        zero_points = None if self.all_zero_points is None else self.all_zero_points[outputs]
        return BlockArrays(packed, scales.astype(np.float32), zero_points)

    @property
    def form(self) -> Blocks:
        """The format of the blocks, as read from their tensors."""
        return Blocks(
            self.weight.bits,
            self.weight.block_size,
            zero_points=self.all_zero_points is not None,
            scale_bits=16 if self.weight.is_widened else 32,
            scale_dtype="float16" if self.all_scales.dtype == np.float16 else "bfloat16",
            order=self.order,
        )

    def _ordered(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values `[n, in]` with their inputs in the order of the blocks."""
        from gralora_fx.exporters.quantize.quantized_arrays import order_of

        return values if self.order is None else values[:, order_of(self.order)]

    def is_rounded(self, source: NDArray[Any], outputs: slice, *, is_fresh: bool = False) -> bool:
        """Return whether the stored values are as close to others as rounding puts them, by each row's error.

        Integers of 8 bits that were rounded once, from these values (`is_fresh`), have to be the nearest, of the scale
        that their block gives, unless they are a checkpoint's own, which are exact.
        """
        from gralora_fx.exporters.quantize.quantized_arrays import are_nearest, nearest_errors

        if not np.isfinite(source).all():
            return False
        source, stored = self._ordered(source), self._ordered(self.values(outputs))
        if is_fresh and self.weight.bits == 8 and not are_nearest(source, stored, self.all_scales[outputs], self.form):
            return False
        least = nearest_errors(np.ascontiguousarray(source, np.float32), self.form)
        errors, squares = (np.einsum("ij,ij->i", values, values) for values in (stored - source, source))
        scale = float(np.spacing(self.all_scales.dtype.type(1))) / 2  # what rounding changes a scale by
        return bool((errors <= _LARGEST_ERROR * least + max(1e-7, scale**2) * squares + 1e-20).all())

    def store(self, outputs: slice, values: NDArray[Any], path: str, *, is_near: bool) -> None:
        """Quantize values `[n, in]` of some outputs, rounded to the export's precision first, as an export does.

        If they are near the stored ones (`is_near`: those plus an update), scales and zero points that fit better than
        new ones are kept, so that values without an update return to their grid.
        """
        from gralora_fx.exporters.quantize.quantized_arrays import quantize_blocks, with_scales

        stored = self.all_scales.dtype
        dtype = np.dtype(np.float32) if self.weight.is_widened else stored
        rounded = values.astype(dtype) if dtype == np.float16 else values.astype(dtype).astype(np.float32)
        columns = np.ascontiguousarray(self._ordered(rounded).T)
        blocks = quantize_blocks(columns, self.form, name=path)
        if is_near:
            blocks = with_scales(columns, blocks, self._arrays(outputs), self.form)
        self.integers[outputs] = blocks.packed.reshape(len(blocks.packed), -1)
        self.all_scales[outputs] = blocks.scales.astype(stored)
        if self.all_zero_points is not None:
            self.all_zero_points[outputs] = blocks.zero_points
        check_finite(self.all_scales[outputs], path)


@dataclass(frozen=True)
class _StoredColumns:
    """Columns: integers `[in, out]`, scales `[out]`, and factors of the input `[in]`, which stay as they are."""

    weight: ProductWeight
    integers: NDArray[Any]
    all_scales: NDArray[Any]
    factors: NDArray[Any] | None

    @property
    def parts(self) -> tuple[NDArray[Any], ...]:
        """The tensors of `weight.parts`."""
        return self.integers, self.all_scales

    def values(self, outputs: slice) -> NDArray[Any]:
        """Return dequantized values `[n, in]`."""
        from gralora_fx.exporters.quantize.block_arrays import dequantize_columns

        values = dequantize_columns(self.integers[:, outputs], self.all_scales[outputs], self.factors)
        return np.ascontiguousarray(values.T)

    def is_rounded(self, source: NDArray[Any], outputs: slice, *, is_fresh: bool = False) -> bool:
        """Return whether the stored values are within a step of others, and the steps those of them (`is_fresh`)."""
        from gralora_fx.exporters.quantize.quantized_arrays import column_scales

        scales, factors = self.all_scales[outputs], 1 if self.factors is None else self.factors
        is_own = not is_fresh or np.allclose(scales, column_scales((source / factors).T), rtol=_SAME)
        return is_own and bool((np.abs(self.values(outputs) - source) <= 1.01 * scales[:, None] * factors).all())

    def store(self, outputs: slice, values: NDArray[Any], path: str, *, is_near: bool) -> None:
        """Quantize values."""
        from gralora_fx.exporters.quantize.quantized_arrays import quantize_columns

        integers, scales = quantize_columns(np.ascontiguousarray(values.T), path, self.factors)
        self.integers[:, outputs] = integers
        self.all_scales[outputs] = scales


StoredValues: TypeAlias = _StoredBlocks | _StoredColumns


def stored_values(weight: ProductWeight) -> StoredValues:
    """Read all tensors of a quantized weight into memory."""
    if weight.problem == EARLIER:
        raise ExportError(f"{weight.name} cannot be read: {EARLIER}")
    integers, scales, *zero_points = (read_rows(value) for value in weight.parts)
    if weight.storage == "columns":
        factors = None if weight.factors is None else read_rows(weight.factors).reshape(-1)
        return _StoredColumns(weight, integers, scales.reshape(-1), factors)
    rows = [part.reshape(weight.out_features, -1) for part in (integers, scales, *zero_points)]
    order = None if weight.order is None else InputOrder(read_rows(weight.order).astype(np.int64).tobytes())
    return _StoredBlocks(weight, rows[0], rows[1], rows[2] if zero_points else None, order)


def is_rounding_of(weight: ProductWeight, start: int, values: NDArray[Any]) -> bool:
    """Return whether output features of a quantized weight, from `start`, are the rounding of a matrix `[out, in]`."""
    return stored_values(weight).is_rounded(values.astype(np.float32), slice(start, start + len(values)))


def is_rounded_from(
    weight: ProductWeight, readings: Iterable[NDArray[Any]], digest: str | None, *, is_fresh: bool
) -> bool:
    """Return whether a quantized weight has a digest; or, without one, is what a reading of its matrix rounds to."""
    from gralora_fx.exporters.quantize.block_arrays import digest_of_blocks
    from gralora_fx.exporters.quantize.block_search import in_threads

    if digest is not None:
        return digest_of_blocks([read_rows(part) for part in weight.parts]) == digest
    held = stored_values(weight)
    step = max(1, _VALUES // weight.in_features)

    def fits(matrix: NDArray[Any]) -> bool:
        def is_rounded(first: int) -> bool:
            rows = matrix[first : first + step]
            return held.is_rounded(rows, slice(first, first + len(rows)), is_fresh=is_fresh)

        return all(in_threads(is_rounded, range(0, len(matrix), step)))

    return any(fits(matrix) for matrix in readings if matrix.shape == (weight.out_features, weight.in_features))


def survival_by_layer(edits: Sequence[QuantizedEdit]) -> dict[str, Survival]:
    """Return the share that is left of each layer's update, by path."""
    return {path: survival for edit in edits for path, survival in edit.survival.items()}


def overall_share(survival: Mapping[str, Survival]) -> float | None:
    """Return the share of the whole update that is left after rounding; None if nothing is quantized."""
    parts = survival.values()
    return Survival(sum(part.kept for part in parts), sum(part.whole for part in parts)).share if parts else None


def check_survival(survival: Mapping[str, Survival]) -> None:
    """Check that more than half of the update survives at every layer."""
    shares = {path: part.share for path, part in survival.items()}
    lost = sorted((path for path in shares if shares[path] <= LEAST_SHARE), key=lambda path: shares[path])
    if not lost:
        return
    worst = ", ".join(f"{path} ({100 * shares[path]:.0f} %)" for path in lost[:5])
    more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
    raise MergeError(
        f"rounding leaves {100 * (overall_share(survival) or 0):.0f} % of the update, and half or less of it at "
        f"{len(lost)} of {len(shares)} layers: {worst}{more}. Give {option(base=...)}, to round the base's own "
        f"weights with the update, fold before quantizing ({command('export_onnx')}), or write it anyway with "
        f"{option(force=True)}"
    )
