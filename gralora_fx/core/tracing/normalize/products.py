"""Products with a matrix parameter in other spellings, as the plain products whose layers adapters find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.core.graph.linear_calls import origin_of, tensor_at
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.graph.surgery import erase_unused, module_of
from gralora_fx.core.tracing.normalize.modes import UNGUARDED

_aten = torch.ops.aten
_Factors = Iterator[tuple[Any, Any, bool]]  # candidates: `x`, the matrix, and whether the product is with its transpose
_REPEATS = {_aten.expand.default, _aten.unsqueeze.default, _aten.contiguous.default, _aten.clone.default}
_REPEATS |= {_aten.repeat.default, _aten.expand_as.default}
_SWAPS = {_aten.transpose.int, _aten.mT.default}


@contract(needs={UNGUARDED})
def plain_products(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace products of the last axis with a matrix that is a parameter by `linear` or `matmul`.

    Before: `y = einsum("...d,de->...e", [x, w]); z = bmm(y, expand(unsqueeze(v, 0), [n, 8, 4]))`
    After:  `y = matmul(x, w); z = matmul(y, v)`
    """
    changed = 0
    for node in list(graph.nodes):
        read = _SPELLINGS.get(node.target) if node.op == "call_function" and not node.kwargs else None
        for x, factor, is_transposed in () if read is None else read(*node.args):
            weight, swapped = _matrix(factor)
            shape, sizes = _shape(x), _shape(weight)[:: -1 if is_transposed != swapped else 1]
            is_plain = node.target is _aten.matmul.default and weight is factor
            if is_plain or len(sizes) != 2 or _shape(node) != (*shape[:-1], sizes[1]) or shape[-1:] != sizes[:1]:
                continue
            before = node.all_input_nodes
            node.target = _aten.linear.default if is_transposed != swapped else _aten.matmul.default
            node.args = (x, weight)
            for source in before:
                if source.op != "get_attr":
                    erase_unused(graph, source)
            changed += 1
            break
    return PassResult(changed)


def _matrix(value: Any) -> tuple[fx.Node | None, bool]:
    """Return the matrix that a value repeats along further first axes, if it does, and whether transposed."""
    if not isinstance(value, fx.Node) or len(_shape(value)) == 2:
        return (value if origin_of(value) is not None else None), False
    source = value.args[0] if value.target in _REPEATS | _SWAPS else None
    weight, swapped = (None, False) if source is None else _matrix(source)
    if value.target in _SWAPS:
        return (weight if value.args[1:] in ((1, 2), (2, 1), (-1, -2), (-2, -1), ()) else None), not swapped
    return (weight if _shape(value)[-2:] == _shape(source)[-2:] else None), swapped


def _shape(node: Any) -> tuple[str, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if value is None and isinstance(node, fx.Node) and node.op == "get_attr":
        value = tensor_at(module_of(node.graph), str(node.target))
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else ()


def _einsum(equation: str, *operands: Any) -> _Factors:
    factors = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    terms, _, result = equation.replace(" ", "").partition("->")
    pairs = list(zip(factors, terms.split(","), strict=False))
    for (x, of_x), (weight, of_weight) in (pairs, pairs[::-1]) if len(pairs) == 2 else ():
        letters = of_x.replace("...", "") + result[-1:]
        if result[:-1] == of_x[:-1] and letters.isalpha() and len({*letters}) == len(letters):
            if of_weight in (letters[-2:], letters[:-3:-1]):
                yield x, weight, of_weight == letters[:-3:-1]


def _tensordot(x: Any, weight: Any, of_x: list[int], of_weight: list[int]) -> _Factors:
    if of_x in ([-1], [len(_shape(x)) - 1]):
        yield x, weight, of_weight in ([1], [-1])


_SPELLINGS: dict[Any, Callable[..., _Factors]] = {
    _aten.bmm.default: lambda x, weight: iter([(x, weight, False)]),
    _aten.matmul.default: lambda x, weight: iter([(x, weight, False)]),
    _aten.inner.default: lambda x, weight: iter([(x, weight, True)]),
    _aten.einsum.default: _einsum,
    torch.einsum: _einsum,
    _aten.tensordot.default: _tensordot,
}
