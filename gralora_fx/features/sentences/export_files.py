"""What an export of a sentence encoder says beside its graph: its prompts, and how its tokenizer cuts texts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gralora_fx.errors import CheckpointError
from gralora_fx.features.sentences.recognised import SETTINGS_NAME
from gralora_fx.features.sentences.stored_modules import SentenceModules


def write_settings(directory: Path, modules: SentenceModules) -> None:
    """Write prompts and the similarity function, if there are any."""
    if modules.settings:
        text = json.dumps(modules.settings, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / SETTINGS_NAME).write_text(f"{text}\n", encoding="utf-8")


def settings_of_tokenizer(
    tokenizer: PreTrainedTokenizerBase, modules: SentenceModules, config: PreTrainedConfig | None
) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that truncates and lowercases as sentence-transformers does."""
    changed: PreTrainedTokenizerBase = copy.deepcopy(tokenizer)
    positions = getattr(config, "max_position_embeddings", None)
    if modules.max_seq_length is not None:
        changed.model_max_length = modules.max_seq_length
    elif isinstance(positions, int) and positions > 0:
        changed.model_max_length = min(changed.model_max_length, positions)
    if modules.lowercases:
        backend = getattr(changed, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise CheckpointError(
                f"{modules.source} has do_lower_case, which {type(tokenizer).__name__} cannot be told; export without "
                "the tokenizer, and lowercase texts yourself"
            )
        if backend.normalizer is None or "Lowercase(" not in repr(backend.normalizer):
            parts = (
                [normalizers.Lowercase()]
                if backend.normalizer is None
                else [normalizers.Lowercase(), backend.normalizer]
            )
            backend.normalizer = normalizers.Sequence(parts)
    return changed
