"""Reads configuration fields as PEFT and other programs write them, in the terms of this package."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gralora_fx.core.config.checks import ALL_LINEAR, CONFIG_NAME, check_integer, is_number
from gralora_fx.errors import ConfigError, an, marked, shown, warn_caller


def config_fields(directory: str | Path, *, revision: str | None = None) -> tuple[dict[str, Any], str]:
    """Return the fields of an adapter's `adapter_config.json`, of any method, and the file's path."""
    from gralora_fx.base.sources.atomic_save import read_together
    from gralora_fx.base.sources.model_directories import resolve_directory

    path = resolve_directory(directory, ConfigError, revision=revision, patterns=[CONFIG_NAME])
    return read_together(path, [CONFIG_NAME], read_fields), str(path / CONFIG_NAME)


def read_fields(path: Path) -> dict[str, Any]:
    """Read the fields of a configuration file."""
    try:
        data = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from error
    if data is None:
        from gralora_fx.base.sources.model_files import described

        raise ConfigError(
            f"no {path.name} in {path.parent}, which {described(path.parent)}; give the directory of a saved adapter"
        )
    try:
        fields = json.loads(data.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8, or an integer with thousands of digits
        raise ConfigError(f"{path} is not valid JSON ({error}); save the adapter again") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds {an(type(fields).__name__)}, not an object; save the adapter again")
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {shown(name)} is in it twice")
        fields[name] = value
    return fields


def peft_fields(peft_config: Any, wanted: str) -> tuple[dict[str, Any], str]:
    """Return the fields of a live PEFT configuration as in its file, and a name for messages."""
    if not hasattr(peft_config, "peft_type") or not hasattr(peft_config, "__dict__"):
        raise ConfigError(f"{shown(peft_config)} is not a PEFT configuration; give {wanted}")
    if isinstance(peft_config, type):
        raise ConfigError(f"{peft_config.__name__} is a class; give an object, such as {peft_config.__name__}()")
    fields = {name: getattr(value, "value", value) for name, value in vars(peft_config).items() if name[:1] != "_"}
    fields = {"peft_type": getattr(peft_config.peft_type, "value", peft_config.peft_type), **fields}
    return fields, f"the given {type(peft_config).__name__}"


def from_paper(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Convert the paper's fields to PEFT's: its `r` includes `hybrid_r`, its scale is `gralora_alpha / r`."""
    total, hybrid, alpha = values.get("r", 32), values.get("hybrid_r") or 0, values["gralora_alpha"]
    check_integer("r", total, 1)
    check_integer("hybrid_r", hybrid, 0)
    warn_caller(
        f"{origin} is in the format of the paper's own code: read as r={total - hybrid}, hybrid_r={hybrid}, "
        f"alpha={alpha}, so that the scale is {alpha}/{total}"
    )
    others = {name: value for name, value in values.items() if name != "gralora_alpha"}
    return {**others, "r": total - hybrid, "hybrid_r": hybrid, "alpha": alpha}


def as_peft_reads(values: Mapping[str, Any], *, dropout: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Interpret the values of PEFT's file as PEFT does, even those that the constructor refuses."""
    accepted, only_in_peft, notes = dict(values), {}, []
    targets, layers, pattern = (
        accepted.get(name) for name in ("target_modules", "layers_to_transform", "layers_pattern")
    )
    is_regex = isinstance(targets, str) and targets.lower() != ALL_LINEAR
    if is_regex and layers not in (None, []):
        notes.append(f"layers_to_transform={shown(layers)} is ignored, as PEFT ignores it beside a regular expression")
        accepted["layers_to_transform"] = None
    if pattern and accepted.get("layers_to_transform") in (None, []):
        notes.append(f"layers_pattern={shown(pattern)} is ignored, as PEFT ignores it without layers_to_transform")
        accepted["layers_pattern"] = None
    probability = accepted.get(dropout, 0.0)
    if is_number(probability) and probability < 0:
        notes.append(f"{dropout}={shown(probability)} is read as 0, as PEFT reads it")
        accepted[dropout] = 0.0
    elif is_number(probability) and probability == 1:
        notes.append(f"{dropout}=1 drops every input of the adapter in training, so that it does not train")
        only_in_peft[dropout] = accepted.pop(dropout)
    if targets == "" or (targets in ([], (), set()) and not accepted.get("target_parameters")):
        notes.append("target_modules is empty, so that the configuration fits no model")
        only_in_peft["target_modules"] = set() if targets != "" else ""
        del accepted["target_modules"]
    return accepted, only_in_peft, notes


def read_as(kind: Any, fields: Mapping[str, Any], origin: str) -> Any:
    """Build a configuration of a class from a file's fields (see `AdapterConfig.from_fields`)."""
    from gralora_fx.core.config.foreign_fields import check_known

    peft_type = fields.get("peft_type")
    if str(peft_type).upper() != kind.PEFT_TYPE:
        raise ConfigError(
            f"{origin}: peft_type is {shown(peft_type)}, not {kind.PEFT_TYPE!r}; give {an(kind.TITLE)} adapter"
        )
    values = kind.translate(fields, origin)
    known = {entry.name for entry in dataclasses.fields(kind)}
    check_known(values, known, origin, kind.TITLE)
    known -= {name for name in kind.BEYOND_PEFT if values.get(name) is None}
    values = {name: value for name, value in values.items() if name in known}
    accepted, only_in_peft, notes = as_peft_reads(values, dropout=kind.DROPOUT)
    for note in notes:
        warn_caller(f"{origin}: {note}")
    try:
        return kind(**accepted).changed(**only_in_peft)
    except ConfigError as error:
        raise error.reworded(f"{origin}: {marked(error)}") from error
