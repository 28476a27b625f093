"""What a served model returns: arrays by name and by place."""

from __future__ import annotations

from typing import Any


class Outputs(dict[str, Any]):
    """Output arrays as transformers' `ModelOutput` gives them: `outputs["logits"]`, `outputs.logits`, `outputs[0]`.

    To go through it gives names, as of every dict; `outputs.to_tuple()` and `outputs[:]` are for unpacking.
    """

    def __getitem__(self, key: Any) -> Any:
        """The output of a name or a place, or a tuple for a slice of places.

        Raises:
            KeyError: No output has the name.
            IndexError: There is no such place.
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
