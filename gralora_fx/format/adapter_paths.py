"""Names and paths of adapter files, in an export and from a user; a light import, for options."""

from __future__ import annotations

import re
from pathlib import Path

from gralora_fx.base.sources.model_files import shown_path, usable_path
from gralora_fx.errors import ExportError, GraloraError, ServingError, option, shown
from gralora_fx.format.adapter_inputs import AdapterInputs
from gralora_fx.format.export_directory import ADAPTERS, DECODER_KIND, check_own_file
from gralora_fx.format.manifest import Manifest

SUFFIX = ".onnx_adapter"
PICKLED, _PICKLES = "adapter_model.bin", {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_name(name: object) -> bool:
    """Return whether a value can be an adapter's name, which is also a file's."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: object, error: type[GraloraError] = ExportError, *, of: str = "an adapter") -> str:
    """Check the name of an adapter, or of something else, which is also a file's, and return it."""
    if not is_name(name):
        raise error(
            f"{shown(name)} is not a name for {of}: take letters, digits, dots, dashes and underscores, at most "
            "128, beginning with a letter or a digit"
        )
    return str(name)


def record_path(path: Path) -> Path:
    """Return the path of an adapter file's record."""
    return path.with_suffix(".json")


def check_takes_adapters(
    manifest: Manifest,
    name: object,
    error: type[GraloraError],
    *,
    remedy: str = f"export the model with {option(adapters='data')}",
) -> AdapterInputs:
    """Return the adapter inputs of an export; raise if it takes no adapters as data."""
    if manifest.adapter_inputs is None:
        merged = f" and has {', '.join(manifest.adapters)} merged into its weights" if manifest.adapters else ""
        raise error(f"{name} takes no adapters: it was exported with {option(adapters='merged')}{merged}; {remedy}")
    return manifest.adapter_inputs


def check_can_act(tokens: tuple[int, ...], adapter: object, kind: str, *, has_copies: bool) -> None:
    """Check that an export takes adapters that tokens activate: it has a cache, they train no parameter whole."""
    if tokens and kind != DECODER_KIND:
        raise ExportError(
            f"{adapter} is activated by tokens, which needs a decoder with a cache; export the model for "
            f"{option(task='text-generation-with-past')}"
        )
    if tokens and has_copies:
        raise ExportError(
            f"{adapter} is activated by tokens, and trains parameters of the base whole (modules_to_save or bias), "
            "which act on every token; train it without these"
        )


def own_adapters(directory: Path, error: type[GraloraError]) -> dict[str, Path]:
    """Return the adapter files in an export's directory, by name."""
    folder = directory / ADAPTERS
    if folder.is_symlink():
        raise error(f"{folder} is a link; copy the directory itself into the export directory")
    found = {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"*{SUFFIX}"))}
    for path in found.values():
        check_own_file(path, error)
        check_own_file(record_path(path), error)
    return found


def adapter_path(value: object) -> Path:
    """Return the path of a user's adapter, after checking it: an `.onnx_adapter` file, or a directory from PEFT."""
    remedy = f"give an {SUFFIX} file or a directory that PEFT saved"
    path = usable_path(value, ServingError, remedy=remedy)
    if not path.exists():
        raise ServingError(f"there is no adapter at {shown_path(path)}; {remedy}")
    check_adapter_kind(path, path.is_dir(), shown_path(path))
    return path


def pickled(name: str) -> ServingError:
    """Return the error for an adapter that is a pickle, or a directory that holds one."""
    return ServingError(f"{name} is pickled; only safetensors is read: save it again, with PEFT's save_pretrained")


def check_adapter_kind(path: Path, is_directory: bool, name: str) -> None:
    """Check that a path is a directory, or has the name of an adapter file."""
    if not is_directory and path.suffix in _PICKLES:
        raise pickled(name)
    if not is_directory and path.suffix != SUFFIX:
        raise ServingError(f"{name} is neither an {SUFFIX} file nor a directory that PEFT saved an adapter to")
