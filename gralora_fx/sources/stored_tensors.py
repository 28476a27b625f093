"""The tensors of a saved model in its safetensors files, by key; values are read one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gralora_fx.errors import CheckpointError
from gralora_fx.sources.safetensors_layout import FLOATS, opened_for_reading, read_layout, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; calling it reads it. The file is open only while it is read."""

    file: Path
    key: str

    def __call__(self) -> Tensor:
        """The values, mapped from the file.

        Raises:
            CheckpointError: The file cannot be read.
        """
        with _opened(self.file, "pt") as file:
            tensor: Tensor = file.get_tensor(self.key)
        return tensor

    def array(self) -> NDArray[Any]:
        """The values as a numpy array, read from the file; of bfloat16 too.

        Raises:
            CheckpointError: The file cannot be read, or holds values of another kind than floats.
        """
        extent = read_layout(self.file).tensors[self.key]
        if extent.dtype not in FLOATS:
            raise CheckpointError(f"{self.key} of {self.file} is {extent.dtype}, not a float tensor; save it as floats")
        with opened_for_reading(self.file) as handle:
            return read_tensor(handle, extent)

    def facts(self) -> tuple[list[int], str]:
        """Shape and dtype from the file's header."""
        with _opened(self.file) as file:
            part = file.get_slice(self.key)
            return list(part.get_shape()), str(part.get_dtype())


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a saved model by their keys, from a single file or several with an index.

    Raises:
        CheckpointError: There are none, the index is damaged, or it names a file outside the directory.
    """
    file, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if file.is_file():  # which transformers prefers too
        with _opened(file) as opened:
            return {key: StoredTensor(file, key) for key in opened.keys()}  # noqa: SIM118  # it is not a mapping
    if not index.is_file():
        raise CheckpointError(
            f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; "
            "save the model with transformers, as safetensors"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {key: directory / name for key, name in weight_map.items() if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}); copy or save the model again") from error
    if len(files) != len(weight_map):
        outside = sorted({str(name) for name in weight_map.values() if Path(name).name != name})
        raise CheckpointError(
            f"{index} names {', '.join(outside)}, outside its directory; do not trust it, or save it again"
        )
    return {key: StoredTensor(file, key) for key, file in files.items()}


def check_readable(directory: Path) -> None:
    """Check that the safetensors files of a directory have readable headers and are complete.

    Raises:
        CheckpointError: A file does not; it is named.
    """
    for file in sorted(directory.glob("*.safetensors")):
        with _opened(file):
            pass


@contextmanager
def _opened(file: Path, framework: str = "np") -> Iterator[Any]:
    try:
        with safe_open(file, framework=framework) as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); copy or save the model again") from error
