"""Embeddings that PEFT saves beside an adapter whose base has a resized vocabulary.

PEFT's `save_pretrained` adds the input and output embeddings to such a file, trained or not, and `from_pretrained`
copies them over the base's. Where they equal the base's, nothing is to be done; where they do not, they belong to the
adapter, as if `modules_to_save` had named them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gralora_fx.core.config import AdapterConfig
from gralora_fx.errors import CheckpointError, listed, remedy, warn_caller

_WEIGHT = ".weight"


class VocabularySizeError(CheckpointError):
    """An adapter's embeddings have another number of tokens than the base's."""


def check_vocabulary(parameter: str, saved: Sequence[int], own: Sequence[int], adapter: object) -> None:
    """Raise a `VocabularySizeError` if an adapter's embedding has another size than the base's."""
    if tuple(saved) != tuple(own):
        raise VocabularySizeError(
            f"{adapter} holds {parameter} of {saved[0]} tokens, and the base's has {own[0]}: its base had a resized "
            f"vocabulary. Resize yours likewise (resize_token_embeddings), save it with the adapter's "
            f"tokenizer, and {remedy('take that', 'give it as --model')}"
        )


def training(config: AdapterConfig, parameters: Iterable[str], adapter: object) -> AdapterConfig:
    """Return a configuration that also trains embeddings, with a warning: they replace the base's."""
    modules = [parameter.removesuffix(_WEIGHT) for parameter in parameters]
    if not modules:
        return config
    warn_caller(
        f"{adapter} holds values of its own for {listed(modules)}, as PEFT saves them over a resized vocabulary; they "
        "are used in place of the base's, as if modules_to_save named them"
    )
    return config.changed(modules_to_save=[*(config.modules_to_save or ()), *modules])
