"""A user's texts as inputs of a model without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.verification.cases import Case
from gralora_fx.exporters.verification.random_values import longest_text
from gralora_fx.loading.tokenizers import load_tokenizer
from gralora_fx.tracing.traced_model import TracedModel

_BATCH = 16


def text_cases(texts: Sequence[str], tokenizer: Any, traced: TracedModel) -> Iterator[Case]:
    """Batches of 16 texts, each padded to its longest, cut at the model's context.

    Args:
        texts: The texts.
        tokenizer: A tokenizer, or the directory of one.
        traced: The model.

    Yields:
        A description, and inputs by name.

    Raises:
        ExportError: There is no tokenizer, it does not take a text, or it does not give what the model takes.
    """
    loaded = text_tokenizer(tokenizer)
    names = [name for name, value in traced.graph_inputs.items() if isinstance(value, Tensor)]
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        where = f"texts {start + 1} to {start + len(batch)}"
        encoded = _encoded(loaded, batch, longest_text(traced), where)
        if "input_ids" in encoded:  # a tokenizer may leave token types out, and they are zeros in a single text
            encoded.setdefault("token_type_ids", torch.zeros_like(encoded["input_ids"]))
        if missing := [name for name in names if name not in encoded]:
            raise ExportError(
                f"the model takes {', '.join(names)}, but the tokenizer gives no {', '.join(missing)} for a text; "
                "leave texts out"
            )
        yield where, {**traced.constants, **{name: encoded[name] for name in names}}


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of a user's texts.

    Args:
        tokenizer: A tokenizer, or the directory of one.

    Raises:
        ExportError: The directory has none.
    """
    loaded = load_tokenizer(tokenizer, ExportError) if isinstance(tokenizer, (str, Path)) else tokenizer
    if loaded is None:
        raise ExportError(f"no tokenizer can be loaded from {tokenizer}, which holds none; give its directory")
    return loaded


def _encoded(tokenizer: Any, texts: list[str], length: int, where: str) -> dict[str, Tensor]:
    try:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt"))
    except Exception as error:  # tokenizers raise types of their own
        raise ExportError(f"the tokenizer does not take {where} ({first_line(error)})") from error
