"""A record of the adapters folded into a model: configuration, digest of the tensors, comparison of the base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gralora_fx.core.adapters.adapter import ModelAdapter, checkpoint_parameters
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import warn_caller


def describe_folded(adapters: Iterable[ModelAdapter], traced: TracedModel, *, own: bool) -> FoldedAdapters:
    """Describe the adapters folded into a model, by name."""
    entries: dict[str, Any] = {name: traced.merged_adapters[name] for name in traced.merged_adapters}
    for adapter in adapters:
        name, count = adapter.name, 1
        while name in entries:
            count += 1
            name = f"{adapter.name}_{count}"
        entries[name] = _Folded.of(adapter, traced, own=own)
    return FoldedAdapters(entries)


@dataclass(frozen=True)
class _Folded:
    """An adapter as it was when it was folded."""

    adapter: ModelAdapter
    traced: TracedModel
    tensors: Mapping[str, Tensor]

    versions: tuple[int, ...]

    @classmethod
    def of(cls, adapter: ModelAdapter, traced: TracedModel, *, own: bool) -> _Folded:
        tensors = {key: tensor.detach() for key, tensor in checkpoint_parameters(adapter).items()}
        tensors = tensors if own else {key: tensor.clone() for key, tensor in tensors.items()}
        return cls(adapter, traced, tensors, _versions(tensors))

    def described(self) -> dict[str, Any]:
        from gralora_fx.core.adapters.saved_form import saved_config, tensors_digest

        config = saved_config(self.adapter, self.traced)
        digest: str | None = tensors_digest(self.tensors, config)
        if self.versions != _versions(self.tensors):
            warn_caller(
                f"tensors of adapter {self.adapter.name!r} were changed after it was folded into the model and taken "
                "out, so the SHA-256 of what was folded is not known"
            )
            digest = None
        base = self.adapter.base
        return {
            "config": json.loads(config.to_json()),
            "sha256": digest,
            "base": None if base is None else base.to_dict(),
        }


def _versions(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return each tensor's version counter; 0 for inference tensors, which have none."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors.values())


class FoldedAdapters(Mapping[str, dict[str, Any]]):
    """Configurations and SHA-256 digests of folded adapters by name, as if saved; digests are computed lazily."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        """Store descriptions, or records to compute them from."""
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> dict[str, Any]:
        entry = self._entries[name]
        if isinstance(entry, _Folded):
            entry = self._entries[name] = entry.described()
        described: dict[str, Any] = entry
        return described

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        """Return the `repr` of the same dict."""
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the state for pickle and `copy.deepcopy`: the descriptions."""
        return FoldedAdapters, (dict(self),)
