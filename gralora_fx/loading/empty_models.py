"""Models without values: the names and shapes that a directory's configuration gives."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from gralora_fx.errors import GraloraError, TraceError, first_line
from gralora_fx.loading.model_classes import class_for
from gralora_fx.progress.stages import quiet
from gralora_fx.sources.safetensors_files import empty_model


def make_empty(directory: Path, task: str | None, *, num_labels: int | None = None) -> PreTrainedModel:
    """A model of a directory's configuration, with parameters on the meta device.

    Args:
        directory: The model's directory.
        task: One of optimum's task names; None for the class that the configuration names.
        num_labels: Number of classes of a head; None for the configuration's.

    Raises:
        TraceError: The configuration names no class that transformers has, or it cannot be made.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
            if num_labels is not None and num_labels != config.num_labels:
                config.num_labels = num_labels
            model_class = class_for(config, task)
            make = model_class.from_config if hasattr(model_class, "from_config") else model_class
            return empty_model(lambda: make(config))
    except GraloraError:
        raise
    except Exception as error:  # transformers raises types of its own
        raise TraceError(f"no model can be made of {directory} ({first_line(error)})") from error
