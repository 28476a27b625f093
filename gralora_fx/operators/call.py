"""Calls of this project's operators in a graph, their arguments by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from gralora_fx.compat.operators import OpOverload, schema_of
from gralora_fx.operators.namespace import operator_for


@dataclass(frozen=True)
class Call:
    """A call of an operator; each operator has a subclass, whose fields are its schema's arguments in their order.

    The first of them is a tensor.

    Only this knows which argument stands where: a pass reads `Attention.of(node).mask`, and changes a node by
    `replace(call, mask=padding).write(node)`.

    Attributes:
        target: The operator.
    """

    target: ClassVar[Any]

    @classmethod
    def compute(cls, **arguments: Any) -> Tensor:
        """What the operator gives, of tensors; of those without values, as a model's that is traced, the shape alone.

        Args:
            arguments: Every argument of its schema.
        """
        tensor = arguments[fields(cls)[0].name]
        result: Tensor = operator_for(cls.target, tensor)(**arguments)
        return result

    @classmethod
    def of(cls, node: object) -> Self | None:
        """The call that a node of a graph is; None of anything else."""
        if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not cls.target:
            return None
        return cls(**named_arguments(node))

    @classmethod
    def all_in(cls, graph: fx.Graph) -> Iterator[tuple[fx.Node, Self]]:
        """Every node of a graph that calls the operator, in the graph's order, with its call.

        The nodes are listed first, and each is read when its turn comes, so a pass may change the graph meanwhile.
        """
        for node in list(graph.find_nodes(op="call_function", target=cls.target)):
            yield node, cls(**named_arguments(node))

    @classmethod
    def position(cls, name: str) -> int:
        """Where an argument stands.

        Raises:
            ValueError: The operator has no such argument.
        """
        return [field.name for field in fields(cls)].index(name)

    def insert(self, graph: fx.Graph) -> fx.Node:
        """A new node that makes the call, at the graph's insertion point; it has no metadata yet."""
        return graph.call_function(self.target, self._values())

    def write(self, node: fx.Node) -> None:
        """Let a node make the call, in place of the one that it makes; its metadata stays."""
        node.target, node.args, node.kwargs = self.target, self._values(), {}

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of a node that calls an operator, by its name in the schema; the default where none is given.

    Args:
        node: A call of an operator of PyTorch or of this project.

    Raises:
        TypeError: It calls something else.
    """
    if not isinstance(node.target, OpOverload):
        raise TypeError(f"{node.name} calls {node.target}, which is not an operator; read its arguments by hand")
    arguments = schema_of(node.target).arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in arguments}
