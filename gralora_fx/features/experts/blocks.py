"""Experts with block-quantized matrices (`QMoE`): quantizing them, and reading them back."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gralora_fx.base.sources.lazy_tensors import computed_like, value_entries
from gralora_fx.core.graph.linear_calls import tensor_at
from gralora_fx.core.graph.pipeline import Skip
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.fold.requantize import stored_values
from gralora_fx.exporters.formats import LEAST_BLOCK, Blocks, Format
from gralora_fx.exporters.quantize.plan import QuantizationPlan
from gralora_fx.exporters.rules.builder import MICROSOFT, add_initializer, attributes_of, replace_value
from gralora_fx.exporters.rules.products.block_products import quantized_columns, stored_as, widened
from gralora_fx.exporters.rules.products.constant_matrices import drop_unread
from gralora_fx.exporters.rules.products.initializers import ProductWeight, Reader, Storage
from gralora_fx.exporters.rules.products.quantize_weights import Quantized
from gralora_fx.exporters.rules.products.quantized_products import stored_scales
from gralora_fx.exporters.translation.weights import StackedTensor, derived, entries_of
from gralora_fx.features.experts.operators import Experts
from gralora_fx.features.experts.rows import MOE, arranged, as_modelled
from gralora_fx.format.quantized_weights import WIDEST_EXACT


def with_formats_of_experts(plan: QuantizationPlan, traced: TracedModel) -> QuantizationPlan:
    """Return a plan with a format for experts: its own, or blocks (of eight bits in `int8-dynamic`) that fit."""
    own: dict[str, Format | None] = {}
    names = set[str]()
    for _, experts in Experts.all_in(traced.graph_module.graph):
        weights = expert_matrices(traced, experts)
        names |= {name for weight in weights.values() for name in traced.tree.names_of(weight)} | set(weights)
        form = _format(plan.default, [weight.shape[1 if experts.is_transposed else 2] for weight in weights.values()])
        if form != plan.default:
            own |= {name: form for weight in weights.values() for name in traced.tree.names_of(weight)}
    return dataclasses.replace(plan, by_matrix={**plan.by_matrix, **own}, layers=names.union(plan.layers or ()))


def expert_matrices(traced: TracedModel, experts: Experts) -> dict[str, Tensor]:
    """Return a layer's expert weights by their names in the graph; empty if the graph computes one of them."""
    names = [str(node.target) for node in (experts.up, experts.down) if node.op == "get_attr"]
    found = {name: weight for name in names if (weight := tensor_at(traced.graph_module, name)) is not None}
    return found if len(found) == 2 else {}


def _format(default: Format, widths: list[int]) -> Blocks | None:
    """Return the format of matrices with these input widths; None if no block size divides all."""
    form = default if isinstance(default, Blocks) else Blocks(8)
    size = min(form.block_size, WIDEST_EXACT[form.bits])
    while size > LEAST_BLOCK and any(width % size for width in widths):
        size //= 2
    return None if any(width % size for width in widths) else dataclasses.replace(form, block_size=size)


QMOE = "QMoE"
# which inputs are matrices, and which their zero points; of floats a bias follows each, of blocks scales and a bias
MATRICES = {MOE: ((2, 2), (4, 4)), QMOE: ((2, 11), (5, 12))}
_ROWS = 128  # rows of a matrix rounded at once: a search holds several copies
OF_BLOCKS = ("expert_weight_bits", "block_size", "weights_prepacked", "accuracy_level")
_UP, _DOWN = (at for at, _ in MATRICES[MOE])


def quantize_experts(model: ir.Model, plan: QuantizationPlan) -> Quantized:
    """Quantize the matrices of experts in blocks, as the plan says; in place.

    Before: `y = MoE(x, scores, up, up_bias, down, down_bias)`
    After:  `y = QMoE(x, scores, up_Q4, up_scales, up_bias, down_Q4, down_scales, down_bias, zero points)`
    """
    matrices: list[tuple[Format, int, int, int]] = []
    skipped = []
    for node in list(model.graph.all_nodes()):
        if (node.domain, node.op_type) != (MICROSOFT, MOE):
            continue
        weights = [value for value in (node.inputs[_UP], node.inputs[_DOWN]) if value is not None]
        form, other = (plan.format_of([str(value.name)]) for value in weights)
        if not isinstance(form, Blocks) or form != other:
            is_planned = plan.layers is None or str(weights[0].name) in plan.layers
            reason = "no size of blocks divides their widths" if is_planned else "the checkpoint has them in floats"
            skipped.append(Skip(str(weights[0].name), f"its experts stay float: {reason}"))
            continue
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        blocks = [_initializers(model.graph, value, form) for value in weights]
        new = _in_blocks(node, blocks, form)
        replace_value(new.outputs[0], node.outputs[0])
        graph.insert_before(node, new)
        graph.remove(node, safe=True)
        for value in weights:
            assert value.shape is not None
            experts, outputs, inputs = (int(size) for size in value.shape.numpy())
            matrices.append((form, inputs, experts * outputs, value.dtype.bitwidth if value.dtype else 32))
        drop_unread(model.graph, [str(value.name) for value in weights])
    return Quantized(matrices, tuple(skipped))


def _in_blocks(node: ir.Node, blocks: list[list[ir.Value]], form: Blocks) -> ir.Node:
    """Return the block-quantized replacement of a `MoE` node."""
    (up, up_scales, *up_zeros), (down, down_scales, *down_zeros) = blocks
    up_bias, down_bias = (node.inputs[at + 1] if len(node.inputs) > at + 1 else None for at in (_UP, _DOWN))
    operands = [*node.inputs[:2], up, up_scales, up_bias, down, down_scales, down_bias]
    if up_zeros:
        operands += [None, None, None, *up_zeros, *down_zeros]
    attributes = attributes_of(node)
    attributes |= {"expert_weight_bits": form.bits, "block_size": form.block_size, "weights_prepacked": 0}
    if form.accuracy_level:
        attributes["accuracy_level"] = form.accuracy_level
    new = ir.node(QMOE, operands, attributes, domain=MICROSOFT, version=1)
    new.metadata_props.update(node.metadata_props)
    return new


@dataclass
class StackedTogether:
    """Stacks computed together, one entry of all at a time, when the first of them is written.

    The first one written is not kept, the others are until they are written: so write the largest first if memory
    matters. Threads compute one at a time, since they hold float entries meanwhile.
    """

    compute: Callable[[], Iterable[Sequence[NDArray[Any]]]]  # yields for each entry, in order, its arrays in all stacks
    _kept: dict[int, list[NDArray[Any]]] = field(default_factory=dict, init=False)
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def entries(self, index: int) -> Iterator[NDArray[Any]]:
        """Yield the entries of one stack by its index; read all of them before another's."""
        with self._lock:
            if index in self._kept:
                yield from self._kept.pop(index)
                return
            self._kept.clear()
            kept: dict[int, list[NDArray[Any]]] = {}
            for arrays in self.compute():
                for place, array in enumerate(arrays):
                    if place != index:
                        kept.setdefault(place, []).append(array)
                yield arrays[index]
            self._kept = kept


def _initializers(graph: ir.Graph, weight: ir.Value, form: Blocks) -> list[ir.Value]:
    """Return codes `[experts, out, bytes]`, scales and zero points of matrices `[experts, out, in]`."""
    tensor, name = weight.const_value, str(weight.name)
    assert tensor is not None
    experts, outputs, inputs = (int(size) for size in tensor.shape.numpy())
    count, bits = inputs // form.block_size, form.bits
    parts = [
        (f"{name}_Q{bits}", ir.DataType.UINT8, (experts, outputs, inputs * bits // 8)),
        (f"{name}_scales", stored_as(form, tensor.dtype), (experts, outputs, count)),
    ]
    if form.zero_points:
        parts.append((f"{name}_zero_points", ir.DataType.UINT8, (experts, outputs, -(-count * bits // 8))))

    def quantized() -> list[StackedTensor]:
        stacks = StackedTogether(functools.partial(_quantized, tensor, form, name))
        return [
            StackedTensor(label, kind, ir.Shape(shape), functools.partial(stacks.entries, index))
            for index, (label, kind, shape) in enumerate(parts)
        ]

    tensors = derived([tensor], ("blocks of experts", name, form), quantized)
    packed, scales, *zeros = [
        graph.initializers.get(str(part.name)) or add_initializer(graph, part) for part in tensors
    ]
    return [packed, widened(graph, scales, tensor.dtype), *zeros]


def _quantized(tensor: ir.TensorProtocol, form: Blocks, name: str) -> Iterator[list[NDArray[Any]]]:
    """Yield the quantized arrays of one expert at a time, reading its floats only then."""

    def of(rows: NDArray[Any]) -> list[NDArray[Any]]:
        return [array.reshape(len(rows), -1) for array in quantized_columns(rows.T, form, tensor.dtype, name)]

    for matrix in entries_of(tensor):
        groups = [of(matrix[start : start + _ROWS]) for start in range(0, len(matrix), _ROWS)]
        del matrix  # before the next is computed
        yield [np.concatenate(arrays) for arrays in zip(*groups, strict=True)]


_FOUR = 4


def rounded_experts(directory: Path, reference: TracedModel) -> tuple[dict[int, nn.Parameter], int]:
    """Return a model's experts rounded to an export's blocks, by parameter id, and the number of weights in blocks."""
    layers = list(Experts.all_in(reference.graph_module.graph))
    weights: dict[str, ProductWeight] = {}
    for path in sorted(directory.glob("*.onnx")) if layers else ():
        weights |= {name: w for name, w in expert_weights(ir.load(path).graph).items() if w.storage == "blocks"}
    rounded: dict[int, nn.Parameter] = {}
    for _, experts in layers:
        for (name, own), is_up in zip(expert_matrices(reference, experts).items(), (True, False), strict=False):
            if name not in weights:
                continue
            rounded[id(own)] = computed_like(own, functools.partial(_rounded, own, weights[name], experts, is_up=is_up))
    return rounded, sum(weight.out_features * weight.in_features for weight in weights.values())


def _rounded(own: Tensor, weight: ProductWeight, experts: Experts, *, is_up: bool) -> Tensor:
    held, parts = stored_values(weight), []
    for index, matrix in enumerate(value_entries(own, weight.name)):
        rows = arranged(matrix.numpy(), experts.gate, is_up=is_up, is_transposed=experts.is_transposed)
        outputs = slice(index * len(rows), (index + 1) * len(rows))
        rows = held.values(outputs) if held.is_rounded(rows, outputs) else rows
        parts.append(as_modelled(rows, experts.gate, is_up=is_up, is_transposed=experts.is_transposed))
    return torch.from_numpy(np.stack(parts))


def experts_in_floats(model: ir.Model) -> None:
    """Let experts multiply by their dequantized matrices, in float32, without rounding activations; in place.

    Before: `y = QMoE(x, scores, up_Q8, up_scales, up_bias, down_Q8, down_scales, down_bias)`
    After:  `y = MoE(x, scores, up, up_bias, down, down_bias)`; with 4 bits, `QMoE` at accuracy level 1
    """
    weights = {weight.name: (name, weight) for name, weight in expert_weights(model.graph).items()}
    for node in list(model.graph.all_nodes()):
        if (node.domain, node.op_type) != (MICROSOFT, QMOE):
            continue
        if node.attributes["expert_weight_bits"].as_int() == _FOUR:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
            continue
        graph, inputs = node.graph, [*node.inputs, None]
        assert isinstance(graph, ir.Graph)
        operands = list(inputs[:2])
        for at, _ in MATRICES[QMOE]:
            name, weight = weights[str(getattr(inputs[at], "name", None))]
            operands += [_floats(model.graph, name, weight), inputs[at + 2]]
        attributes = {name: value for name, value in attributes_of(node).items() if name not in OF_BLOCKS}
        new = ir.node(MOE, operands, attributes, domain=MICROSOFT, version=1)
        replace_value(new.outputs[0], node.outputs[0])
        graph.insert_before(node, new)
        graph.remove(node, safe=True)
        drop_unread(model.graph, [str(value.name) for value in inputs if value is not None and value.is_initializer()])


def _floats(graph: ir.Graph, name: str, weight: ProductWeight) -> ir.Value:
    """Return an initializer of a matrix's dequantized values, in the scales' dtype."""
    tensor, scales = weight.value.const_value, weight.scales
    assert tensor is not None
    assert scales is not None
    dtype = ir.DataType.FLOAT if weight.is_widened or scales.dtype is None else scales.dtype
    experts = int(tensor.shape.numpy()[0])
    outputs = weight.out_features // experts

    def entries() -> Iterator[NDArray[np.float32]]:
        held = stored_values(weight)
        for index in range(experts):
            yield held.values(slice(index * outputs, (index + 1) * outputs)).astype(dtype.numpy())

    shape = ir.Shape([experts, outputs, weight.in_features])
    made = derived([tensor], "floats of experts", lambda: StackedTensor(name, dtype, shape, entries))
    return graph.initializers.get(name) or add_initializer(graph, made)


def expert_weights(graph: ir.Graph) -> dict[str, ProductWeight]:
    """Return the experts' matrices in a graph, by the names of their parameters.

    A stack `[experts, out, in]` is a weight with `experts * out` output features, its rows in the operator's order (see
    `arranged` and `as_modelled`).
    """
    weights: dict[str, ProductWeight] = {}
    for node in graph.all_nodes():
        if node.domain == MICROSOFT and node.op_type in MATRICES:
            for place in MATRICES[node.op_type]:
                weight = _weight(node, *place)
                if weight is not None:
                    weights.setdefault(weight.name.removesuffix(f"_Q{weight.bits}"), weight)
    return weights


def _weight(node: ir.Node, at: int, zeros: int) -> ProductWeight | None:
    inputs = [*node.inputs, *[None] * (zeros + 1 - len(node.inputs))]
    value, scales, zero_points, is_widened = inputs[at], None, None, False
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    experts, outputs, width = (int(size) for size in value.const_value.shape.numpy())
    bits = block_size = 0
    if node.op_type == QMOE:
        bits, block_size = (node.attributes[name].as_int() for name in ("expert_weight_bits", "block_size"))
        width, scales, zero_points = width * 8 // bits, stored_scales(inputs[at + 1]), inputs[zeros]
        is_widened = scales is not inputs[at + 1]
    storage: Storage = "float" if node.op_type == MOE else "blocks"
    readers = (Reader(node, at),)
    return ProductWeight(
        value, storage, False, width, experts * outputs, readers, (), scales, is_widened, zero_points, block_size,
        bits,
    )  # fmt: skip
