"""What a command reads and where it writes, looked at before anything slow is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from gralora_fx.config.adapter_config import config_fields
from gralora_fx.config.tasks import ENCODER_DECODERS, check_adapter_task, requested_task
from gralora_fx.errors import ConfigError, ExportError, TraceError
from gralora_fx.exporters.artifact.staging import (
    check_base_replaced,
    check_file,
    check_folder,
    check_output,
    check_replaced,
)
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.loading.adapter_facts import base_name
from gralora_fx.methods import method_described
from gralora_fx.sources.model_files import check_model_files, local_directory, read_json_object
from gralora_fx.sources.same_base import BaseSource
from gralora_fx.tracing.inputs.image_sizes import ImageSize

_IMAGES = "image-classification"


def check_request(
    options: ExportOptions,
    output: Path,
    *,
    model: str | None,
    adapter: str | None,
    adapter_name: str | None,
    task: str | None,
    image_size: ImageSize,
) -> str:
    """Check what is exported and where it is written, as far as their files tell.

    Args:
        options: The options of the export.
        output: The export directory.
        model: Local directory or hub id of the base, or None.
        adapter: PEFT-format adapter, or None.
        adapter_name: Its name in the export, or None.
        task: Task, or None.
        image_size: The size of images, or None.

    Returns:
        The name of the base.

    Raises:
        GraloraError: Something is missing, or does not go with the rest; nothing was written.
    """
    check_output(output)
    if options.dump is not None:
        check_folder(options.dump)
    if adapter_name is not None and adapter is None:
        raise ConfigError(f"--adapter-name {adapter_name} has no effect without --adapter; give it, or leave it out")
    if adapter is None:
        options.check_model(methods={}, task=task)
    fields = None if adapter is None else config_fields(adapter)[0]  # once: of a hub id, each time is a look-up
    known = requested_task((fields or {}).get("task_type"), task, with_cache=True)
    if known is not None and not options.overwrite:
        check_replaced(output, task=known)
    base = _check_model(model, adapter, task, fields)
    if not options.overwrite:
        check_base_replaced(output, BaseSource(base))
    methods = {} if fields is None else {str(adapter): method_described(fields, str(adapter))}
    options.check_model(methods=methods, task=known or (ENCODER_DECODERS[0] if _is_pair(base) else None))
    if image_size is not None and known not in (None, _IMAGES):
        raise ConfigError(f"--image-size is for {_IMAGES}, and the task is {known}; leave it out")
    _check_apart(output, (base, adapter))
    return base


def check_inspection(model: str | None, adapter: str | None, task: str | None, pictures: Iterable[Path | None]) -> None:
    """Check what is inspected and where pictures are written, as far as their files tell.

    Raises:
        GraloraError: Something is missing, or does not go with the rest; nothing was written.
    """
    _check_model(model, adapter, task, None if adapter is None else config_fields(adapter)[0])
    for path in filter(None, pictures):
        check_file(path)


def _check_model(model: str | None, adapter: str | None, task: str | None, fields: Mapping[str, object] | None) -> str:
    """The name of the base.

    Raises:
        GraloraError: Neither names a base, one of both is not there, or the adapter is for another task.
    """
    if adapter is not None and fields is not None:
        check_adapter_task(str(fields.get("task_type")), task, adapter)
    base = base_name(model, adapter, fields)
    check_model_files(base, TraceError, named_by=None if model else adapter)
    return base


def _is_pair(base: str) -> bool:
    """Whether a base is an encoder-decoder that is exported with its cache where no task is named."""
    directory = local_directory(base, TraceError)
    if directory is None:
        return False
    fields = read_json_object(directory / "config.json", TraceError)
    return bool(fields.get("is_encoder_decoder")) and "ForConditionalGeneration" in str(fields.get("architectures"))


def _check_apart(output: Path, sources: Iterable[str | None]) -> None:
    """Check that what is read does not lie where the output is replaced.

    Raises:
        ExportError: It does.
    """
    target = output.resolve()
    for source in filter(None, sources):
        directory = local_directory(source, ExportError)
        if directory is not None and (found := directory.resolve()) and (found == target or target in found.parents):
            raise ExportError(
                f"{source} lies within the output {output}, which is replaced whole; give another output directory"
            )
