"""A callback for transformers' Trainer that stops a run before a step that would corrupt the weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from gralora_fx.errors import CheckpointError


class StopAtNonFinite(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Stops before an optimizer step whose gradients are not finite, as after a NaN loss.

    The error names the step, the first such parameter, and the last checkpoint, whose tensors are finite. With
    `fp16=True` Trainer skips such steps by itself, and nothing is stopped.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        """Check the gradients of a step.

        Args:
            args: The run's arguments.
            state: The run's state.
            control: The run's control.
            model: The model.

        Raises:
            CheckpointError: A gradient is not finite; no parameter has changed in this step.
        """
        if args.fp16:
            return
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if all_finite(gradients.values()):
            return
        first = next(name for name, gradient in gradients.items() if not all_finite([gradient]))
        last = get_last_checkpoint(args.output_dir)
        kept = f"resume from {last}" if last else "there is no checkpoint yet"
        raise CheckpointError(
            f"step {state.global_step + 1}: the gradient of {first} is not finite, as after a NaN loss; the "
            f"parameters are still those of step {state.global_step}. Lower the learning rate or look at the batch; "
            f"{kept}"
        )


def all_finite(tensors: Any) -> bool:
    """Return whether all values of tensors are finite, with one device synchronisation."""
    sums = [tensor.detach().float().abs().sum() for tensor in tensors]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())
