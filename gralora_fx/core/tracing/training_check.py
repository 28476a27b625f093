"""Compares how a trace trains with how its model does: gradients, and buffers after a step, in both modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gralora_fx.base.compat.torch_graphs import tree_leaves, tree_map
from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.tracing.check import call_eager
from gralora_fx.core.tracing.draft import Captured
from gralora_fx.core.tracing.inputs.input_trees import tensor_paths
from gralora_fx.core.tracing.inputs.signature import own_inputs
from gralora_fx.core.tracing.normalize.modes import set_mode, switches_more_than_dropout
from gralora_fx.errors import first_line
from gralora_fx.format.input_names import PAST

_LIBRARIES = ("torch", "transformers")
# values of parameters up to which gradients are compared, of a model of these libraries' classes alone and of others
_LARGEST, _LARGEST_OWN = 10_000_000, 100_000_000
# what rounding changes at most: shares of a tensor's own norm and of the largest gradient's, in float32 and in half
_ROUNDED, _ROUNDED_HALF = (1e-3, 1e-5), (0.1, 1e-2)
_Step = dict[str, tuple[float, float]]  # of each gradient and changed buffer: a product with it, and its norm
_GRADIENT = "the gradient of "


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Let every parameter require gradients within the block, as behind an adapter its output does."""
    frozen = [part for part in model.parameters() if part.is_floating_point() and not part.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def can_compare(draft: Captured) -> bool:
    """Return whether a model has values, and few enough, to compare its gradients."""
    parameters = list(draft.model.parameters())
    if not draft.has_values or any(parameter.is_meta for parameter in parameters):
        return False
    kinds = {type(part).__module__.partition(".")[0] for part in draft.model.modules()}
    is_own = bool(draft.lost or draft.kept_calls or kinds.difference(_LIBRARIES))
    return sum(parameter.numel() for parameter in parameters) <= (_LARGEST_OWN if is_own else _LARGEST)


def training_gaps(draft: Captured) -> list[str]:
    """Return what differs between a step of the model and of its graph, or how that fails, in either mode.

    Dropout is off, since graphs may draw in another order. A mode in which the model itself fails is left out, and one
    in which it gives other values every time; so is training, if the graph is known to lack what a module does there.
    """
    model, graph_module, found = draft.model, draft.graph_module, dict[str, None]()
    is_half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())
    bounds = _ROUNDED_HALF if is_half else _ROUNDED

    def eager(training: bool) -> _Step:
        for mode in (True, training):  # training drops what layers keep in evaluation, such as LeViT's biases
            model.train(mode)
        found = _step(draft, model, lambda sample: call_eager(model, sample))
        model.train()
        return found

    has_dropout_alone = not (draft.lost or draft.kept_calls or switches_more_than_dropout(graph_module.graph))
    for training in (False,) if draft.evaluates or draft.evaluated or has_dropout_alone else (False, True):
        if set_mode(graph_module.graph, training, drops=False):
            graph_module.recompile()
        try:
            expected = eager(training)
        except Exception:  # noqa: BLE001  # a model may raise anything, as a batch norm of one row does in training
            continue
        try:
            actual = _step(draft, graph_module, lambda sample: graph_module(**own_inputs(sample)))
        except Exception as error:  # noqa: BLE001  # a graph raises its operators' errors
            found[f"it fails with {first_line(error)}"] = None
            continue
        gaps = _gaps(expected, actual, *bounds)
        if gaps and not _gaps(expected, eager(training), *bounds):
            found |= dict.fromkeys(gaps)
    if set_mode(graph_module.graph, False):
        graph_module.recompile()
    return list(found)


def _step(draft: Captured, module: nn.Module, call: Callable[[Mapping[str, Any]], Any]) -> _Step:
    """Run a forward and a backward of the model or its graph, with the same seed; buffers are restored after it."""
    buffers = {name: buffer for name, buffer in module.named_buffers() if not buffer.is_meta}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    leaves = {name: value if name == PAST else tree_map(_as_leaf, value) for name, value in draft.sample.items()}
    tensors = {f"the input {path}": leaf for path, leaf in tensor_paths(leaves).items()}
    tensors |= dict(draft.model.named_parameters())
    try:
        with torch.enable_grad(), all_trainable(draft.model), quiet(), torch.random.fork_rng(devices=()), _NoDropout():
            torch.manual_seed(0)
            wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
            outputs = [leaf for leaf in tree_leaves(call(leaves)) if isinstance(leaf, Tensor) and leaf.requires_grad]
            losses = [_probe(output) for output in outputs]
            gradients = torch.autograd.grad(losses, list(wanted.values()), allow_unused=True) if losses else ()
        found = {f"{_GRADIENT}{name}": gradient for name, gradient in zip(wanted, gradients, strict=False)}
        changed = {f"the buffer {n}": b for n, b in buffers.items() if not torch.equal(b, before[n])}
        return {name: _facts(each) for name, each in (found | changed).items() if each is not None}
    finally:
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(before[name])


def _facts(tensor: Tensor) -> tuple[float, float]:
    norm = torch.linalg.vector_norm(tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.float())
    return float(_probe(tensor).nan_to_num()), float(norm.nan_to_num())


def _as_leaf(value: Any) -> Any:
    return value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _probe(tensor: Tensor) -> Tensor:
    """Return the product of a tensor with random rows and columns, the same for every tensor of its shape."""
    rows = tensor.reshape(len(tensor) if tensor.ndim and len(tensor) else 1, -1)
    rows = (rows.real if rows.is_complex() else rows).to(torch.promote_types(rows.dtype, torch.float32))
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator).to(rows) for size in rows.shape)
    return left @ (rows @ right)


def _gaps(expected: _Step, actual: _Step, of_own: float, of_largest: float) -> list[str]:
    """Return the names of what differs by more than these shares of its own norm and of the largest gradient's."""
    floor = of_largest * max((norm for name, (_, norm) in expected.items() if name.startswith(_GRADIENT)), default=0.0)
    found = []
    for name in expected | actual:
        pairs = zip(expected.get(name, (0.0, 0.0)), actual.get(name, (0.0, 0.0)), strict=True)
        largest = max(expected.get(name, (0.0, 0.0))[1], actual.get(name, (0.0, 0.0))[1])
        bound = of_own * largest + (floor if name.startswith(_GRADIENT) else 0.0)
        if any(abs(one - other) > bound for one, other in pairs):
            found.append(name)
    return found


# position and name of the probability, by the names of functions with dropout
_PROBABILITIES = {"scaled_dot_product_attention": (4, "dropout_p"), "multi_head_attention_forward": (10, "dropout_p")}


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, with a probability of 0 if it has dropout."""
        name, kwargs = str(getattr(func, "__name__", "")), dict(kwargs or {})
        place = _PROBABILITIES.get(name, (1, "p") if "dropout" in name else None)
        if place is not None and len(args) > place[0]:
            args = (*args[: place[0]], 0.0, *args[place[0] + 1 :])
        elif place is not None and place[1] in kwargs:
            kwargs[place[1]] = 0.0
        return func(*args, **kwargs)
