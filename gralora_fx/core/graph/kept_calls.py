"""Calls that a graph keeps as one node each, since their operators alone would lose a backward or an update.

They are custom `autograd.Function`s, hooks on tensors and modules, and batch norms that average over all batches. In a
trace each calls one operator with a key; `Recording.write` puts the function in its place.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect
from torch.nn.modules import module as calls_of_modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import BackwardHook, RemovableHandle

from gralora_fx.base.compat.torch_graphs import FakeTensor, backward_engine, tree_leaves
from gralora_fx.base.patches import patched_here
from gralora_fx.errors import TraceError

_LIBRARIES = ("torch", "transformers")
_library: Any = torch.library.Library("gralora_trace", "DEF")  # type: ignore[no-untyped-call]
_library.define("kept(int key, Tensor[] tensors, SymInt[] sizes) -> Tensor[]")


@dataclass(frozen=True, eq=False)
class KeptCall:
    """The target of a node: a function, with the arguments of its call that are no values of the graph."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # of the call; `Tensor` or `SymInt` stands for a value of the graph

    def __post_init__(self) -> None:
        """Let no pass erase a hook that nothing reads."""
        if self.function is hooked:
            has_side_effect(self)

    def __reduce__(self) -> Any:
        """Return a copy's constructor, which does so too."""
        return KeptCall, (self.name, self.function, self.arguments)

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *values: Any) -> Any:
        """Call the function with values of the graph; those beyond its arguments come last."""
        given = iter(values)
        return self.function(*_filled(self.arguments, given, given), *given)

    @property
    def count(self) -> int:
        """Number of values of the graph among its arguments."""
        return sum(map(_is_value, self.arguments))

    def alone(self) -> KeptCall:
        """Return the call without backward hooks of a module, whose values it returns as they are."""
        if self.function is enter_hooks:
            return KeptCall(self.name, _together, self.arguments[3:])
        return KeptCall(self.name, _together, self.arguments) if self.function is leave_hooks else self


def _is_value(argument: object) -> bool:
    return argument is Tensor or argument is torch.SymInt


def _filled(arguments: tuple[Any, ...], tensors: Iterator[Any], sizes: Iterator[Any]) -> list[Any]:
    return [next(tensors) if a is Tensor else next(sizes) if a is torch.SymInt else a for a in arguments]


class _Recorded(NamedTuple):
    target: Callable[..., Any]
    arguments: tuple[Any, ...]  # as those of `KeptCall`
    stand_in: Callable[..., Any]  # computes the shapes of its results
    entered: int | None  # the key of the call whose additional last result it takes


class Recording:
    """The calls that a trace keeps."""

    def __init__(self, *, everything: bool) -> None:
        """Begin a trace, which keeps functions of weights only with `everything`, and those of libraries never."""
        self.everything = everything
        self.calls: list[_Recorded] = []
        self.results: dict[int, Any] = {}  # of the stand-ins
        self.lost: dict[str, None] = {}  # names of functions with a backward of their own that are not kept

    def call(
        self,
        name: str,
        function: Callable[..., Any],
        *arguments: Any,
        stand_in: Callable[..., Any],
        entered: int | None = None,
    ) -> Any:
        """Record a call and return what its stand-in does; a function without a name becomes the target itself."""
        template = tuple(
            Tensor if isinstance(a, Tensor) else torch.SymInt if isinstance(a, torch.SymInt) else a for a in arguments
        )
        target = KeptCall(name, function, template) if name else function
        key = len(self.calls)
        self.calls.append(_Recorded(target, template, stand_in, entered))
        tensors, sizes = ([a for a in arguments if isinstance(a, kind)] for kind in (Tensor, torch.SymInt))
        tensors = iter(torch.ops.gralora_trace.kept(key, tensors, sizes))
        result = self.results[key]
        if isinstance(result, Tensor):
            return next(tensors)
        return tuple(next(tensors) if isinstance(each, Tensor) else each for each in result)

    def write(self, graph_module: fx.GraphModule) -> None:
        """Replace the operator by the calls, in place.

        Before: `kept = gralora_trace.kept(0, [x], []); y = kept[0]`
        After:  `y = Round(x)`
        """
        for part in graph_module.modules() if self.calls else ():
            if isinstance(part, fx.GraphModule):
                written: dict[int, fx.Node] = {}
                for node in part.graph.find_nodes(op="call_function", target=torch.ops.gralora_trace.kept.default):
                    key: Any = node.args[0]
                    written[key] = node
                    self._write(node, key, written)
                part.recompile()

    def _write(self, node: fx.Node, key: int, written: dict[int, fx.Node]) -> None:
        call, result = self.calls[key], self.results[key]
        _, tensors, sizes = cast("Any", node.args)
        arguments = _filled(call.arguments, iter(tensors), iter(sizes))
        if isinstance(call.target, KeptCall):
            arguments = [a for a, b in zip(arguments, call.arguments, strict=True) if _is_value(b)]
        if call.entered is not None:
            with node.graph.inserting_before(node):
                arguments.append(node.graph.call_function(operator.getitem, (written[call.entered], -1)))
        node.target, node.args = call.target, tuple(arguments)
        places = None if isinstance(result, Tensor) else [i for i, r in enumerate(result) if isinstance(r, Tensor)]
        for user in list(node.users):
            if places is not None:
                user.update_arg(1, places[cast("int", user.args[1])])
            else:
                user.replace_all_uses_with(node)
                node.graph.erase_node(user)
                node.meta["val"] = user.meta.get("val")


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


def _stand_in(key: int, tensors: list[Tensor], sizes: list[Any]) -> list[Tensor]:
    recording = _recording.get()
    assert recording is not None
    call = recording.calls[key]
    token = _recording.set(None)
    try:
        result = call.stand_in(*_filled(call.arguments, iter(tensors), iter(sizes)))
    finally:
        _recording.reset(token)
    recording.results[key] = result
    return [each for each in ((result,) if isinstance(result, Tensor) else result) if isinstance(each, Tensor)]


_library.impl("kept", _stand_in, "CompositeImplicitAutograd")


@contextmanager
def keeping_calls(model: nn.Module, *, everything: bool) -> Iterator[Recording]:
    """Record a model's calls that a trace within the block keeps."""
    recording = Recording(everything=everything)
    token = _recording.set(recording)
    try:
        with ExitStack() as changed:
            changed.enter_context(patched_here(torch.autograd.Function, "apply", _apply))
            changed.enter_context(patched_here(Tensor, "register_hook", _register_hook))
            changed.enter_context(patched_here(*backward_engine(), _run_backward))
            changed.enter_context(patched_here(calls_of_modules, "BackwardHook", _TracedHook))
            for path, part in model.named_modules():
                if isinstance(part, _BatchNorm) and part.momentum is None and part.num_batches_tracked is not None:
                    changed.enter_context(patch.object(part, "forward", functools.partial(_average, part)))
                if part._backward_hooks and part._is_full_backward_hook is False:
                    recording.lost[f"the hook of {path or 'the model'} by register_backward_hook"] = None
            yield recording
    finally:
        _recording.reset(token)


@contextmanager
def with_own_hooks(model: nn.Module, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Within the block, let a forward with keywords do what a model's own backward hooks do for positional arguments.

    Yields:
        The forward, with the hooks that the model has not within the block.
    """
    if not model._backward_hooks and not model._backward_pre_hooks:
        yield forward
        return
    full, _ = model._get_backward_hooks()  # type: ignore[no-untyped-call]
    before = model._get_backward_pre_hooks()  # type: ignore[no-untyped-call]
    others = {p.name for p in inspect.signature(model.forward).parameters.values() if p.kind == p.KEYWORD_ONLY}
    hook_of: Any = calls_of_modules.__dict__

    def hooked_forward(**kwargs: Any) -> Any:
        seen = [name for name in kwargs if name not in others]
        hook = hook_of["BackwardHook"](model, full, before)
        given = hook.setup_input_hook(tuple(kwargs[name] for name in seen))
        return hook.setup_output_hook(forward(**kwargs | dict(zip(seen, given, strict=True))))

    with patch.multiple(model, _backward_hooks=OrderedDict(), _backward_pre_hooks=OrderedDict()):
        yield functools.wraps(forward)(hooked_forward)


_function: Any = torch.autograd.Function.__dict__["apply"].__func__
_hook: Any = Tensor.register_hook
_engine: Any = getattr(*backward_engine())


def _can_be_kept(arguments: tuple[Any, ...]) -> bool:
    """Return whether the values of the graph among a call's arguments are arguments themselves, not within others."""
    others = [a for a in arguments if not isinstance(a, (Tensor, torch.SymInt))]
    return not any(
        isinstance(leaf, (FakeTensor, torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in tree_leaves(others)
    )


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call a custom function."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def _apply(function: type[torch.autograd.Function], *arguments: Any, **named: Any) -> Any:
    recording = _recording.get()
    if recording is None:
        return _function(function, *arguments, **named)
    of_weight = any(isinstance(a, nn.Parameter) and a.ndim > 1 for a in arguments)
    is_known = function.__module__.partition(".")[0] in _LIBRARIES
    if named or is_known or not _can_be_kept(arguments) or (of_weight and not recording.everything):
        recording.lost[f"{function.__qualname__}.backward"] = None
        return _function(function, *arguments, **named)
    return recording.call(function.__name__, apply, function, *arguments, stand_in=apply)


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    if _recording.get() is None:
        return _engine(*args, **kwargs)
    raise TraceError(
        "the forward computes gradients itself (autograd.grad or backward), which a graph does not; compute them by "
        "their formula, or within an autograd.Function"
    )


def hooked(tensor: Tensor, hook: Any, *captured: Any) -> Tensor:
    """Register a hook on a tensor that has a gradient, with the values that it captured, if they are given."""
    if captured:
        cells = tuple(map(types.CellType, captured))
        hook = types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells)
    if tensor.requires_grad:
        tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    return tensor


def _register_hook(tensor: Tensor, hook: Any) -> Any:
    recording = _recording.get()
    if recording is None or not tensor.requires_grad:
        return _hook(tensor, hook)
    captured = [_content(cell) for cell in getattr(hook, "__closure__", None) or ()]
    if not any(isinstance(each, (FakeTensor, torch.SymInt)) for each in captured):
        captured = []
    recording.call("hooked", hooked, tensor, hook, *captured, stand_in=lambda tensor, *_: tensor)
    return RemovableHandle(OrderedDict())


def _content(cell: types.CellType) -> Any:
    with suppress(ValueError):  # an empty cell
        return cell.cell_contents
    return None


class _TracedHook:
    """Records the backward hooks of a module's call, in the place of torch's own record."""

    def __init__(self, *hooks: Any) -> None:
        self.hooks, self.recording = hooks, _recording.get()
        self.entered: int | None = None

    def setup_input_hook(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.recording is None or not _can_be_kept(arguments):
            return arguments
        self.entered = len(self.recording.calls)
        entered: tuple[Any, ...] = self.recording.call(
            "enter_hooks", enter_hooks, *self.hooks, *arguments, stand_in=lambda *args: _views(args[len(self.hooks) :])
        )
        return entered

    def setup_output_hook(self, result: Any) -> Any:
        results = result if isinstance(result, tuple) else (result,)
        if self.recording is None or self.entered is None or not _can_be_kept(results):
            return result
        left = self.recording.call(
            "leave_hooks", leave_hooks, *results, stand_in=lambda *args: _views(args), entered=self.entered
        )
        return left if isinstance(result, tuple) else left[0]


def _together(*values: Any) -> tuple[Any, ...]:
    return values


def _views(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.view_as(value) if isinstance(value, Tensor) else value for value in values)


def enter_hooks(module: nn.Module, hooks: list[Any], before: list[Any], *arguments: Any) -> tuple[Any, ...]:
    """Return a module's arguments for its backward hooks, and the record of them."""
    hook: Any = BackwardHook(module, hooks, before)
    return *hook.setup_input_hook(arguments), hook


def leave_hooks(*results: Any) -> Any:
    """Return a module's results for its backward hooks, given with the record of them."""
    return results[-1].setup_output_hook(results[:-1])


def averaging_norm(input: Tensor, mean: Tensor, variance: Tensor, count: Tensor, *more: Any) -> Tensor:
    """Compute a batch norm whose running statistics are those of all batches (`momentum=None`), and update these."""
    weight, bias, training, eps = more
    if training:
        count.add_(1)
    factor = 1.0 / float(count) if training else 0.0
    return nn.functional.batch_norm(input, mean, variance, weight, bias, training, factor, eps)


def _average(norm: Any, input: Tensor) -> Any:
    recording = _recording.get()
    tensors = input, norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.weight, norm.bias
    if recording is None:
        return type(norm).forward(norm, input)
    norm._check_input_dim(input)
    return recording.call("", averaging_norm, *tensors, norm.training, norm.eps, stand_in=lambda x, *_: x.clone())
