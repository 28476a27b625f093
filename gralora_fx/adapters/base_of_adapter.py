"""The base that an adapter was made for, compared with a traced model."""

from __future__ import annotations

from pathlib import Path

from gralora_fx.config import AdapterConfig
from gralora_fx.errors import CheckpointError
from gralora_fx.sources.same_base import BaseComparison, BaseSource, compare_bases
from gralora_fx.tracing.traced_model import TracedModel


def base_of(traced: TracedModel) -> BaseSource:
    """What is known of a traced model: the name that it was loaded by, and its configuration."""
    config = traced.config
    if config is None:
        return BaseSource(None)
    return BaseSource(traced.tokenizer_source, getattr(config, "_commit_hash", None), config.to_dict())


def settled_base(config: AdapterConfig, traced: TracedModel, directory: str | Path, *, strict: bool) -> BaseComparison:
    """Compare an adapter's base with a traced model, and warn or refuse where it is not known to be the same.

    Args:
        config: The adapter's configuration.
        traced: The model.
        directory: The adapter, for messages.
        strict: Whether to refuse.

    Raises:
        CheckpointError: It is not known to be the same base, and `strict` is set.
    """
    compared = compare_bases(BaseSource(config.base_model_name_or_path, config.revision), base_of(traced))
    compared.settle(directory, strict=strict, error=CheckpointError)
    return compared
