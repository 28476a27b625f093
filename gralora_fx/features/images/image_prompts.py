"""Prompts of `generate` with what images put in the place of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError
from gralora_fx.features.images.input_table import STEP_INPUTS
from gralora_fx.format.input_names import EMBEDS
from gralora_fx.run.engine.bounded_rows import Source
from gralora_fx.run.generate.prompts import Prompts
from gralora_fx.run.sessions.ort_values import plain_array


def with_images(prompts: Prompts, embeds: Any) -> Prompts:
    """Return prompts with what images put in the place of their tokens.

    Args:
        prompts: The prompts.
        embeds: Embeddings `[tokens, hidden]`, or a dict of them and what goes with them, of the prompt or of each.
    """
    given = [embeds] if prompts.is_single else list(embeds) if isinstance(embeds, (list, tuple)) else None
    if given is None or len(given) != len(prompts.rows):
        raise ServingError(
            f"inputs_embeds has to be a list of {len(prompts.rows)}, one for each prompt, None for one of text alone"
        )
    images: list[Source | None] = []
    for index, each in enumerate(given):
        named = each if isinstance(each, Mapping) or each is None else {EMBEDS: each}
        arrays = {} if named is None else {name: plain_array(name, value) for name, value in named.items()}
        images.append(None if named is None else {name: _of_one_row(name, array) for name, array in arrays.items()})
        count, wanted = len(arrays[EMBEDS]) if EMBEDS in arrays else None, len(prompts.rows[index])
        if count is not None and count != wanted:
            raise ServingError(
                f"prompt {index} has {wanted} tokens and inputs_embeds {count}; give embeddings of all of its tokens"
            )
    return replace(prompts, given=images)


def _of_one_row(name: str, array: NDArray[Any]) -> NDArray[Any]:
    axis = next((each.axis for each in STEP_INPUTS if each.name == name), 0)
    return np.expand_dims(array, min(axis, array.ndim))
