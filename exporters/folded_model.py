"""The adapter-free graph that an export is made from."""

from __future__ import annotations

from gralora_fx.errors import ExportError
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.model.merge import merge_lazily
from gralora_fx.tracing.traced_model import CALL_TRACE, TracedModel


def fold_adapters(model: TracedModel | GraloraModel) -> TracedModel:
    """The adapter-free model: the traced model itself, or a rewritten one with its active adapters folded lazily.

    Raises:
        ExportError: The model is neither.
        MergeError: An adapter cannot be folded.
    """
    if isinstance(model, TracedModel):
        return model
    if not isinstance(model, GraloraModel):
        raise ExportError(
            f"cannot export a {type(model).__name__}; {CALL_TRACE} and give what it or rewrite() returned"
        )
    return merge_lazily(model) if model.active_adapters else model.traced


def base_trace(model: TracedModel | GraloraModel) -> TracedModel:
    """The trace of the base model, without adapters."""
    return model.traced if isinstance(model, GraloraModel) else model
