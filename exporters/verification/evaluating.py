"""Models in evaluation mode while they are compared with an export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.tracing.traced_model import TracedModel


@contextmanager
def evaluating(model: TracedModel | GraloraModel, reference: TracedModel | GraloraModel) -> Iterator[None]:
    """The reference in evaluation mode; afterwards it is in the model's again."""
    was_training = model.training
    reference.eval()
    try:
        yield
    finally:
        reference.train(was_training)
