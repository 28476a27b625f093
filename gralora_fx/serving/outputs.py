"""The outputs of a served model: arrays by name and by index."""

from __future__ import annotations

from typing import Any


class Outputs(dict[str, Any]):
    """Output arrays, accessible as in transformers' `ModelOutput`: `outputs["logits"]`, `outputs.logits`, `outputs[0]`.

    Iteration yields names, as for every dict; use `outputs.to_tuple()` or `outputs[:]` for unpacking.
    """

    def __getitem__(self, key: Any) -> Any:
        """The output with a name or at an index, or a tuple for a slice.

        Raises:
            KeyError: No output has the name.
            IndexError: The index is out of range.
        """
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        """The output called `name`."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}") from None

    def to_tuple(self) -> tuple[Any, ...]:
        """The outputs in the order of the graph."""
        return tuple(self.values())
