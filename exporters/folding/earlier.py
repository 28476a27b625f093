"""Adapters that an export holds already, beside which another one is folded."""

from __future__ import annotations

from collections.abc import Iterator

from gralora_fx.config import AdapterConfig
from gralora_fx.errors import MergeError, listed, warn_caller
from gralora_fx.exporters.folding.adapter import SavedAdapter
from gralora_fx.methods import config_from_fields
from gralora_fx.planning.targets import rule_of, trains_whole_at
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.sources.same_base import SAME, BaseSource, compare_bases


def check_earlier_adapters(manifest: Manifest, adapter: SavedAdapter) -> None:
    """Check that an adapter can be folded beside those that an export holds.

    Args:
        manifest: The export's manifest.
        adapter: The adapter.

    Raises:
        MergeError: It is one of them, is of another base than one of them, or one of both replaces parameters that the
            other one changes too, so that the order would count and no model has both.
    """
    for name, entry in manifest.adapters.items():
        own, other = adapter.config.base_model_name_or_path, entry.config.get("base_model_name_or_path")
        if own and other:
            compared = compare_bases(BaseSource(own), BaseSource(str(other)))
            pair = f"{adapter.origin} is an adapter of {own}, but the export has the adapter {name!r} of {other}"
            if compared.is_proven_different:
                raise MergeError(
                    f"{pair}, another base: {compared.reason}; give one of the same base, or force=True to fold it"
                )
            if compared.outcome != SAME and manifest.base is None:  # else the export's own base is compared
                warn_caller(f"{pair}, which may be another base: {compared.reason}")
        if entry.sha256 is not None and entry.sha256 == adapter.sha256:
            raise MergeError(
                f"{adapter.origin} is folded into the export already, as {name!r}: its update would be added twice; "
                "give another adapter, or force=True to add it again"
            )
        earlier = config_from_fields(entry.config, f"the adapter {name!r} of the export")
        if shared := sorted({*_replaced_again(earlier, adapter), *_replaced_before(earlier, adapter)}):
            raise MergeError(
                f"{adapter.origin} and the adapter {name!r} of the export both change {listed(shared, 3)}, which one "
                "of them replaces as a whole; fold one of them into the base's export, or give force=True, "
                "and the result has what is folded last"
            )


def _replaced_again(earlier: AdapterConfig, adapter: SavedAdapter) -> Iterator[str]:
    """Parameters that the new adapter replaces and the earlier one trained or adapted."""
    rule = None if earlier.target_modules is None else rule_of(earlier, None)
    for parameter in adapter.replaced:
        module, _, last = parameter.rpartition(".")
        is_adapted = rule is not None and not rule.all_linear and rule.rejection(module) is None
        is_bias = last == "bias" and (earlier.bias == "all" or (earlier.trains_adapted_biases and is_adapted))
        if trains_whole_at(module, earlier.saved_module_names) or is_bias or (last == "weight" and is_adapted):
            yield parameter


def _replaced_before(earlier: AdapterConfig, adapter: SavedAdapter) -> Iterator[str]:
    """Layers that the new adapter adapts and the earlier one replaced."""
    return (path for path in adapter.updates if trains_whole_at(path, earlier.saved_module_names))
