"""The names of models: the base's, and those of the adapters that are loaded now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gralora_fx.errors import ServingError, listed, shown
from gralora_fx.serving.adapter_versions import AdapterVersions


class UnknownModelError(ServingError):
    """A request names a model that is not served."""


@dataclass(frozen=True)
class ModelNames:
    """The models that requests may name.

    Attributes:
        base: The model without an adapter.
        versions: The adapters, which come and go.
    """

    base: str
    versions: AdapterVersions

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that are loaded now."""
        return self.versions.names

    def adapter(self, model: str) -> str | None:
        """The key of the adapter that a model's name means now; None for the base. `held` keeps it for a while.

        Raises:
            UnknownModelError: There is no such model.
        """
        with self.held(model) as key:
            return key

    @contextmanager
    def held(self, model: str) -> Iterator[str | None]:
        """Hold the adapter that a model's name means, and give its key; None for the base.

        A queue holds it for the requests that it takes, so this is to last until they are queued.

        Raises:
            UnknownModelError: There is no such model.
        """
        if model == self.base:
            yield None
            return
        adapters = self.adapters
        if model not in adapters:
            raise UnknownModelError(f"no model {shown(model)}; there is {listed((self.base, *adapters))}")
        with self.versions.held(model) as key:
            yield key
