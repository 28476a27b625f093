"""What an export is compared as: as it is, or, where it takes adapters as data, without one and with each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.verify.cases import PromptBatch
from gralora_fx.exporters.verify.mixed_rows import AdaptersAsTaken, MixedRows, RowSteps
from gralora_fx.exporters.verify.reference_models import reference_model
from gralora_fx.format.export_directory import PAST_SEQLENS
from gralora_fx.format.manifest import Manifest

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Variant:
    """An export and the model in one state of its adapters.

    Attributes:
        session: The export's session in that state.
        rows: What runs its graph whose rows have adapters, and those of a decoder lengths, of their own: of a decoder
            what makes the `RowSteps` of prompts, else a session; None where that is not compared.
        model: The model that was exported.
        manifest: The export's manifest.
        directory: The export directory.
        name: The adapter; None for the base, or for an export whose adapters are folded.
        tensors: The adapter's tensors in the export, by name; empty without one.
        rounded: Gives the model with the export's rounded weights, of adapters as data the base; one for all states.
    """

    session: Any
    rows: Any
    model: TracedModel | GraloraModel
    manifest: Manifest
    directory: Path
    name: str | None
    tensors: Arrays
    rounded: Callable[[], TracedModel | GraloraModel]

    def active(self) -> AbstractContextManager[None]:
        """The model in that state within a block."""
        if self.manifest.adapter_inputs is None or not isinstance(self.model, GraloraModel):
            return nullcontext()
        return self.model.disable_adapter() if self.name is None else _only(self.model, self.name)

    @cached_property
    def reference(self) -> TracedModel | GraloraModel:
        """What the export is compared with: the model, or one with the export's rounded weights."""
        base = self.rounded()
        if self.manifest.adapter_inputs is None or not isinstance(self.model, GraloraModel):
            return base
        if base is self.model.traced:
            return self.model
        assert isinstance(base, TracedModel)
        from gralora_fx.exporters.verify.adapters_as_data import with_folded

        return with_folded(base, self.tensors, self.manifest.adapter_inputs)


def variants(
    session: Any,
    model: TracedModel | GraloraModel,
    manifest: Manifest,
    directory: Path,
    adapter_name: str | None = None,
    rows: Any = None,
) -> Iterator[Variant]:
    """The states in which an export is compared: one for folded adapters, else the base and each active adapter."""
    inputs = manifest.adapter_inputs
    if adapter_name is not None:
        from gralora_fx.exporters.verify.adapters_as_data import check_named

        check_named(adapter_name, model, inputs, directory)
    taken = None if rows is None else AdaptersAsTaken(directory, manifest, rows)
    compared = model if inputs is None or not isinstance(model, GraloraModel) else model.traced
    rounded = cache(partial(reference_model, compared, manifest, directory))
    if inputs is None:
        yield Variant(session, _rows_with(rows, taken, None, ()), model, manifest, directory, None, {}, rounded)
        return
    from gralora_fx.exporters.artifact.base_parameters import BaseParameters
    from gralora_fx.exporters.verify.adapters_as_data import session_with, tensors_of

    names = model.active_adapters if isinstance(model, GraloraModel) else []
    there = {name: adapter_name or name for name in names}
    base = BaseParameters(directory, manifest)
    adapters = {name: tensors_of(name, exported, model, base) for name, exported in there.items()}
    for name in (None, *names):
        tensors: Arrays = {} if name is None else adapters[name]
        by_row = _rows_with(rows, taken, None if name is None else there[name], list(there.values()))
        own = session_with(session, inputs, tensors)
        yield Variant(own, by_row, model, manifest, directory, name, tensors, rounded)


def _rows_with(
    session: Any, adapters: AdaptersAsTaken | None, name: str | None, names: Sequence[str]
) -> Callable[[PromptBatch], RowSteps] | MixedRows | None:
    """What runs `model_rows.onnx` with an adapter or none, beside rows with the others of some."""
    if adapters is None:
        return None
    if any(value.name == PAST_SEQLENS for value in session.get_inputs()):
        others = [other for other in (None, *names) if other != name] or [name]
        return partial(RowSteps, session, adapters, name, others)
    return MixedRows(session, adapters, name, names)


@contextmanager
def _only(model: GraloraModel, name: str) -> Iterator[None]:
    """One adapter alone active within a block."""
    before = model.active_adapters
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)
