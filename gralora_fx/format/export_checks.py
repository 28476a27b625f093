"""Compares an export directory with its manifest: its files, and the packages that run it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from packaging.version import InvalidVersion, Version

from gralora_fx.base.sources.model_files import read_json_object
from gralora_fx.errors import ExportError, GraloraError, ServingError
from gralora_fx.format.adapter_paths import own_adapters, record_path
from gralora_fx.format.export_directory import ADAPTERS, DATA_SUFFIX, DECODER, ENCODER, MANIFEST_NAME, MODEL, ROWS
from gralora_fx.format.manifest import FileEntry, Manifest

# files that serving or a tokenizer reads when they are there, by the names that libraries look for
_READ = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "*.onnx", "*.onnx_data", "vocab.txt", "merges.txt")


def check_files(
    directory: str | Path, manifest: Manifest, *, digests: bool, error: type[GraloraError] = ExportError
) -> int:
    """Compare an export's files with its manifest; others are allowed, but with `digests` none that would be read."""
    folder = Path(directory)
    files = manifest.files
    if files is None:
        if digests:
            raise error(f"{folder / MANIFEST_NAME} has no digests of its files; export the model again to get them")
        return 0
    problems = [problem for name, entry in files.items() for problem in _differences(folder, name, entry, digests)]
    if digests:
        problems += [f"{name} is not in the manifest, but would be read" for name in _unnamed(folder, files)]
        problems += _exchanged_adapters(folder, error)
    if problems:
        raise error(f"{folder} is not what was exported: {'; '.join(problems)}. Copy the directory or export it again")
    return len(files)


def _differences(folder: Path, name: str, entry: FileEntry, digests: bool) -> Iterator[str]:
    path = folder / name
    try:
        size = path.stat().st_size
        if not path.is_file():
            yield f"{name} is not a file"
        elif size != entry.size:
            yield f"{name} has {size:,} bytes instead of {entry.size:,}"
        elif digests and _has_other_digest(path, entry):
            yield f"{name} has another SHA-256 than the manifest says"
    except FileNotFoundError:
        yield f"{name} is missing"
    except (OSError, ValueError) as failure:
        yield f"{name} cannot be read ({failure})"


def _exchanged_adapters(folder: Path, error: type[GraloraError]) -> Iterator[str]:
    """Yield the adapters whose files are another's; they are not in the manifest, as they come and go."""
    for name, path in own_adapters(folder, error).items():
        record = read_json_object(record_path(path), error)
        if record.get("name") != name:
            yield f"{ADAPTERS}/{path.name} is the adapter {record.get('name')!r:.80}"
        elif _has_other_digest(path, FileEntry(0, str(record.get("file_sha256")))):
            yield f"{ADAPTERS}/{path.name} has another SHA-256 than its record says"


def _has_other_digest(path: Path, entry: FileEntry) -> bool:
    from gralora_fx.format.manifest import digest_of  # a check of sizes needs none

    return digest_of(path) != entry.sha256


def _unnamed(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    from gralora_fx.format.manifest import file_names

    return [
        name
        for name in file_names(folder)
        if name not in files and any(fnmatch.fnmatch(PurePosixPath(name).name.lower(), pattern) for pattern in _READ)
    ]


def check_requirements(directory: Path, manifest: Manifest) -> None:
    """Check that the packages that an export requires are installed."""
    for package, oldest in (manifest.requires or {}).items():
        found = _version(package)
        try:
            is_enough = found is not None and Version(found) >= Version(oldest)
        except (InvalidVersion, TypeError) as failure:
            raise ServingError(
                f"{directory} requires {package} {oldest!r}, which is not a version; export it again"
            ) from failure
        if not is_enough:
            raise ServingError(
                f"{directory} needs {package} {oldest} or newer, and {found or 'none'} is installed; "
                f"pip install '{package}>={oldest}'"
            )


def _version(package: str) -> str | None:
    if package == "onnxruntime":  # which other distributions bring too
        import onnxruntime  # comparing files needs none

        own: str = onnxruntime.__version__
        return own
    from importlib.metadata import PackageNotFoundError, version  # which takes longer to import than to ask

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def weight_files(manifest: Manifest) -> set[str]:
    """Return names of the files that an export's models may keep weights in; the usual ones if none are listed."""
    if manifest.files is None:
        return {f"{name}{DATA_SUFFIX}" for name in (MODEL, ROWS, ENCODER, DECODER)}
    return {name for name in manifest.files if name.endswith(DATA_SUFFIX)}
