"""The loop that trains the demonstration's models and their adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from gralora_fx.base.progress.console import with_progress
from gralora_fx.base.progress.stages import counting

_WEIGHT_DECAY = 0.01
_WINDOW = 10  # steps whose mean loss is shown


@with_progress
def fit(
    parameters: Iterable[torch.nn.Parameter],
    batches: Iterable[Any],
    loss_of: Callable[[Any], Tensor],
    *,
    steps: int,
    rate: float,
) -> list[float]:
    """Train by AdamW, its rate rising for a tenth of the steps, then falling to zero; show steps, loss, time left."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    losses: list[float] = []
    with counting("train", steps, "") as count:
        for batch in batches:
            loss = loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            count(len(losses), f"loss {fmean(losses[-_WINDOW:]):.2f}")
    return losses
