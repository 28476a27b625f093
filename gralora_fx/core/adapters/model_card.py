"""The card of saved adapters, `README.md`, whose metadata the hub and Trainer read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gralora_fx.core.config import AdapterConfig
from gralora_fx.errors import first_line, warn_caller

CARD_NAME = "README.md"


def write_card(path: Path, config: AdapterConfig, tags: Iterable[str], directory: str | Path) -> None:
    """Write the card of an adapter of a directory; of the card there, which may be a user's, the text stays."""
    from huggingface_hub import ModelCard, ModelCardData  # the hub's client, which takes a while

    base, known = config.base_model_name_or_path, Path(directory, CARD_NAME)
    try:
        card = ModelCard.load(known) if known.exists() else ModelCard.from_template(ModelCardData())
    except Exception as error:  # noqa: BLE001  # YAML and the hub raise types of their own
        warn_caller(f"the adapter is saved, and its card {known} is left as it was ({first_line(error)})")
        path.write_bytes(known.read_bytes())
        return
    data, own = card.data, [config.PEFT_TYPE.lower(), *([f"base_model:adapter:{base}"] if base else []), *tags]
    data.library_name, data.base_model = "peft", data.base_model or base
    data.tags = sorted({*(data.tags or ()), *own})
    if config.task_type == "CAUSAL_LM":
        data.pipeline_tag = data.pipeline_tag or "text-generation"
    card.save(path)
