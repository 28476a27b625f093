"""PEFT's names for configurations and their parts."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods.saved_configs import config_from_fields, config_from_peft, read_config


class TaskType(StrEnum):
    """The task that a model with an adapter is trained for, as `task_type` of a configuration.

    Attributes:
        SEQ_CLS: Sequence classification.
        SEQ_2_SEQ_LM: Encoder-decoder language modelling.
        CAUSAL_LM: Causal language modelling.
        TOKEN_CLS: Token classification.
        QUESTION_ANS: Extractive question answering.
        FEATURE_EXTRACTION: Hidden states.
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """PEFT's names of the methods, as `peft_type` of a configuration.

    Attributes:
        GRALORA: GraLoRA.
        LORA: LoRA, rsLoRA and DoRA.
    """

    GRALORA = "GRALORA"
    LORA = "LORA"


class PeftConfig(ABC):  # noqa: B024  # what its name is for is isinstance
    """Any configuration of this package, for `isinstance`; `from_pretrained` reads a configuration of any method."""

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, subfolder: str = "", revision: str | None = None
    ) -> AdapterConfig:
        """Read `adapter_config.json` from a directory or a hub repository.

        Args:
            directory: Local directory or hub id.
            subfolder: Folder within it.
            revision: Revision of the hub repository.

        Raises:
            ConfigError: There is no such file, or it cannot be used.
        """
        return read_config(Path(directory, subfolder) if subfolder else directory, revision=revision)


PeftConfig.register(AdapterConfig)  # type: ignore[type-abstract]


def get_peft_config(config_dict: Mapping[str, Any]) -> AdapterConfig:
    """Build a configuration from the fields of a file.

    Args:
        config_dict: The fields, including `peft_type`.

    Raises:
        ConfigError: The method is not known, or a field has an invalid value.
    """
    return config_from_fields(config_dict, "the given dictionary")


def own_config(config: Any) -> AdapterConfig:
    """Return a configuration of this package, converted if it is PEFT's."""
    return config if isinstance(config, AdapterConfig) else config_from_peft(config)
