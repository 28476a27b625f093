"""LoRA of embeddings and convolutions, in a file that is read without its base."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft_oracle import saved_by_peft

from gralora_fx.core.adapters.stored_adapter import open_adapter
from gralora_fx.errors import CheckpointError


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        ("llama", ["q_proj", "embed_tokens"], r"adapts an embedding \(model\.embed_tokens\), and only linear layers"),
        ("vit", ["q_proj", "projection"], r"adapts a convolution \(.*patch_embeddings\.projection\), and only linear"),
    ],
)
def test_they_are_named_with_what_to_do(model: str, targets: list[str], message: str, tmp_path: Path) -> None:
    saved_by_peft(model, tmp_path, method="LORA", target_modules=targets, r=4)
    with pytest.raises(CheckpointError, match=message + ".*merge the adapter with PEFT"), open_adapter(tmp_path):
        pass
