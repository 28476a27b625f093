"""A model without a cache: one run a call."""

from __future__ import annotations

from gralora_fx.errors import ServingError
from gralora_fx.runtime.export_directory import PLAIN_KIND
from gralora_fx.serving.flavours.reading import OpenExport, Reading
from gralora_fx.serving.generation import Generation


def _generation(export: OpenExport) -> Generation:
    raise ServingError(
        f"this export (task {export.manifest.task!r}) has no cache, so it cannot generate; "
        "export the model for a task with one, such as text-generation-with-past"
    )


PLAIN = Reading(PLAIN_KIND, lambda is_on_cpu, by_row: by_row, calls_rows=True, generation=_generation)
