"""Scores of texts from a classifier's outputs, and the names of its classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, shown


def finite(output: NDArray[Any]) -> NDArray[Any]:
    """An output of a text, checked: no score and no number of JSON stands for what is not finite.

    Raises:
        ServingError: It is not finite.
    """
    if not np.isfinite(output).all():
        raise ServingError("the model's output for a text is not finite")
    return output


def scores_of(logits: NDArray[Any], config: Mapping[str, Any]) -> NDArray[Any]:
    """Scores of a text's classes, by the function that transformers' pipeline applies.

    Args:
        logits: `[classes]`.
        config: Fields of the model's `config.json`.
    """
    values = logits.astype(np.float64)
    kind = config.get("problem_type")
    if kind == "regression":
        return values
    if kind == "multi_label_classification" or len(values) == 1:
        return np.asarray(1 / (1 + np.exp(-values)))
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum())


def labels_of(config: Mapping[str, Any], count: int) -> list[str]:
    """The names of the classes; transformers' defaults where the configuration has none."""
    names = config.get("id2label") or {}
    return [str(names.get(str(index), f"LABEL_{index}")) for index in range(count)]


def relevance_of(config: Mapping[str, Any]) -> Callable[[float], float]:
    """The function from a cross-encoder's output to its score, which sentence-transformers notes in its configuration.

    Args:
        config: Fields of the model's `config.json`.

    Returns:
        That function; a sigmoid, as sentence-transformers', if none is noted.

    Raises:
        ServingError: It is neither the sigmoid nor the identity.
    """
    noted = config.get("sentence_transformers")
    name = noted.get("activation_fn") if isinstance(noted, Mapping) else None
    name = name or config.get("sbert_ce_default_activation_function") or "torch.nn.modules.activation.Sigmoid"
    functions: dict[str, Callable[[float], float]] = {"Sigmoid": _sigmoid, "Identity": float}
    kind = str(name).rpartition(".")[2]
    if kind not in functions:
        raise ServingError(
            f"config.json names {shown(name)} for the scores of a cross-encoder; there are Sigmoid and Identity"
        )
    return functions[kind]


def _sigmoid(value: float) -> float:
    if value < 0:
        return 1 - _sigmoid(-value)
    return 1 / (1 + math.exp(-value))
