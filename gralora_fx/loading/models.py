"""Base models by name, whole, streamed from their files or without values."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from gralora_fx.errors import GraloraError, TraceError, first_line
from gralora_fx.loading.load_report import LoadReport
from gralora_fx.loading.model_classes import class_for, warn_of_another_head
from gralora_fx.progress.stages import quiet
from gralora_fx.sources.model_files import check_model_files, resolve_directory
from gralora_fx.sources.safetensors_files import check_readable
from gralora_fx.sources.streamed_models import attach_shards, empty_model
from gralora_fx.tracing.sentence_encoder import SENTENCE_TASK


def load_model(
    name: str | Path,
    task: str | None = None,
    *,
    num_labels: int | None = None,
    supplied: Set[str] = frozenset(),
    allow_random_head: bool = False,
) -> PreTrainedModel:
    """A transformers model in float32 and evaluation mode.

    Args:
        name: Local directory or hub id.
        task: One of optimum's task names; None for the class that the model's configuration names.
        num_labels: Number of classes of a classification head; None for the configuration's.
        supplied: Names of parameters that the checkpoint may lack, since an adapter supplies them.
        allow_random_head: Whether other parameters may be missing and get random values, as for a head still to be
            trained.

    Raises:
        TraceError: The task is unknown, or no model can be loaded.
        CheckpointError: Tensors are missing in the checkpoint or have other shapes; each is named.
    """
    model, report = load_with_report(name, task, num_labels=num_labels)
    report.check(supplied, num_labels, allow_random_head=allow_random_head)
    if not report.problems() and supplied.isdisjoint(model.state_dict()):
        warn_of_another_head(model, name)
    return model


def load_with_report(
    name: str | Path, task: str | None = None, *, num_labels: int | None = None
) -> tuple[PreTrainedModel, LoadReport]:
    """The model as `load_model` returns it, but with random values where tensors are missing, and the report on them.

    Raises:
        TraceError: The task is unknown, or no model can be loaded.
        CheckpointError: A file of its weights is damaged.
    """
    directory = check_model_files(name, TraceError)
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            model, info = class_for(config, task).from_pretrained(
                name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
    except GraloraError:
        raise
    except Exception as error:  # transformers, safetensors and pickle raise types of their own
        if directory is not None:
            check_readable(directory)
        raise TraceError(f"no model can be loaded from {name} ({first_line(error)})") from error
    report = LoadReport.of(str(name), model, info)
    return model.eval(), _without_unread(model, report) if task == SENTENCE_TASK else report


def load_streamed(
    name: str | Path, task: str | None = None, *, num_labels: int | None = None, supplied: Set[str] = frozenset()
) -> PreTrainedModel:
    """The same model with its weights left in their files: lazy parameters on the meta device.

    It can be traced, rewritten and exported (reading one tensor at a time), but not run.

    Args:
        name: Local directory or hub id, of safetensors files.
        task: One of optimum's task names; None for the class that the model's configuration names.
        num_labels: Number of classes of a classification head; None for the configuration's.
        supplied: Names of parameters that the files may lack, since an adapter supplies them.

    Raises:
        TraceError: The task is unknown, or no model can be made.
        CheckpointError: The files do not fit the model.
    """
    check_model_files(name, TraceError)
    directory = resolve_directory(name, TraceError)
    model = make_empty(directory, task, num_labels=num_labels, dtype=torch.float32, name=name)
    unread = _unread_names(model) if task == SENTENCE_TASK else set()
    return attach_shards(model, directory, supplied | unread)


def make_empty(
    directory: Path,
    task: str | None,
    *,
    num_labels: int | None = None,
    dtype: torch.dtype | None = None,
    name: str | Path | None = None,
) -> PreTrainedModel:
    """A model of a directory's configuration without values: names and shapes, on the meta device.

    Args:
        directory: The model's directory.
        task: One of optimum's task names; None for the class that the configuration names.
        num_labels: Number of classes of a head; None for the configuration's.
        dtype: Of the parameters; None for the configuration's.
        name: What to call the model in messages; None for its directory.

    Raises:
        TraceError: The configuration names no class that transformers has, or it cannot be made.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
            if dtype is not None:
                config.dtype = dtype
            if num_labels is not None and num_labels != config.num_labels:
                config.num_labels = num_labels
            model_class = class_for(config, task)
            make = model_class.from_config if hasattr(model_class, "from_config") else model_class
            return empty_model(lambda: make(config))
    except GraloraError:
        raise
    except Exception as error:  # transformers raises types of its own
        raise TraceError(f"no model can be made of {name or directory} ({first_line(error)})") from error


def _unread_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of a pooler, which a sentence encoder does not read; a checkpoint may lack them."""
    return {name for name, _ in model.named_parameters() if name.startswith("pooler.")}


def _without_unread(model: PreTrainedModel, report: LoadReport) -> LoadReport:
    """A loading report without the parameters that a sentence encoder does not read; those missing become zero."""
    unread = _unread_names(model) & report.missing.keys()
    with torch.no_grad():
        for name in unread:
            model.get_parameter(name).zero_()
    missing = {name: shape for name, shape in report.missing.items() if name not in unread}
    return dataclasses.replace(report, missing=missing)
