"""Sentence encoders among base models: where their modules are described, and what their tokenizers add."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase, Sequence
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gralora_fx.errors import CheckpointError, TraceError
from gralora_fx.loading.load_report import LoadReport
from gralora_fx.sources.sentence_modules import SentenceModules, find_sentence_directory
from gralora_fx.tracing.sentence_encoder import SENTENCE_TASK

_BARE = (None, "feature-extraction")  # what a task is where only the transformer is known


def sentence_source(task: str | None, names: Iterable[str | None], *, is_asked: bool) -> tuple[str | None, Path | None]:
    """The task, and the directory whose `modules.json` says what follows the transformer.

    A transformer that no task was asked for is a sentence encoder where such a directory is found, as for optimum.

    Args:
        task: The requested task, that of an adapter, or None.
        names: Directories or hub ids to look at, in this order: that of an adapter, which sentence-transformers saves
            with its own `modules.json`, and that of the base.
        is_asked: Whether the task was requested.

    Raises:
        TraceError: A file of such a directory is damaged.
    """
    if task != SENTENCE_TASK and (is_asked or task not in _BARE):
        return task, None
    found = (find_sentence_directory(name, TraceError) for name in names if name is not None)
    directory = next((path for path in found if path is not None), None)
    return (task, None) if directory is None else (SENTENCE_TASK, directory)


def unread_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of a pooler, which a sentence encoder does not read; a checkpoint may lack them."""
    return {name for name, _ in model.named_parameters() if name.startswith("pooler.")}


def without_unread(model: PreTrainedModel, report: LoadReport) -> LoadReport:
    """A loading report without the parameters that a sentence encoder does not read; those missing become zero."""
    unread = unread_names(model) & report.missing.keys()
    with torch.no_grad():
        for name in unread:
            model.get_parameter(name).zero_()
    missing = {name: shape for name, shape in report.missing.items() if name not in unread}
    return dataclasses.replace(report, missing=missing)


def with_sentence_settings(
    tokenizer: PreTrainedTokenizerBase, modules: SentenceModules, config: PreTrainedConfig | None
) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that truncates and lowercases as sentence-transformers does.

    Args:
        tokenizer: The tokenizer.
        modules: What the sentence encoder's directory says.
        config: The transformer's configuration, whose positions limit a text if the directory names no length.

    Raises:
        CheckpointError: Texts are to be lowercased, but the tokenizer has no Rust implementation to set that in.
    """
    changed: PreTrainedTokenizerBase = copy.deepcopy(tokenizer)
    positions = getattr(config, "max_position_embeddings", None)
    if modules.max_seq_length is not None:
        changed.model_max_length = modules.max_seq_length
    elif isinstance(positions, int) and positions > 0:
        changed.model_max_length = min(changed.model_max_length, positions)
    if modules.lowercases:
        backend = getattr(changed, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise CheckpointError(
                f"{modules.source} has do_lower_case, which {type(tokenizer).__name__} cannot be told; export without "
                "the tokenizer, and lowercase texts yourself"
            )
        if backend.normalizer is None or "Lowercase(" not in repr(backend.normalizer):
            parts = [Lowercase()] if backend.normalizer is None else [Lowercase(), backend.normalizer]
            backend.normalizer = Sequence(parts)
    return changed
