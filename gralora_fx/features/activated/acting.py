"""The tokens from a row's last invocation on, as a node of a graph and for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from gralora_fx.base.compat.torch_graphs import is_transformed
from gralora_fx.base.sources import ACTING
from gralora_fx.errors import listed, shown, warn_caller
from gralora_fx.format.input_names import IDS

if TYPE_CHECKING:
    from gralora_fx.core.tracing.traced_model import TracedModel

_OUTSIDE = ("torch", "transformers", "peft", "accelerate", "None")  # warnings name the line that called these


def invoked_tokens(ids: Tensor, invocation: Sequence[int], starts: Tensor | None = None) -> Tensor:
    """Return whether an activated adapter is active at each token: from the row's last invocation on, as PEFT's aLoRA.

    Padding is not distinguished from tokens, as in PEFT. Rows without the invocation use the base, with a warning.

    Args:
        ids: `[batch, tokens]`.
        invocation: The ids of the invocation's tokens.
        starts: `[batch]`, the first active token of each row, which may lie before or after these tokens; None to find
            it.

    Returns:
        `[batch, tokens]` bool.
    """
    if starts is None:
        starts = first_columns(ids, invocation)
        warn_of_rows_without(ids, invocation, starts)
    return torch.arange(ids.shape[1], device=ids.device) >= starts.unsqueeze(1)


def first_columns(ids: Tensor, invocation: Sequence[int]) -> Tensor:
    """Return where the last invocation of each row begins, `[batch]`; the number of tokens if there is none.

    Args:
        ids: `[batch, tokens]`.
        invocation: The ids of the invocation's tokens.
    """
    length = ids.shape[1]
    padded = torch.nn.functional.pad(ids, (0, len(invocation) - 1), value=-1)
    is_start = padded[:, :length] == invocation[0]
    for offset, token in enumerate(invocation[1:], 1):
        is_start = is_start & (padded[:, offset : offset + length] == token)
    places = torch.arange(1, length + 1, device=ids.device)
    last = torch.where(is_start, places, 0).amax(1)
    return torch.where(last > 0, last - 1, length)


def start_in_prompt(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Return where the last invocation in a prompt begins; None if there is none."""
    wanted, length = list(invocation), len(invocation)
    starts = range(len(tokens) - length, -1, -1)
    return next((at for at in starts if tokens[at] == wanted[0] and list(tokens[at : at + length]) == wanted), None)


def warn_of_rows_without(ids: Tensor, invocation: Sequence[int], starts: Tensor) -> None:
    """Warn of rows in which an adapter is never active; not while a graph is compiled or transformed."""
    if torch.compiler.is_compiling() or is_transformed() or ids.is_meta:
        return
    rows = (starts == ids.shape[1]).nonzero()[:, 0].tolist()
    if rows:
        warn_caller(
            f"rows {listed(rows, 5)} lack the tokens {shown(list(invocation))} ({ACTING}) that activate the "
            "adapter, so the base runs there. After a cache give adapter_starts, as generate does",
            also=_OUTSIDE,
        )


def insert_mask(graph: fx.Graph, ids: fx.Node, invocation: Sequence[int]) -> fx.Node:
    """Insert the node of `invoked_tokens`."""
    return graph.call_function(invoked_tokens, (ids, tuple(invocation)))


def masks(graph: fx.Graph) -> list[fx.Node]:
    """Return the mask nodes of a graph, in the order in which they were inserted."""
    return list(graph.find_nodes(op="call_function", target=invoked_tokens))


def problems(invocation: Sequence[int], traced: TracedModel) -> list[str]:
    """Return why an adapter cannot be invoked in a model."""
    if not traced.can_generate() or getattr(traced.config, "is_encoder_decoder", False):
        return [f"{ACTING} is for causal language models, as in PEFT, and the model is none; leave it out"]
    if IDS not in traced.input_names:
        return [f"{ACTING} is found in input_ids, which the trace does not take; trace the model with them"]
    path = traced.tree.input_embedding
    table = None if path is None else traced.tree.parameters.get(f"{path}.weight")
    outside = [] if table is None else [token for token in invocation if token >= table.shape[0]]
    if table is not None and outside:
        return [
            f"{ACTING} has {listed(outside)}, outside the model's vocabulary of {table.shape[0]} tokens; give the ids "
            "that the model's tokenizer has for the invocation's text"
        ]
    return []
