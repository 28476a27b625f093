"""LoRA+ (https://arxiv.org/abs/2402.12354): a higher learning rate for `B` than for `A`."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.errors import ConfigError

__all__ = ["create_loraplus_optimizer"]


def create_loraplus_optimizer(
    model: GraloraModel,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """Create an optimizer of the trainable parameters in which `B` and vectors learn faster than `A`.

    Args:
        model: The rewritten model.
        optimizer_cls: The optimizer's class.
        lr: Learning rate of everything but `B` and vectors.
        loraplus_lr_ratio: Factor of the learning rate of `B` and vectors.
        loraplus_weight_decay: Weight decay; biases have none.
        **kwargs: Other arguments of the optimizer.

    Raises:
        ConfigError: No parameter requires gradients, or `loraplus_lr_embedding` is given, since embeddings have no
            adapters here.
    """
    if "loraplus_lr_embedding" in kwargs:
        raise ConfigError("loraplus_lr_embedding is for adapters of embeddings, which are not supported; leave it out")
    groups: dict[str, list[Any]] = {"A": [], "B": [], "biases": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_fast = "lora_B" in name or parameter.ndim == 1
            kind = ("biases" if "bias" in name else "B") if is_fast else "A"
            groups[kind].append(parameter)
    if not any(groups.values()):
        raise ConfigError("no parameter of the model requires gradients; call set_adapter with the adapter to train")
    fast = lr * loraplus_lr_ratio
    settings = {"A": (lr, loraplus_weight_decay), "B": (fast, loraplus_weight_decay), "biases": (fast, 0.0)}
    return optimizer_cls(
        [
            {"params": groups[kind], "lr": rate, "weight_decay": decay}
            for kind, (rate, decay) in settings.items()
            if groups[kind]
        ],
        **{"lr": lr, **kwargs},
    )
