"""The base class of the project's operators: one class per operator, whose fields are the arguments of a call.

Schema, reference, shape rule, calls in a graph and nodes of an ONNX model are derived from it. An argument is a tensor
of a model, a node of its graph, or a value of an ONNX model.

While a model is traced only shapes matter, and computing them by running operators on fake tensors takes most of the
time. So a traced model calls operators of the namespace `gralora_shapes`, which only return a tensor of the right
shape; `restore_aten` replaces them by the real operators in the finished graph. Only the tensors decide which one is
called: tensors that have values are computed as usual, during a trace too, in this thread or another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, dataclass_transform, get_type_hints

import torch
from torch import Tensor, fx

from gralora_fx.base.compat.torch_graphs import FakeTensor, OpOverload, schema_of
from gralora_fx.core.operators import CONTRACTIONS, DROPOUTS, NAMESPACE, STANDS_FOR, TRAIN_FLAGS

_SHAPES = "gralora_shapes"

if TYPE_CHECKING:  # Python 3.11's has no default
    from typing_extensions import TypeVar as TypeVarWithDefault

    V = TypeVarWithDefault("V", default=fx.Node)
else:
    V = TypeVar("V")  # a node of a graph, a tensor of a model, or a value of an ONNX model
_TYPES: dict[Any, str] = {  # types of arguments as PyTorch's schemas write them
    V: "Tensor",
    V | None: "Tensor?",
    V | int: "SymInt",
    bool: "bool",
    float: "float",
    int: "int",
    str: "str",
    Sequence[int]: "int[]",
    torch.dtype: "ScalarType",
}

_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_shapes: Any = torch.library.Library(_SHAPES, "DEF")  # type: ignore[no-untyped-call]
_shape_only: dict[Any, Any] = {}  # shape-only counterparts by their real operators


class Call(Generic[V]):
    """A call of an operator; each operator has a subclass, made by `operator`. Its first argument is a tensor.

    A pass reads `Attention.of(node).mask`, and changes a node by `replace(call, mask=padding).write(node)`. An operator
    that a model calls while it is traced may have `shape_only`, which returns a tensor like the result, without values.
    """

    target: ClassVar[Any]  # the operator, as the target of a graph's node
    # names of the arguments that are tensors or sizes, and so nodes of a graph; they come first
    tensors: ClassVar[tuple[str, ...]]
    results: ClassVar[int]  # number of tensors that the operator returns: two with a state, which is the second

    def result(self: Call[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the operator with PyTorch's own operators; the annotation says how many tensors it returns."""
        raise NotImplementedError

    @classmethod
    def compute(cls, **arguments: Any) -> Tensor:
        """Run the operator; on tensors without values, as in a trace, return the shape alone."""
        result: Tensor = cls._called(arguments)
        return result

    @classmethod
    def compute_with_state(cls, **arguments: Any) -> tuple[Tensor, Tensor]:
        """Run an operator with a state as `compute` does; return the result and the next state."""
        result, state = cls._called(arguments)
        return result, state

    @classmethod
    def _called(cls, arguments: dict[str, Any]) -> Any:
        return operator_for(cls.target, arguments[cls.names()[0]])(**arguments)

    @classmethod
    def of(cls, node: object) -> Self | None:
        """Return the call that a graph's node makes; None for anything else."""
        if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not cls.target:
            return None
        return cls(*node.args, **node.kwargs)

    @classmethod
    def all_in(cls, graph: Any) -> Iterator[tuple[Any, Self]]:
        """Yield the nodes that call the operator, in order, with their calls; the graph may change meanwhile."""
        for node in list(graph.find_nodes(op="call_function", target=cls.target)):
            yield node, cls(*node.args, **node.kwargs)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the arguments, in their order."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]  # `operator` makes it a dataclass

    @classmethod
    def position(cls, name: str) -> int:
        """Return the position of an argument by name."""
        return cls.names().index(name)

    def insert(self, graph: fx.Graph) -> fx.Node:
        """Insert a node with the call at the graph's insertion point, and return it; it has no metadata yet."""
        return graph.call_function(self.target, self._values())

    def write(self, node: fx.Node) -> None:
        """Replace the call that a node makes; its metadata is kept."""
        node.target, node.args, node.kwargs = self.target, self._values(), {}

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.names())


C = TypeVar("C", bound=Call[Any])


@dataclass_transform(frozen_default=True)
def operator(
    name: str,
    *,
    tags: tuple[torch.Tag, ...] = (),
    train: str | None = None,
    dropout: str | None = None,
    contracts: bool = False,
) -> Callable[[type[C]], type[C]]:
    """Make a class of calls a frozen dataclass, and define its operator in the namespace `gralora`.

    PyTorch derives gradients, shapes on fake tensors and decomposition from the class's `result`. `contracts` marks an
    operator that multiplies and sums, by weights or between activations: it runs in a model's own precision.
    """

    def define(kind: type[C]) -> type[C]:
        call: Any = dataclass(frozen=True)(kind)
        hints = get_type_hints(kind)
        call.results = 2 if str(call.result.__annotations__["return"]).startswith("tuple") else 1
        gives = "Tensor" if call.results == 1 else "(Tensor, Tensor)"
        schema = f"{name}({', '.join(f'{_TYPES[hints[field]]} {field}' for field in call.names())}) -> {gives}"
        _library.define(schema, tags=tags)
        _library.impl(name, lambda *args, **named: call(*args, **named).result(), "CompositeImplicitAutograd")
        call.target = getattr(getattr(torch.ops, NAMESPACE), name).default
        if train is not None:
            TRAIN_FLAGS[call.target] = call.position(train)
        if dropout is not None:
            DROPOUTS[call.target] = call.position(dropout)
        if contracts:
            CONTRACTIONS.add(call.target)
        call.tensors = tuple(field for field in call.names() if hints[field] in (V, V | None, V | int))
        if hasattr(kind, "shape_only"):
            define_shape_only(schema, lambda *args, **named: call(*args, **named).shape_only(), call.target)
        return kind

    return define


def define_shape_only(schema: str, rule: Callable[..., Any], target: Any) -> Any:
    """Define the shape-only counterpart of an operator, of this project or of PyTorch."""
    _shapes.define(schema)
    name = schema.partition("(")[0]
    _shapes.impl(name, rule, "CompositeImplicitAutograd")
    shape_only = getattr(getattr(torch.ops, _SHAPES), name).default
    STANDS_FOR[shape_only] = target
    _shape_only[target] = shape_only
    return shape_only


def is_shape_only(tensor: object) -> bool:
    """Return whether a tensor is fake, as in a model that is being traced."""
    return isinstance(tensor, FakeTensor)


def operator_for(target: Any, tensor: Tensor) -> Any:
    """Return the operator to call with a tensor: its shape-only counterpart if the tensor has no values."""
    return _shape_only.get(target, target) if is_shape_only(tensor) else target


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return every argument of an operator's node by its name in the schema, with defaults."""
    if not isinstance(node.target, OpOverload):
        raise TypeError(f"{node.name} calls {node.target}, which is not an operator; read its arguments by hand")
    arguments = schema_of(node.target).arguments
    passed = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    return {argument.name: passed.get(argument.name, argument.default_value) for argument in arguments}
