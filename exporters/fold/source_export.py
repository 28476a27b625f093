"""The export that an adapter is folded into: its files, and the adapters that it already holds."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from gralora_fx.base.sources.model_files import described, usable_path
from gralora_fx.base.sources.same_base import SAME, BaseComparison, BaseSource, compare_bases
from gralora_fx.core.adapters.adapter_files import adapter_digest
from gralora_fx.core.adapters.agreement import KnownLayers
from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods import config_from_fields, method_of
from gralora_fx.core.planning.targets import rule_of, trains_whole_at
from gralora_fx.errors import ExportError, MergeError, an, first_line, listed, marked, option, warn_caller
from gralora_fx.exporters.rules.products.initializers import initializer_names
from gralora_fx.exporters.rules.products.stored_rows import external_tensors, stored_bytes
from gralora_fx.format.export_checks import check_files, weight_files
from gralora_fx.format.export_directory import MANIFEST_NAME, not_an_export
from gralora_fx.format.manifest import AdapterEntry, Manifest, read_manifest
from gralora_fx.run.sessions.exported_base import layers_of_export
from gralora_fx.run.sessions.session import check_external_data

# companions of a lone file: configuration and tokenizer
_BESIDE = ("*config.json", "*token*.json", "vocab.*", "merges.txt", "*.jinja", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class SourceExport:
    """An export directory."""

    directory: Path  # where it is
    manifest: Manifest | None  # its manifest; None of other exporters' directories
    models: Mapping[str, ir.Model]  # its models by file; external weights are not read
    companions: tuple[str, ...]  # its other files, data files left out, as POSIX paths
    data: tuple[Path, ...]  # its data files
    is_lone_file: bool  # whether an ONNX file without a manifest is given, so that only it is folded into

    @property
    def layers(self) -> KnownLayers | None:
        """Its linear layers and parameters; None for other exporters' directories, which do not record them."""
        if self.manifest is None:
            return None
        names = initializer_names(model.graph for model in self.models.values())
        return replace(layers_of_export(self.directory, self.manifest), parameters=names)


def open_export(onnx_dir: str | Path) -> SourceExport:
    """Open an export directory."""
    directory, file = _directory_and_file(onnx_dir)
    files = [file] if file is not None else sorted(directory.glob("*.onnx")) if os.path.isdir(directory) else []
    if not files:
        if os.path.isdir(directory) and described(directory) not in ("is a model", "is an adapter"):
            raise ExportError(f"{directory} holds no ONNX model (*.onnx); give the directory of an export")
        raise ExportError(not_an_export(directory))
    manifest = read_manifest(directory) if (directory / MANIFEST_NAME).is_file() else None
    if manifest is not None:
        check_files(directory, manifest, digests=False)
        if manifest.adapters_mode != "merged":
            raise ExportError(
                f"{directory} holds its adapters apart ({manifest.adapters_mode}), to be loaded when it is served; "
                f"fold into an export with {option(adapters='merged')}"
            )
    weights = None if manifest is None else weight_files(manifest)
    models = {path.name: _load(path, weights) for path in files}
    data = {Path(tensor.path) for model in models.values() for _, tensor in external_tensors(model)}
    known = {*files, *data, directory / MANIFEST_NAME}
    others = [path for path in _others(directory, file) if path not in known and not path.is_dir()]
    if links := [path for path in others if path.is_symlink()]:
        raise ExportError(f"{links[0]} is a link; copy the file itself into the directory")
    companions = tuple(path.relative_to(directory).as_posix() for path in others)
    return SourceExport(directory, manifest, models, companions, tuple(sorted(data)), file is not None)


def _directory_and_file(onnx_dir: str | Path) -> tuple[Path, Path | None]:
    """Return an export's directory, given as such or as its ONNX file, and that file if no manifest describes it."""
    path = usable_path(onnx_dir, ExportError, remedy="give the directory of an export, or an ONNX file")
    if not path.is_file():
        return path, None
    if path.suffix != ".onnx":
        raise ExportError(f"{path} is not an ONNX file (*.onnx); give one, or the directory of an export")
    return path.parent, None if (path.parent / MANIFEST_NAME).is_file() else path


def _others(directory: Path, file: Path | None) -> Iterator[Path]:
    """Yield files that may be companions: all of an export's directory, or files that configure a lone file."""
    if file is None:
        yield from sorted(directory.rglob("*"))
    else:
        yield from sorted({path for pattern in _BESIDE for path in directory.glob(pattern)})


def _load(path: Path, weights: Container[str] | None) -> ir.Model:
    check_external_data(path, weights=weights)
    try:
        model = ir.load(path)
    except Exception as failure:  # protobuf and onnx_ir raise their own types
        raise ExportError(f"{path} is not an ONNX model ({first_line(failure)}); export the model again") from failure
    for name, tensor in external_tensors(model):
        place, size = stored_bytes(tensor), Path(tensor.path).stat().st_size
        if place.end > size or tensor.length not in (None, tensor.nbytes):
            raise ExportError(
                f"{tensor.path} has {size:,} bytes, but {name} of {path.name} takes bytes {place.begin:,} to "
                f"{place.end:,} of it; it is damaged, so copy or export it again"
            )
    return model


def digest_of(adapter: StoredAdapter) -> str:
    """Return the digest of an adapter's tensors as in a manifest, without values repeated from its base."""
    trained = set(adapter.copies.values())
    kept = [tensor for site in adapter.sites.values() for tensor in site.tensors.values()]
    kept += [tensor for tensor in adapter.others.values() if tensor in trained]
    return adapter_digest(kept[0].file, {tensor.key: tensor.array() for tensor in kept}, adapter.config)


def check_earlier_adapters(manifest: Manifest, adapter: StoredAdapter, sha256: str) -> None:
    """Check that an adapter can be folded beside those that an export holds."""
    for name, entry in manifest.adapters.items():
        own, other = adapter.config.base_model_name_or_path, entry.config.get("base_model_name_or_path")
        if own and other:
            compared = compare_bases(BaseSource(own), BaseSource(str(other)))
            pair = f"{adapter.directory} is an adapter of {own}, but the export has the adapter {name!r} of {other}"
            if compared.is_proven_different:
                raise MergeError(
                    f"{pair}, another base: {marked(compared.reason)}; give one of the same base, or "
                    f"{option(force=True)} to fold it"
                )
            if compared.outcome != SAME and manifest.base is None:  # otherwise compared with the export's own base
                warn_caller(f"{pair}, which may be another base: {marked(compared.reason)}")
        if entry.sha256 is not None and entry.sha256 == sha256:
            raise MergeError(
                f"{adapter.directory} is folded into the export already, as {name!r}: its update would be added twice; "
                f"give another adapter, or {option(force=True)} to add it again"
            )
        earlier = config_from_fields(entry.config, f"the adapter {name!r} of the export")
        if shared := sorted({*_replaced_again(earlier, adapter), *_replaced_before(earlier, adapter)}):
            raise MergeError(
                f"{adapter.directory} and the adapter {name!r} of the export both change {listed(shared, 3)}, which "
                "one of them replaces as a whole; fold one of them into the base's export, or give "
                f"{option(force=True)}, so that the last fold wins"
            )
        for config in (adapter.config, earlier):
            if not method_of(config).IS_ADDITIVE and (shared := sorted(_adapted_again(earlier, adapter))):
                raise MergeError(
                    f"{adapter.directory} and the adapter {name!r} of the export both adapt {listed(shared, 3)}, and "
                    f"what {an(config.TITLE)} adapter does there depends on the weight; fold one of them into the "
                    f"base's export, or give {option(force=True)}, so that the last acts on the result of the others"
                )


def _replaced_again(earlier: AdapterConfig, adapter: StoredAdapter) -> Iterator[str]:
    """Yield the parameters that the new adapter replaces and the earlier one trained or adapted."""
    rule = None if earlier.target_modules is None else rule_of(earlier, None)
    for parameter in adapter.copies:
        module, _, last = parameter.rpartition(".")
        is_adapted = rule is not None and not rule.all_linear and rule.rejection(module) is None
        is_bias = last == "bias" and (earlier.bias == "all" or (earlier.trains_adapted_biases and is_adapted))
        if trains_whole_at(module, earlier.saved_module_names) or is_bias or (last == "weight" and is_adapted):
            yield parameter


def _adapted_again(earlier: AdapterConfig, adapter: StoredAdapter) -> Iterator[str]:
    """Yield the layers that both adapters adapt, or may adapt if the earlier one's targets follow its model type."""
    rule = None if earlier.target_modules is None else rule_of(earlier, None)
    return (path for path in adapter.sites if rule is None or rule.rejection(path) is None)


def _replaced_before(earlier: AdapterConfig, adapter: StoredAdapter) -> Iterator[str]:
    """Yield the layers that the new adapter adapts and the earlier one replaced."""
    return (path for path in adapter.sites if trains_whole_at(path, earlier.saved_module_names))


def with_adapter(
    manifest: Manifest, name: str, adapter: StoredAdapter, sha256: str, base: BaseComparison
) -> tuple[Manifest, str]:
    """Return the manifest with one more adapter and its unique name; replaced parameters drop the fingerprint."""
    count, free = 1, name
    while free in manifest.adapters:
        count += 1
        free = f"{name}_{count}"
    config = json.loads(adapter.config.changed(inference_mode=True).to_json())
    changed = replace(
        manifest,
        adapters={**manifest.adapters, free: AdapterEntry(config, sha256, base.to_dict(), rounded_again=True)},
        base_fingerprint=None if adapter.copies else manifest.base_fingerprint,
        verification=None,
        quality=None,
    )
    return changed, free
