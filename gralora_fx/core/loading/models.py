"""Loads base models by name, whole, streamed, without values or quantized; and the transformers class of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from gralora_fx.base.compat.transformers_models import has_class
from gralora_fx.base.progress.stages import quiet
from gralora_fx.base.sources.base_quantization import BaseQuantization, check_not_packed, packed_quantization
from gralora_fx.base.sources.model_directories import check_model_files, resolve_directory
from gralora_fx.base.sources.model_files import GENERATION_CONFIG, MODEL_FILE, read_json_object
from gralora_fx.base.sources.packed_tensors import PackedTensor
from gralora_fx.base.sources.safetensors_files import check_readable
from gralora_fx.base.sources.saved_weights import read_weights
from gralora_fx.base.sources.streamed_models import (
    as_in_layers,
    attach_shards,
    by_parameter_name,
    empty_model,
    note_forms,
)
from gralora_fx.core.loading.load_report import LoadReport
from gralora_fx.core.loading.quantized_layers import pack_layers, quantized_layers, record, round_layers
from gralora_fx.errors import ConfigError, GraloraError, TraceError, an, first_line, option, warn_caller
from gralora_fx.format.tasks import all_tasks, check_task, classifies, find_task, task_of_class


def class_for(config: PreTrainedConfig, task: str | None) -> Any:
    """Return the transformers class for a task, or the one that a configuration names."""
    check_task(task)
    if task is not None and _reads_encoder(task):
        return _encoder_class(config, task)
    if task is not None:
        return getattr(transformers, _auto_class(config, task.removesuffix("-with-past")))
    name = _saved_class(config)
    if name is None:
        return transformers.AutoModel
    if not hasattr(transformers, name):
        raise TraceError(f"the checkpoint is {an(name)}, which transformers does not have; give its task")
    return getattr(transformers, name)


def _auto_class(config: PreTrainedConfig, task: str) -> str:
    """Return the auto class of a task; a text decoder may be part of a model with other inputs, or stand alone."""
    known = find_task(task)
    assert known is not None  # checked before
    if known.cache != "decoder" or has_class(known.auto_class, config):
        return known.auto_class
    decoders = [other.auto_class for other in all_tasks() if other.cache == "decoder"]  # the first is of texts alone
    return next((name for name in decoders if has_class(name, config)), decoders[0])


def _reads_encoder(task: str | None) -> bool:
    """Return whether a task takes only an encoder's hidden states."""
    known = find_task(task)
    return known is not None and known.encoder_alone


def _encoder_class(config: PreTrainedConfig, task: str) -> Any:
    """Return the class of a bare model; for an encoder-decoder only the encoder, such as `T5EncoderModel`."""
    encoder = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    if encoder is not None and encoder.__name__.endswith("EncoderModel"):
        return encoder
    if config.is_encoder_decoder:
        raise TraceError(
            f"{config.model_type} is an encoder-decoder, whose encoder transformers does not load alone; "
            f"{task} is for encoders, decoders and T5"
        )
    return transformers.AutoModel


def warn_of_another_head(model: PreTrainedModel, origin: str | Path) -> None:
    """Warn if a head trained for one task is used for another, since both classes may have the same tensors."""
    saved = _saved_class(model.config)
    saved_task, requested = task_of_class(saved or ""), task_of_class(type(model).__name__)
    if saved_task != requested and classifies(saved_task) and classifies(requested):
        warn_caller(
            f"{origin} was saved as {saved}: its head was trained for {saved_task}, not for {requested}; take "
            f"{option(task=saved_task)}"
        )


def _saved_class(config: PreTrainedConfig) -> str | None:
    """Return the class that a configuration names, or None."""
    names = config.architectures
    if not names:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise TraceError(
            f"architectures in config.json is {names!r}, not a list of class names; repair or copy the file"
        )
    return names[0]


def load_model(
    name: str | Path,
    task: str | None = None,
    *,
    num_labels: int | None = None,
    supplied: Set[str] = frozenset(),
    allow_random_head: bool = False,
    base_quantization: BaseQuantization | Any = None,
    packed: bool = False,
) -> PreTrainedModel:
    """Load a transformers model in float32 and evaluation mode.

    The layers of a checkpoint that bitsandbytes saved quantized get the values that it multiplies by.

    Args:
        name: Local directory or hub id.
        task: One of optimum's task names; None for the class that the model's configuration names.
        num_labels: Number of classes of a classification head; None for the configuration's.
        supplied: Names of parameters that the checkpoint may lack, since an adapter supplies them.
        allow_random_head: Whether other parameters may be missing and get random values, as for a head still to be
            trained.
        base_quantization: How the layers of a float checkpoint are rounded, as bitsandbytes does when a QLoRA adapter
            is trained on it: `"nf4"`, `"nf4-double"`, `"int8"`, or whatever `BaseQuantization.of` takes; None for not
            at all.
        packed: Whether these layers, or those of a quantized checkpoint, keep their weights packed in memory, for a
            rewritten model to unpack when it runs. While the model is loaded, its floats are in memory.

    Raises:
        TraceError: The task is unknown, or no model can be loaded.
        CheckpointError: Tensors are missing in the checkpoint or have other shapes; each is named.
        ConfigError: The checkpoint is quantized already, and is to be rounded, or bitsandbytes is not installed.
    """
    model, report = load_with_report(
        name, task, num_labels=num_labels, base_quantization=base_quantization, packed=packed
    )
    report.check(supplied, num_labels, allow_random_head=allow_random_head)
    if not report.problems() and supplied.isdisjoint(model.state_dict()):
        warn_of_another_head(model, name)
    return model


def load_with_report(
    name: str | Path,
    task: str | None = None,
    *,
    num_labels: int | None = None,
    base_quantization: Any = None,
    packed: bool = False,
) -> tuple[PreTrainedModel, LoadReport]:
    """Load a model as `load_model` does, but with random values for missing tensors, and report on them."""
    directory = check_model_files(name, TraceError)
    asked = None if base_quantization is None else BaseQuantization.of(base_quantization)
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            stored = quantization_of(vars(config), name, asked)
            if stored is not None:
                return _unpacked(name, task, num_labels, stored, packed=packed)
            _check_packing(name, asked, packed=packed)
            model, info = class_for(config, task).from_pretrained(
                name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
    except GraloraError:
        raise
    except Exception as error:  # transformers, safetensors and pickle raise types of their own
        if directory is not None:
            check_readable(directory)
        hub = "; there is no such directory, so it was taken for a hub id" if directory is None else ""
        raise TraceError(f"no model can be loaded from {name} ({first_line(error)}){hub}") from error
    if asked is not None:
        if packed:
            pack_layers(model, quantized_layers(model, asked), asked)
        else:
            round_layers(model, asked)
    return _reported(name, task, model, info)


def _check_packing(name: str | Path, asked: BaseQuantization | None, *, packed: bool) -> None:
    """Check that a quantization is given for a float checkpoint that is to be packed."""
    if packed and asked is None:
        raise ConfigError(
            f"{name} has float weights, which must be rounded to be kept in few bits; take "
            f"{option(base_quantization='nf4')}"
        )


def _reported(
    name: str | Path, task: str | None, model: PreTrainedModel, info: Mapping[str, Any]
) -> tuple[PreTrainedModel, LoadReport]:
    report = LoadReport.of(str(name), model, info)
    return model.eval(), _without_unread(model, report) if _reads_encoder(task) else report


def _unpacked(
    name: str | Path, task: str | None, num_labels: int | None, told: BaseQuantization, *, packed: bool
) -> tuple[PreTrainedModel, LoadReport]:
    """Load a quantized checkpoint's model, with the values that its layers multiply by, and report on it."""
    directory = resolve_directory(name, TraceError)
    empty = make_empty(directory, task, num_labels=num_labels, dtype=torch.float32, name=name)
    weights = read_weights(directory)
    tensors = as_in_layers(empty, weights.tensors)
    model, info = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict={key: tensor() for key, tensor in tensors.items()},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model.config._name_or_path = model.name_or_path = str(name)
    if model.can_generate() and (directory / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    how = weights.quantization or told
    if packed:
        stored = by_parameter_name(model, tensors)
        layers = {name.removesuffix(".weight"): t for name, t in stored.items() if isinstance(t, PackedTensor)}
        pack_layers(model, {path: model.get_submodule(path) for path in layers}, how, stored)
    else:
        record(model, how)
    note_forms(model, tensors)
    return _reported(name, task, model, info)


def load_streamed(
    name: str | Path,
    task: str | None = None,
    *,
    num_labels: int | None = None,
    supplied: Set[str] = frozenset(),
    base_quantization: Any = None,
) -> PreTrainedModel:
    """Load the same model with its weights left in their files, as lazy parameters on the meta device.

    Once traced, it runs, is rewritten and exported, reading one tensor at a time.

    Args:
        name: Local directory or hub id, of safetensors files.
        task: One of optimum's task names; None for the class that the model's configuration names.
        num_labels: Number of classes of a classification head; None for the configuration's.
        supplied: Names of parameters that the files may lack, since an adapter supplies them.
        base_quantization: As in `load_model`; the weights are rounded as they are read.

    Raises:
        TraceError: The task is unknown, or no model can be made.
        CheckpointError: The files do not fit the model.
        ConfigError: As in `load_model`.
    """
    check_model_files(name, TraceError)
    asked = None if base_quantization is None else BaseQuantization.of(base_quantization)
    directory = resolve_directory(name, TraceError)
    packed = quantization_of(read_json_object(directory / MODEL_FILE, TraceError), name, asked)
    model = make_empty(directory, task, num_labels=num_labels, dtype=torch.float32, name=name)
    unread = _unread_names(model) if _reads_encoder(task) else set()
    weights = read_weights(directory)
    model = attach_shards(model, weights, supplied | unread)
    if asked is not None:
        round_layers(model, asked)
    elif packed is not None:
        record(model, weights.quantization or packed)
    return model


def make_empty(
    directory: Path,
    task: str | None,
    *,
    num_labels: int | None = None,
    dtype: torch.dtype | None = None,
    name: str | Path | None = None,
) -> PreTrainedModel:
    """Return a model of a directory's configuration without values: names and shapes, on the meta device."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
            vars(config).pop("quantization_config", None)  # its files are read as floats
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
    """Return names of a pooler's parameters, which no encoder-only task reads; a checkpoint may lack them."""
    return {name for name, _ in model.named_parameters() if name.startswith("pooler.")}


def _without_unread(model: PreTrainedModel, report: LoadReport) -> LoadReport:
    """Return a loading report without parameters that no encoder-only task reads; missing ones are set to zero."""
    unread = _unread_names(model) & report.missing.keys()
    with torch.no_grad():
        for name in unread:
            model.get_parameter(name).zero_()
    missing = {name: shape for name, shape in report.missing.items() if name not in unread}
    return dataclasses.replace(report, missing=missing)


def quantization_of(
    fields: Mapping[str, Any], name: str | Path, asked: BaseQuantization | None
) -> BaseQuantization | None:
    """Return how the weights in a checkpoint's files are quantized; None for floats."""
    if asked is not None:
        check_not_packed(fields, name, asked, TraceError)
    return packed_quantization(fields, name, TraceError)
