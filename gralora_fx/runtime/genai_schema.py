"""Validation of `genai_config.json` before onnxruntime-genai reads it.

onnxruntime-genai obeys that file: it loads the library named in `custom_ops_library`, which runs its code, and writes
the file named in `enable_profiling`. So a file with anything but what an export writes is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gralora_fx.errors import ExportError, GraloraError, first_line

CONFIG_NAME = "genai_config.json"


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_tokens(value: object) -> bool:
    return _is_count(value) or (isinstance(value, list) and bool(value) and all(_is_count(token) for token in value))


def _is(expected: object) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return type(value) is type(expected) and value == expected

    return check


_DECODER = {
    "session_options": {"log_id": _is("gralora-fx"), "provider_options": _is([])},
    "filename": _is("model.onnx"),
    **dict.fromkeys(
        ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"), _is_count
    ),
    "inputs": {
        **{name: _is(name) for name in ("input_ids", "attention_mask", "position_ids")},
        **{f"past_{kind}_names": _is(f"past_key_values.%d.{kind}") for kind in ("key", "value")},
    },
    "outputs": {
        "logits": _is("logits"),
        **{f"present_{kind}_names": _is(f"present.%d.{kind}") for kind in ("key", "value")},
    },
}
_SCHEMA: Mapping[str, Any] = {
    "model": {
        "type": _is("decoder"),
        "eos_token_id": _is_tokens,
        **dict.fromkeys(("bos_token_id", "pad_token_id", "vocab_size", "context_length"), _is_count),
        "decoder": _DECODER,
    },
    "search": {
        **dict.fromkeys(("do_sample", "early_stopping", "past_present_share_buffer"), _is_flag),
        **dict.fromkeys(("max_length", "min_length", "num_beams", "num_return_sequences", "top_k"), _is_count),
        **dict.fromkeys(("repetition_penalty", "temperature", "top_p"), _is_number),
    },
}
_OPTIONAL = "position_ids"  # absent for a model that takes none


def read_genai_config(directory: Path, error: type[GraloraError] = ExportError) -> dict[str, Any]:
    """Read and check the configuration of an export that generates.

    Args:
        directory: The export directory.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type, naming the key: the file is missing or damaged, or has what no export writes.
    """
    path = directory / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8")
        config: Any = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except FileNotFoundError as failure:
        raise error(f"{path} is missing; copy the whole export directory, or export the model again") from failure
    except (OSError, ValueError, RecursionError) as failure:
        raise error(f"{path} cannot be read ({first_line(failure)}); export the model again") from failure
    problem = _problem(config, _SCHEMA, "")
    if problem:
        raise error(f"{path}: {problem}; onnxruntime-genai would act on it, so export the model again")
    return dict(config)


def _problem(section: object, schema: Mapping[str, Any], path: str) -> str | None:
    """The first problem of an object in the file, or None."""
    if not isinstance(section, dict):
        return f"{path or 'it'} is not an object"
    for name, value in section.items():
        key_path = f"{path}.{name}" if path else name
        if name not in schema:
            return f"{key_path:.200} is not a key that an export writes"
        expected = schema[name]
        if isinstance(expected, Mapping):
            if problem := _problem(value, expected, key_path):
                return problem
        elif not expected(value):
            return f"{key_path} is {value!r:.80}, which no export writes"
    missing = [name for name in schema if name not in section and name != _OPTIONAL]
    return f"{path + '.' if path else ''}{missing[0]} is missing" if missing else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing duplicate keys, on all of which onnxruntime-genai would act."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice:.80} is twice in an object")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
