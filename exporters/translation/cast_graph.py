"""Casting of a traced graph to another float precision, as the model itself would run in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import OpOverload, base_name, tree_map
from gralora_fx.base.sources.lazy_tensors import EntrySource, lazy_parameter, raw_entries, raw_values_of
from gralora_fx.core.graph.linear_calls import tensor_at
from gralora_fx.core.graph.module_tree import module_stack
from gralora_fx.core.graph.surgery import copied, map_parameters
from gralora_fx.core.operators import CONTRACTIONS
from gralora_fx.errors import ExportError, option
from gralora_fx.format.cache_slots import StateKind
from gralora_fx.format.input_names import PAST

_aten = torch.ops.aten
_CASTS = {_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten._to_copy.default}
_LIKE = {_aten.type_as.default, _aten.to.other}  # casts to the dtype of another tensor
# contractions with weights or between activations, which run in the model's own precision
_CONTRACTIONS = {
    "addbmm", "addmm", "addmv", "baddbmm", "bilinear", "bmm", "conv1d", "conv2d", "conv3d", "convolution",
    "einsum", "embedding", "grouped_mm_fallback", "linear", "matmul", "mm", "mv",
    "scaled_dot_product_attention",
}  # fmt: skip
_FLOAT16_OVERFLOW = 65520.0  # the smallest value that rounds to infinity


class _Kind(Enum):
    """Determines the precision of a float value."""

    OWN = "own"  # the model's own precision: weights, and values computed with them
    RAISED = "raised"  # float32 because the model casts up, as inside a normalisation or a softmax
    FREE = "free"  # float32, computed without a weight, such as rotary angles; cast where it meets the other kinds


class GraphCast:
    """One cast of a graph to another precision (see `CastGraph`)."""

    def __init__(
        self, graph_module: fx.GraphModule, before: torch.dtype, dtype: torch.dtype, cache: tuple[StateKind, ...]
    ) -> None:
        """Copy the graph; `before` is the dtype of its parameters, `cache` the kinds of its cache's tensors."""
        self.source = graph_module
        self.before, self.dtype, self.cache = before, dtype, cache
        self.module = copied(graph_module, "CastGraph")
        self.graph = self.module.graph
        self.kinds: dict[fx.Node, _Kind] = {}
        self.raised: dict[fx.Node, fx.Node] = {}
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def run(self) -> fx.GraphModule:
        """Return the graph in the other precision."""
        pasts = [node for node in self.graph.find_nodes(op="placeholder") if str(node.target).startswith(PAST)]
        summed = {node for node, kind in zip(pasts, self.cache, strict=False) if kind.sums_up}
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                if _is_float(node):
                    self._note(node, _Kind.RAISED if node in summed else _Kind.OWN)
            elif node.op == "get_attr":
                self._take_attribute(node)
            elif node.op == "output":
                self._give_outputs(node)
            elif node.target in _CASTS:
                self._cast(node)
            else:
                self._call(node)
        map_parameters(self.module, self._in_dtype)
        self.graph.lint()
        self.module.recompile()
        return self.module

    def _take_attribute(self, node: fx.Node) -> None:
        tensor = tensor_at(self.source, str(node.target))
        if tensor is None or not tensor.is_floating_point():
            return
        node.meta.setdefault("val", tensor)
        self._note(node, _Kind.OWN if isinstance(tensor, nn.Parameter) else _Kind.FREE)

    def _give_outputs(self, node: fx.Node) -> None:
        """Cast outputs to float32, except those of a cache."""
        outputs = [arg for arg in node.all_input_nodes if arg in self.kinds]
        kinds = zip(outputs[1:], self.cache, strict=False)
        cache_outputs = {arg for arg, kind in kinds if not kind.sums_up}
        for arg in dict.fromkeys(outputs):
            dtype = self.dtype if arg in cache_outputs else torch.float32
            self._use(node, arg, dtype)

    def _cast(self, node: fx.Node) -> None:
        """Handle one of the model's own casts: up to float32, back again, or of integers."""
        (source,) = node.all_input_nodes
        result = node.meta["val"]
        if not result.is_floating_point():
            return
        kind = self.kinds.get(source)
        if kind is None or kind is _Kind.FREE:
            self._note(node, _Kind.FREE)
        elif self.before == torch.float32 and node.target is not _aten.to.dtype:
            self._note(node, kind)  # to a device or to another tensor's dtype, not to float32
        elif self.before == torch.float32:  # in a float32 graph only the order tells casts up from casts back
            self._note(node, _Kind.RAISED if kind is _Kind.OWN else _Kind.OWN)
            self._part_from(node, source)
        else:
            self._note(node, _Kind.OWN if result.dtype == self.before else _Kind.RAISED)
        self._set_dtype(node)

    def _part_from(self, node: fx.Node, source: fx.Node) -> None:
        """Let readers outside the module that raised a value read the original; in float32 both are one tensor."""
        if self.kinds[node] is not _Kind.RAISED:
            return
        self.raised[node] = source
        scope = _scope(node)
        for user in list(node.users):
            if not _scope(user).startswith(scope):
                user.replace_input_with(node, source)

    def _call(self, node: fx.Node) -> None:
        """Cast an operator's float operands to one precision, which its result has too."""
        floats = [arg for arg in node.all_input_nodes if arg in self.kinds]
        kind = self._kind_of(node, floats)
        if any(_is_float(value) for value in _values(node)):
            self._note(node, kind)
        dtype = self._dtype_of(kind)
        if node.target in _LIKE:
            node.target, node.args, node.kwargs = _aten.to.dtype, (node.args[0], dtype), {}
            return
        for arg in floats:
            self._use(node, arg, dtype)
        if _dtype_argument(node) is not None:
            self._set_dtype(node)
        self._keep_finite(node, dtype)

    def _kind_of(self, node: fx.Node, floats: list[fx.Node]) -> _Kind:
        if node.target in _LIKE and isinstance(other := node.args[1], fx.Node):
            return self.kinds.get(self.raised.get(other, other), _Kind.FREE)
        kinds = {self.kinds[arg] for arg in floats}
        dtype = _dtype_argument(node)
        if dtype is not None and dtype.is_floating_point and kinds - {_Kind.FREE}:
            return _Kind.RAISED if dtype == torch.float32 else _Kind.OWN
        if kinds <= {_Kind.FREE}:
            return _Kind.FREE
        if _Kind.RAISED not in kinds or (_Kind.OWN in kinds and _contracts(node)):
            return _Kind.OWN
        return _Kind.RAISED

    def _dtype_of(self, kind: _Kind) -> torch.dtype:
        return self.dtype if kind is _Kind.OWN else torch.float32

    def _note(self, node: fx.Node, kind: _Kind) -> None:
        self.kinds[node] = kind
        self._retype(node, self._dtype_of(kind))

    def _retype(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Record the dtype of a node's float values."""
        node.meta["val"] = tree_map(lambda value: _as_dtype(value, dtype), node.meta["val"])

    def _use(self, user: fx.Node, arg: fx.Node, dtype: torch.dtype) -> None:
        """Cast a value for one of its readers, if its dtype differs."""
        values = [value for value in _values(arg) if _is_float(value)]
        if not values or values[0].dtype == dtype or not isinstance(arg.meta["val"], Tensor):
            return
        if (arg, dtype) not in self.casts:
            with self.graph.inserting_after(arg):
                self.casts[arg, dtype] = self._new_cast(arg, dtype, user)
        user.replace_input_with(arg, self.casts[arg, dtype])

    def _new_cast(self, arg: fx.Node, dtype: torch.dtype, user: fx.Node) -> fx.Node:
        cast = self.graph.call_function(_aten._to_copy.default, (arg,), {"dtype": dtype})
        cast.meta = {k: v for k, v in (user.meta | arg.meta).items() if k != "custom"}
        cast.meta["val"] = _as_dtype(arg.meta["val"], dtype)
        return cast

    def _set_dtype(self, node: fx.Node) -> None:
        """Set a node's dtype argument to its recorded dtype."""
        dtype = next((value.dtype for value in _values(node) if isinstance(value, Tensor)), None)
        if dtype is None:
            return
        node.args = tuple(dtype if isinstance(arg, torch.dtype) else arg for arg in node.args)
        node.kwargs = {name: dtype if isinstance(arg, torch.dtype) else arg for name, arg in node.kwargs.items()}

    def _keep_finite(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Clamp constants such as the smallest float32, which masks a position, to the precision's range."""
        limit, extreme = torch.finfo(self.dtype).max, torch.finfo(self.before).max

        def bounded(value: Any) -> Any:
            if isinstance(value, float) and math.isfinite(value) and (dtype == self.dtype or abs(value) >= extreme):
                return min(max(value, -limit), limit)
            return value

        node.args = tuple(bounded(arg) for arg in node.args)
        node.kwargs = {name: bounded(arg) for name, arg in node.kwargs.items()}

    def _in_dtype(self, parameter: nn.Parameter, name: str) -> nn.Parameter:
        if not parameter.is_floating_point() or parameter.dtype == self.dtype:
            return parameter
        return _cast_parameter(parameter, self.dtype, name)


def cast_inputs(graph: fx.Graph, dtype: torch.dtype) -> fx.GraphModule:
    """Let a cast graph take floats of any dtype, and return its module."""
    for node in filter(_is_float, graph.find_nodes(op="placeholder")):
        with graph.inserting_after(node):
            cast = graph.call_function(_aten.to.dtype, (node, dtype))
        cast.meta = dict(node.meta)
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    owner = graph.owning_module
    assert owner is not None
    owner.recompile()
    return owner


def _cast_parameter(parameter: nn.Parameter, dtype: torch.dtype, name: str) -> nn.Parameter:
    def cast(values: Tensor) -> Tensor:
        largest = max(abs(float(bound)) for bound in torch.aminmax(values)) if values.numel() else 0.0
        if dtype == torch.float16 and not largest < _FLOAT16_OVERFLOW:
            raise ExportError(
                f"{name} holds {largest:.3g}, which float16 cannot; take {option(precision='bf16')} or "
                f"{option(precision='fp32')}"
            )
        return values.to(dtype)

    entries = EntrySource(lambda: map(cast, raw_entries(parameter, name)))  # stacks, which are cast one by one
    source = entries if parameter.ndim == 3 else lambda: cast(raw_values_of(parameter, name))
    return lazy_parameter(source, parameter.shape, dtype)


def _scope(node: fx.Node) -> str:
    paths = [path for path, _ in module_stack(node)]
    return f"{paths[-1]}." if paths and paths[-1] else ""


def _contracts(node: fx.Node) -> bool:
    target = node.target
    name = base_name(target) if isinstance(target, OpOverload) else str(target)
    return target in CONTRACTIONS or name in _CONTRACTIONS


def _dtype_argument(node: fx.Node) -> torch.dtype | None:
    """Return the dtype of its result that a node's arguments specify."""
    return next((arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, torch.dtype)), None)


def _values(node: fx.Node) -> Iterator[Any]:
    value = node.meta.get("val")
    yield from value if isinstance(value, (tuple, list)) else (value,)


def _is_float(value: Any) -> bool:
    value = value.meta.get("val") if isinstance(value, fx.Node) else value
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Change the dtype of a recorded value, keeping its symbolic sizes."""
    if not _is_float(value) or value.dtype == dtype:
        return value
    return (
        value.to(dtype) if not isinstance(value, nn.Parameter) else torch.empty_like(value, dtype=dtype, device="meta")
    )
