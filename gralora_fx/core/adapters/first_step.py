"""A warning at an optimizer's first step that names the sites where an adapter got no gradient, and will not train."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.planning.rewrite_plan import PlannedSite
from gralora_fx.errors import listed, warn_caller

_MOST = 4  # sites named in a message


class HasAdapters(Protocol):
    """An owner of adapters by name; the mapping may change between calls."""

    adapters: dict[str, ModelAdapter]


_Owner = TypeVar("_Owner", bound=HasAdapters)


def check_first_step(optimizer: Optimizer, untrained: MutableMapping[_Owner, set[str]]) -> None:
    """Warn of `untrained` adapters that lack gradients at an optimizer's first step, and remove them from the set."""
    if all(group.get("lr") == 0 for group in optimizer.param_groups):  # torch allocates optimizer state so
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for owner, names in list(untrained.items()):
        for name in list(names):
            adapter = owner.adapters.get(name)
            is_first = adapter is not None and any(id(parameter) in trained for parameter in adapter.parameters())
            if adapter is None or is_first:
                names.discard(name)
            if adapter is not None and is_first:
                _warn_of_idle(adapter)
        if not names:
            untrained.pop(owner, None)


def _warn_of_idle(adapter: ModelAdapter) -> None:
    unreached, idle = [], []
    for planned in adapter.plan.selected:
        gradients = adapter.gradients(planned.site.path)
        if all(gradient is None for gradient in gradients.values()):
            unreached.append(planned.site.path)
        elif (matrices := list(_idle_matrices(adapter, planned, gradients))) and len(matrices) < (planned.stack or 1):
            idle.append(f"{planned.site.path} (matrices {listed(matrices, _MOST)} of {planned.stack})")
        elif matrices:
            idle.append(planned.site.path)
    text = f"in the first step, adapter {adapter.name!r} got no gradient at"
    if unreached:
        warn_caller(
            f"{text} {listed(unreached, _MOST)}: the loss does not depend on it (a layer that the traced forward does "
            "not call, code under no_grad, a detached tensor), so it does not train there; leave these out of the "
            "configuration",
            also=("torch",),
        )
    if idle:
        warn_caller(
            f"{text} {listed(idle, _MOST)}: it is zero there. A matrix of an MoE layer gets none while no token of a "
            "batch is routed to it; elsewhere the layer's output is multiplied by zero, or gradients are too small for "
            "half precision",
            also=("torch",),
        )


def _idle_matrices(adapter: ModelAdapter, planned: PlannedSite, gradients: dict[str, Tensor | None]) -> Iterator[int]:
    """Yield the indices in a site's stack of matrices whose gradients are all zero; 0 for a single such matrix."""
    count = planned.stack or 1
    present = {field: torch.zeros(()) if tensor is None else tensor for field, tensor in gradients.items()}
    if planned.stack is not None and all(tensor is not None for tensor in gradients.values()):
        stacked = adapter.method.of_stack(adapter.method.tensors(**present), count)
        tensors = [tensor.reshape(count, -1) for tensor in stacked if tensor is not None]
    else:
        tensors, count = [tensor.reshape(1, -1) for tensor in present.values()], 1
    acts = torch.stack([tensor.bool().any(dim=1).cpu() for tensor in tensors]).any(dim=0)
    yield from (index for index in range(count) if not acts[index])
