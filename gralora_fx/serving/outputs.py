"""What a served model returns: arrays by name."""

from __future__ import annotations

from typing import Any


class Outputs(dict[str, Any]):
    """Output arrays by name, as items and as attributes: `outputs["logits"]` and `outputs.logits`."""

    def __getattr__(self, name: str) -> Any:
        """The output called `name`."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}") from None
