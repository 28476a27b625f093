"""A saved adapter read without a model: its updates by layer, and the parameters that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gralora_fx.adapters.adapter_files import KEY_PREFIX, WEIGHTS_NAME, adapter_digest
from gralora_fx.adapters.agreement import KnownLayers
from gralora_fx.adapters.stored import open_adapter
from gralora_fx.config import AdapterConfig
from gralora_fx.methods.method import Update
from gralora_fx.sources.atomic_save import current_file


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter directory's content.

    Attributes:
        origin: The directory.
        config: Its configuration.
        updates: The weight updates by the path of the layer.
        replaced: Trained parameters by their names in the model: biases, and those of `modules_to_save`.
        copies: Parameters that the file only repeats from the base, such as the weight of an adapted head.
        sha256: Digest of the tensors as a manifest holds it.
    """

    origin: str
    config: AdapterConfig
    updates: Mapping[str, Update]
    replaced: Mapping[str, NDArray[Any]]
    copies: Mapping[str, NDArray[Any]]
    sha256: str

    def features(self, path: str) -> tuple[int, int]:
        """Widths in and out of an adapted layer."""
        return self.updates[path].factors.features


def read_saved_adapter(adapter_dir: str | Path, known: KnownLayers | None = None) -> SavedAdapter:
    """Read an adapter of any registered method, and check that its tensors fit its configuration.

    Args:
        adapter_dir: Local directory or hub id.
        known: The layers of the model that it is for; None where they are not known.

    Raises:
        ConfigError: The configuration is missing or invalid.
        CheckpointError: Tensors are missing, unexpected, of another shape than the configuration says, or not finite;
            all are named.
    """
    with open_adapter(adapter_dir) as stored:
        if known is not None:
            stored.check_layers(known)
        updates = {path: stored.update(path) for path in stored.sites}
        replaced = {name: stored.values(extent) for name, extent in stored.copies.items()}
        kept: dict[str, Any] = {
            f"{KEY_PREFIX}{path}.{stored.method.keys[field]}": tensor
            for path, update in updates.items()
            for field, tensor in update.factors._asdict().items()
            if tensor is not None
        }
        trained = set(stored.copies.values())
        kept |= {key: stored.values(extent) for key, extent in stored.others.items() if extent in trained}
        return SavedAdapter(
            str(stored.directory),
            stored.config,
            updates,
            replaced,
            {name: stored.values(extent) for name, extent in stored.repeats.items()},
            adapter_digest(current_file(stored.directory, WEIGHTS_NAME), kept, stored.config),
        )
