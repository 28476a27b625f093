"""The adapters that an export holds: whether another one can be folded beside them, and the record of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

from gralora_fx.adapters.adapter_files import adapter_digest
from gralora_fx.adapters.stored_adapter import StoredAdapter
from gralora_fx.config import AdapterConfig
from gralora_fx.errors import MergeError, listed, warn_caller
from gralora_fx.methods import config_from_fields, method_of
from gralora_fx.planning.targets import rule_of, trains_whole_at
from gralora_fx.runtime.manifest import AdapterEntry, Manifest
from gralora_fx.sources.same_base import SAME, BaseComparison, BaseSource, compare_bases


def digest_of(adapter: StoredAdapter) -> str:
    """The digest of an adapter's tensors as a manifest holds it, without values that it only repeats from its base."""
    trained = set(adapter.copies.values())
    kept = [tensor for site in adapter.sites.values() for tensor in site.tensors.values()]
    kept += [tensor for tensor in adapter.others.values() if tensor in trained]
    return adapter_digest(kept[0].file, {tensor.key: tensor.array() for tensor in kept}, adapter.config)


def check_earlier_adapters(manifest: Manifest, adapter: StoredAdapter, sha256: str) -> None:
    """Check that an adapter can be folded beside those that an export holds.

    Args:
        manifest: The export's manifest.
        adapter: The adapter.
        sha256: Its digest.

    Raises:
        MergeError: It is one of them, is of another base than one of them, or one of both replaces parameters that the
            other one changes too, or both adapt a layer and what one of them does depends on the weight: the order
            would count, and no model has both.
    """
    for name, entry in manifest.adapters.items():
        own, other = adapter.config.base_model_name_or_path, entry.config.get("base_model_name_or_path")
        if own and other:
            compared = compare_bases(BaseSource(own), BaseSource(str(other)))
            pair = f"{adapter.directory} is an adapter of {own}, but the export has the adapter {name!r} of {other}"
            if compared.is_proven_different:
                raise MergeError(
                    f"{pair}, another base: {compared.reason}; give one of the same base, or force=True to fold it"
                )
            if compared.outcome != SAME and manifest.base is None:  # else the export's own base is compared
                warn_caller(f"{pair}, which may be another base: {compared.reason}")
        if entry.sha256 is not None and entry.sha256 == sha256:
            raise MergeError(
                f"{adapter.directory} is folded into the export already, as {name!r}: its update would be added twice; "
                "give another adapter, or force=True to add it again"
            )
        earlier = config_from_fields(entry.config, f"the adapter {name!r} of the export")
        if shared := sorted({*_replaced_again(earlier, adapter), *_replaced_before(earlier, adapter)}):
            raise MergeError(
                f"{adapter.directory} and the adapter {name!r} of the export both change {listed(shared, 3)}, which "
                "one of them replaces as a whole; fold one of them into the base's export, or give force=True, "
                "and the result has what is folded last"
            )
        for config in (adapter.config, earlier):
            if not method_of(config).IS_ADDITIVE and (shared := sorted(_adapted_again(earlier, adapter))):
                raise MergeError(
                    f"{adapter.directory} and the adapter {name!r} of the export both adapt {listed(shared, 3)}, and "
                    f"what a {config.TITLE} adapter does there depends on the weight; fold one of them into the base's "
                    "export, or give force=True, and the result has what is folded last over the rest"
                )


def _replaced_again(earlier: AdapterConfig, adapter: StoredAdapter) -> Iterator[str]:
    """Parameters that the new adapter replaces and the earlier one trained or adapted."""
    rule = None if earlier.target_modules is None else rule_of(earlier, None)
    for parameter in adapter.copies:
        module, _, last = parameter.rpartition(".")
        is_adapted = rule is not None and not rule.all_linear and rule.rejection(module) is None
        is_bias = last == "bias" and (earlier.bias == "all" or (earlier.trains_adapted_biases and is_adapted))
        if trains_whole_at(module, earlier.saved_module_names) or is_bias or (last == "weight" and is_adapted):
            yield parameter


def _adapted_again(earlier: AdapterConfig, adapter: StoredAdapter) -> Iterator[str]:
    """Layers that both adapters adapt, or may, where the earlier one's layers are those of its model's type."""
    rule = None if earlier.target_modules is None else rule_of(earlier, None)
    return (path for path in adapter.sites if rule is None or rule.rejection(path) is None)


def _replaced_before(earlier: AdapterConfig, adapter: StoredAdapter) -> Iterator[str]:
    """Layers that the new adapter adapts and the earlier one replaced."""
    return (path for path in adapter.sites if trains_whole_at(path, earlier.saved_module_names))


def with_adapter(
    manifest: Manifest, name: str, adapter: StoredAdapter, sha256: str, base: BaseComparison
) -> tuple[Manifest, str]:
    """The manifest with one more adapter, and its name: the wanted one, with a number if another adapter has it.

    A base with replaced parameters has a fingerprint of its own that is not known here, so it is left out. So is what
    was measured before.
    """
    count, free = 1, name
    while free in manifest.adapters:
        count += 1
        free = f"{name}_{count}"
    config = json.loads(adapter.config.changed(inference_mode=True).to_json())
    changed = replace(
        manifest,
        adapters={**manifest.adapters, free: AdapterEntry(config, sha256, base.to_dict())},
        base_fingerprint=None if adapter.copies else manifest.base_fingerprint,
        verification=None,
        quality=None,
    )
    return changed, free
