"""Embeddings that PEFT saves beside an adapter whose base has a resized vocabulary.

PEFT's `save_pretrained` adds the input and output embeddings to such a file, trained or not, and `from_pretrained`
copies them over the base's. Where they equal the base's, nothing is to be done; where they do not, they belong to the
adapter, as if `modules_to_save` had named them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gralora_fx.core.config import AdapterConfig
from gralora_fx.errors import CheckpointError, listed, option, warn_caller

_NAMES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")
_WEIGHT = ".weight"


def is_embedding(parameter: str) -> bool:
    """Return whether a parameter's name is that of an embedding, which PEFT may save beside an adapter."""
    module = parameter.removesuffix(_WEIGHT)
    return module != parameter and module.rpartition(".")[2] in _NAMES


def check_vocabulary(parameter: str, saved: Sequence[int], own: Sequence[int], adapter: object) -> None:
    """Raise a `CheckpointError` if an adapter's embedding has another size than the base's."""
    if tuple(saved) != tuple(own):
        raise CheckpointError(
            f"{adapter} holds {parameter} of {saved[0]} tokens, and the base's has {own[0]}: it was trained on a base "
            f"with a resized vocabulary. Resize the base likewise (resize_token_embeddings({saved[0]})), save it with "
            f"the adapter's tokenizer, and give it as {option(model=...)}"
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
