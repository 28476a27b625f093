"""The tokens on which an adapter acts: in the graph, its layers read zeros at all other tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx

from gralora_fx.base.features import parts
from gralora_fx.base.sources import ACTING
from gralora_fx.core.graph.surgery import add_tuple_input, annotate
from gralora_fx.core.methods.low_rank import at_tokens, take_rows
from gralora_fx.errors import RewriteError, shown
from gralora_fx.format.input_names import IDS, STARTS

if TYPE_CHECKING:
    from gralora_fx.core.config import AdapterConfig
    from gralora_fx.core.methods.low_rank import Rows

NEVER = 2**31  # a column that no row has


class ActingTokens:
    """The nodes that say on which tokens an adapter acts.

    Attributes:
        mask: `[batch, tokens]`, the node of the mask: true at tokens on which the adapter acts.
        ids: The placeholder of the token ids.
    """

    def __init__(self, mask: fx.Node, ids: fx.Node) -> None:
        self.mask, self.ids = mask, ids
        self._made: dict[fx.Node, fx.Node] = {}

    def read(self, x: fx.Node, path: str, adapter: str) -> fx.Node:
        """Return the node of a layer's input with zeros at other tokens; layers that read one value share it."""
        if x not in self._made:
            self.check(x, path)
            graph = x.graph
            with graph.inserting_after(self.mask if x.op == "placeholder" else x):
                made = self._made[x] = graph.call_function(at_tokens, (x, self.mask))
            annotate(made, site=path, adapter=adapter, call=x.name)
            if "nn_module_stack" in x.meta:
                made.meta["nn_module_stack"] = x.meta["nn_module_stack"]
        return self._made[x]

    def check(self, x: fx.Node, path: str) -> None:
        """Raise unless a layer's input has one vector per token, as far as the graph records shapes."""
        lead, tokens = shape_of(x)[:-1], shape_of(self.ids)
        if lead and tokens and not _is_same(lead, tokens):
            raise RewriteError(
                f"{path} does not read one vector of each token, so that an adapter cannot act on some tokens there; "
                "leave the layer out of the adapter (exclude_modules)"
            )


class Inserting(Protocol):
    """Inserts the mask of the tokens on which an adapter acts into a graph."""

    def __call__(self, graph: fx.Graph, rows: fx.Node | None = None) -> ActingTokens:
        """Insert the mask, for the whole batch or for some rows."""
        ...


def acting_of(config: AdapterConfig) -> Inserting | None:
    """Return the function that inserts an adapter's mask into a graph; None if it acts on all tokens."""
    if not config.acts_from:
        return None

    def insert(graph: fx.Graph, rows: fx.Node | None = None) -> ActingTokens:
        ids = next(node for node in graph.find_nodes(op="placeholder") if node.target == IDS)
        last = [*graph.find_nodes(op="placeholder"), *_part().masks(graph)][-1]  # masks are in the order of adapters
        with graph.inserting_after(last):
            own = ids if rows is None else graph.call_function(take_rows, (ids, rows))
        with graph.inserting_after(last if rows is None else own):
            return ActingTokens(_part().insert_mask(graph, own, config.acts_from), ids)

    return insert


def starts_in(ids: Tensor, acting: Mapping[str, tuple[int, ...]], rows: Mapping[str, Rows] | None) -> dict[str, Tensor]:
    """Return the column of each prompt `[batch, tokens]` from which each adapter acts; the number of tokens if never.

    `acting` has the tokens at which an adapter starts; given its `rows`, those where it never acts get a warning.
    """
    part, found = _part(), {}
    for name, tokens in acting.items():
        starts = found[name] = part.first_columns(ids, tokens)
        starts = torch.where(starts < ids.shape[1], starts, NEVER)
        own = slice(None) if rows is None else rows[name]
        part.warn_of_rows_without(ids[own], tokens, found[name][own])
        found[name] = starts
    return found


def given_starts(
    starts: object, acting: Iterable[str], rows: Mapping[str, Rows] | None, batch: int, past: int
) -> tuple[Tensor, ...]:
    """Check the starts given to a call: integers `[batch]`, or such a tensor for each adapter by name.

    Return one tensor per adapter, in the order of the masks, relative to the end of the `past` cached columns.
    """
    by_name: dict[str, Tensor] = {}
    for name in acting:
        given = starts.get(name) if isinstance(starts, Mapping) else starts
        if not isinstance(given, Tensor) or tuple(given.shape) != (batch,) or given.is_floating_point():
            raise RewriteError(
                f"{STARTS} is a column for each of the {batch} rows, from which on adapter {name!r} acts, but got "
                f"{shown(given)}; give an integer tensor, or one for each adapter by name"
            )
        by_name[name] = given if rows is None else given[rows[name]]
    return tuple(given - past for given in by_name.values())


def take_starts(graph: fx.Graph) -> None:
    """Replace the search for start tokens in the ids by a graph input with each row's start column (`STARTS`)."""
    masks: list[fx.Node] = _part().masks(graph)
    for mask, start in zip(masks, add_tuple_input(graph, STARTS, len(masks)), strict=True):
        mask.update_kwarg("starts", start)


def check_not_packed(graph: fx.Graph) -> None:
    """Raise if an adapter that acts on some tokens only would run on rows that hold several texts."""
    if any(node.target is at_tokens for node in graph.nodes):
        raise RewriteError(
            f"an adapter that acts from its invocation tokens on ({ACTING}) needs one text per row, and packing or "
            "padding_free puts several into one; turn them off"
        )


def _part() -> Any:
    found = parts("acting tokens")
    if not found:
        raise RewriteError(
            f"the adapter acts from certain tokens on ({ACTING}), and the feature that finds them is not installed"
        )
    return found[0]


def shape_of(node: fx.Node) -> Sequence[Any]:
    """Return the shape of a node's tensor; empty if it has none."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


def _is_same(lead: Sequence[Any], tokens: Sequence[Any]) -> bool:
    """Return whether there are as many vectors as tokens, comparing the symbolic sizes."""
    sizes = [
        math.prod(size.node.expr if isinstance(size, torch.SymInt) else size for size in s) for s in (lead, tokens)
    ]
    return bool(sizes[0] - sizes[1] == 0)
