"""The adapters that a batched export's rows choose among, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gralora_fx.errors import ServingError, listed, shown
from gralora_fx.runtime.adapter_inputs import ADAPTER_IDS, BATCHED
from gralora_fx.runtime.adapter_stack import AdapterStack, Stack, row_ids
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.serving.adapter_folder import adapter_path, own_adapters


class RowAdapters(Mapping[str, int]):
    """The ids of a batched export's adapters, by name; any thread may load and unload some while others run.

    Those in the export's own directory are loaded when they are first asked for.
    """

    def __init__(self, directory: Path, manifest: Manifest, max_rank: int | None = None) -> None:
        """Start with none loaded.

        Args:
            directory: The export directory.
            manifest: Its manifest.
            max_rank: The largest rank that an adapter may have; None for no limit.

        Raises:
            ServingError: It is not a batched export.
        """
        inputs = manifest.adapter_inputs
        if inputs is None or inputs.mode != BATCHED:
            raise ServingError(
                f"{directory} was exported with adapters={manifest.adapters_mode!r}, whose rows have no adapter each; "
                "export the model with adapters='batched'"
            )
        self._directory = directory
        self._stack = AdapterStack(inputs, manifest.base_fingerprint, max_rank)

    def __getitem__(self, name: str) -> int:
        """The id of an adapter that is loaded, or that the export's own directory holds.

        Raises:
            ServingError: There is none of the name, or its file may not be used.
        """
        if not isinstance(name, str):
            raise ServingError(f"{shown(name)} is not the name of an adapter; give a text, or None for the base")
        if name in self._stack.names:
            return self._stack.id_of(name)
        path = own_adapters(self._directory).get(name)
        if path is None:
            names = listed(map(repr, self.available())) or "none"
            raise ServingError(f"no adapter {shown(name)}; there is {names}: load it with load_adapter")
        return self._stack.load_adapter(name, path, exist_ok=True)

    def __iter__(self) -> Iterator[str]:
        """Names of the adapters that are loaded."""
        return iter(self._stack.names)

    def __len__(self) -> int:
        """How many are loaded."""
        return len(self._stack.names)

    def available(self) -> list[str]:
        """Names of the adapters that are loaded, and of those that the export's own directory holds."""
        return sorted({*self, *own_adapters(self._directory)})

    def load(self, name: str, path: str | Path) -> int:
        """Load an adapter file, checked against its record and the export; its id.

        Args:
            name: The name to give it.
            path: The `.onnx_adapter` file.

        Raises:
            ServingError: The name is taken or invalid, or the file may not be used; the message says why.
        """
        return self._stack.load_adapter(name, adapter_path(path))

    def unload(self, name: str) -> None:
        """Forget an adapter; the ids of others stay, and calls that run with it end undisturbed.

        Raises:
            ServingError: It is not loaded.
        """
        self._stack.unload_adapter(name)

    def stack(self, adapter: object) -> Stack:
        """Adapters with all that are asked for, which are loaded.

        Args:
            adapter: A name, None, or a list of them.

        Raises:
            ServingError: There is none of a name, or its file may not be used.
        """
        names: Sequence[Any] = adapter if isinstance(adapter, (list, tuple)) else [adapter]
        needed = {name: self[name] for name in names if name is not None}
        return self._stack.current(needed)


def rows_feed(adapters: RowAdapters, adapter: object, feed: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """What a batched export takes beside a call's own inputs: the adapters, and which of them each row has.

    Args:
        adapters: The adapters.
        adapter: A name or None for all rows, or a list of one for each.
        feed: The call's inputs; the first axis of the first is the batch.

    Raises:
        ServingError: An adapter is not there, or there are not as many names as rows.
    """
    stack = adapters.stack(adapter)
    batch = next(iter(feed.values())).shape[0]
    return {**stack.values, ADAPTER_IDS: row_ids(stack, adapter, batch)}
