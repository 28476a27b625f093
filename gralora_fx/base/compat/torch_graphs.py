"""Private API of torch: operator schemas, fake tensors, calling conventions, autocast, nested inputs."""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.packages import fenced
from gralora_fx.base.patches import patched_here

with fenced("torch"):
    from torch._guards import detect_fake_mode
    from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
    from torch._subclasses import FakeTensor, fake_impls
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import (
        SUPPORTED_NODES,
        GetAttrKey,
        KeyPath,
        MappingKey,
        SequenceKey,
        TreeSpec,
        tree_flatten,
        tree_flatten_with_path,
        tree_leaves,
        tree_map,
        tree_map_only,
        tree_map_with_path,
        tree_unflatten,
        treespec_leaf,
    )
    from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "SUPPORTED_NODES",
    "FakeTensor",
    "FixedSize",
    "GetAttrKey",
    "HigherOrderOperator",
    "KeyPath",
    "MappingKey",
    "OpOverload",
    "OpOverloadPacket",
    "SequenceKey",
    "TorchDispatchMode",
    "TreeSpec",
    "backward_engine",
    "base_name",
    "code_transformer",
    "convention_of",
    "detect_fake_mode",
    "enter_autocast",
    "has_kernel",
    "is_forward_mode",
    "is_mutable",
    "is_traced",
    "is_transformed",
    "leave_autocast",
    "memory_of",
    "multiplies_bfloat16",
    "name_keywords",
    "plain_backward",
    "returns_alias",
    "saved_guards",
    "schema_of",
    "set_convention",
    "size_guards",
    "size_range",
    "sizes_of_slices",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_info",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_map_with_path",
    "tree_unflatten",
    "treespec_leaf",
    "will_run",
    "without_fixed_sizes",
    "without_new_symbols",
]


def schema_of(target: object) -> Any:
    """Return an operator's schema; None for another function."""
    return getattr(target, "_schema", None)


def backward_engine() -> tuple[Any, str]:
    """Return the module and the name of the function that every backward calls."""
    return torch.autograd, "_engine_run_backward"


def is_mutable(target: object) -> bool:
    """Return whether a target is an operator that mutates one of its arguments."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


def is_transformed() -> bool:
    """Return whether a functional transform (`vmap`, `jvp`) or a dispatch mode is active."""
    return bool(torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


def is_forward_mode() -> bool:
    """Return whether tensors may have tangents of `torch.autograd.forward_ad`, in any thread."""
    return torch.autograd.forward_ad._current_level >= 0


def plain_backward() -> int | None:
    """Return the number of the backward pass that runs; None if it is differentiated or transformed itself."""
    task = torch._C._current_graph_task_id()
    return None if task < 0 or torch.is_grad_enabled() or is_transformed() else task


def will_run(node: Any) -> bool:
    """Return whether the backward pass that runs will run a node of autograd's graph."""
    return torch._C._will_engine_execute_node(node)


def has_kernel(operator: str, device: str) -> bool:
    """Return whether an operator, `namespace::name`, has its own kernel for a device, such as `CPU`."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, device))


def multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for products of bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def is_traced(tensor: Tensor) -> bool:
    """Return whether operators on a tensor are recorded or replaced by a compiler, a transform or a mode."""
    return type(tensor) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or is_transformed()


def memory_of(tensor: Tensor) -> Any:
    """Return a key of a tensor's memory, equal for tensors that share it; it does not hold the memory."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def base_name(target: OpOverload) -> str:
    """Return an operator's name without its namespace and overload: `add_` of `aten::add_.Tensor`."""
    return str(target._schema.name.partition("::")[2])


def returns_alias(target: OpOverload) -> bool:
    """Return whether an operator's result may alias an argument."""
    return any(returned.alias_info is not None for returned in target._schema.returns)


def convention_of(graph: fx.Graph) -> Any:
    """Return a graph's code generator, which holds its calling convention for nested inputs and outputs."""
    return graph._codegen


def set_convention(graph: fx.Graph, convention: Any) -> None:
    """Set a graph's code generator without resetting its body transformer, as `set_codegen` would."""
    graph._codegen = convention


def name_keywords(paths: Iterable[str]) -> None:
    """Let the code of graphs name these paths even where a part is a keyword of Python, as of a layer called `in`.

    torch writes `self.in`, which is no Python; from the first such path on, it writes `getattr(self, "in")`.
    """
    written = torch.fx.graph._format_target
    if written.__module__ == __name__ or not any(keyword.iskeyword(part) for path in paths for part in path.split(".")):
        return

    def with_keywords(base: str, target: str) -> str:
        for part in target.split("."):
            base = f'getattr({base},"{part}")' if keyword.iskeyword(part) else written(base, part)
        return base

    torch.fx.graph._format_target = with_keywords


def tree_info(graph: fx.Graph) -> Any:
    """Return names and specs of nested inputs and outputs (`_PyTreeInfo`); None for a graph without them."""
    return getattr(graph._codegen, "pytree_info", None)


def code_transformer(graph: fx.Graph) -> Any:
    """Return the function that edits the lines of a graph's code (`on_generate_code`), or None."""
    return graph._codegen._body_transformer


def enter_autocast(device_type: str, dtype: torch.dtype | None, enabled: bool, cache_enabled: bool | None) -> Any:
    """Enter `torch.autocast` by a function call, as a graph does, where a `with` block is not possible."""
    return torch.amp.autocast_mode._enter_autocast(device_type, dtype, enabled, cache_enabled)  # type: ignore[no-untyped-call]


def leave_autocast(context: Any) -> None:
    """Leave the context that `enter_autocast` entered."""
    torch.amp.autocast_mode._exit_autocast(context)  # type: ignore[no-untyped-call]


@contextmanager
def without_new_symbols(mode: Any) -> Iterator[None]:
    """Let the block compute data-dependent sizes without new unbacked symbols; pending ones are dropped."""
    if mode.shape_env is None:
        yield
        return
    mode.shape_env.pending_fresh_unbacked_symbols.clear()
    with mode.shape_env.ignore_fresh_unbacked_symbols():
        yield


class FixedSize(Exception):
    """A computation of shapes read a size that varies as a number."""


@contextmanager
def without_fixed_sizes(mode: Any) -> Iterator[None]:
    """Raise `FixedSize` where the block reads a size that varies as a number; the symbols are as before it."""
    environment = mode.shape_env
    if environment is None:
        yield
        return
    set_replacement, ranges = environment._set_replacement, dict(environment.var_to_range)

    def replaced(symbol: Any, size: Any, reason: str) -> None:
        if size.is_number:
            raise FixedSize(str(symbol))
        set_replacement(symbol, size, reason)

    try:
        with patched_here(environment, "_set_replacement", replaced):
            yield
    except FixedSize:
        environment.var_to_range.clear()
        environment.var_to_range.update(ranges)
        raise


@contextmanager
def sizes_of_slices() -> Iterator[None]:
    """Let the size of a slice be a function of its input's, such as `min(4, length)`, not that of long inputs alone."""
    assumed = fake_impls._compute_slice_index

    def index_in(size: Any, index: Any) -> Any:
        if not isinstance(size, torch.SymInt) or not isinstance(index, int) or index in (-1, 0, 1):
            return assumed(size, index)
        return torch.sym_min(index, size) if index > 0 else torch.sym_max(size + index, 0)  # type: ignore[no-untyped-call]

    with patched_here(fake_impls, "_compute_slice_index", index_in):
        yield


def size_guards(graph: fx.Graph) -> list[tuple[str, str]]:
    """Return the conditions on sizes of inputs that an export recorded, with the files of the code that set them.

    A condition is Python's text, such as `L['x'].size()[1] <= 16`; one that an author set as a range has no file.
    """
    nodes = graph.find_nodes(op="placeholder")
    mode = detect_fake_mode([node.meta.get("val") for node in nodes])
    environment = None if mode is None else mode.shape_env
    if environment is None:
        return []
    names = {s: type(s)(of[0].name, integer=True, positive=True) for s, of in environment.var_to_sources.items()}
    found = []
    for guard in environment.guards:
        if guard.expr.free_symbols <= names.keys():
            place = guard.sloc.framework_loc
            found.append((PythonPrinter().doprint(guard.expr.xreplace(names)), getattr(place, "filename", "")))
    return found


def saved_guards(program: object) -> list[str]:
    """Return the guards of an exported program that was read from a file, whose symbols have lost their places."""
    graph = getattr(program, "graph", None)
    guards = list(getattr(program, "_guards_code", ()))
    return [] if graph is None or not guards or size_guards(graph) else guards


def size_range(size: Any) -> tuple[str, int | None, int | None]:
    """Return an axis' size as text over symbols, and its least and largest value in an export; None for no bound."""
    if not isinstance(size, torch.SymInt):
        return str(size), size, size
    expression = size.node.expr
    bounds = size.node.shape_env.bound_sympy(expression)
    least, most = (int(bound) if bound.is_Integer else None for bound in (bounds.lower, bounds.upper))
    return PythonPrinter().doprint(expression), least, most
