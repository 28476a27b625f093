"""The formats of experts' matrices: blocks, of a size that divides the widths of both products."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from gralora_fx.core.graph.linear_calls import tensor_at
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.quantize.formats import LEAST_BLOCK, Blocks, Format
from gralora_fx.exporters.quantize.plan import QuantizationPlan
from gralora_fx.features.experts.operators import Experts
from gralora_fx.format.quantized_weights import WIDEST_EXACT


def with_formats_of_experts(plan: QuantizationPlan, traced: TracedModel) -> QuantizationPlan:
    """Return the plan that stores experts in its format too, or in one of their own where it does not fit.

    Experts whose activations would be rounded in `int8-dynamic` have blocks of eight bits, whose activations ONNX
    Runtime rounds block by block.
    """
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
    """The weights of a layer's experts by their names in the graph; empty where the graph computes one of them."""
    names = [str(node.target) for node in (experts.up, experts.down) if node.op == "get_attr"]
    found = {name: weight for name in names if (weight := tensor_at(traced.graph_module, name)) is not None}
    return found if len(found) == 2 else {}


def _format(default: Format, widths: list[int]) -> Blocks | None:
    """The format of matrices of some numbers of inputs; None where no size of blocks divides all."""
    form = default if isinstance(default, Blocks) else Blocks(8)
    size = min(form.block_size, WIDEST_EXACT[form.bits])
    while size > LEAST_BLOCK and any(width % size for width in widths):
        size //= 2
    return None if any(width % size for width in widths) else dataclasses.replace(form, block_size=size)
