"""Whether a model can be compared with an export: that it runs, and that it is the one that was exported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gralora_fx.errors import ExportError
from gralora_fx.exporters.artifact.fingerprint import fingerprint_of
from gralora_fx.exporters.artifact.manifest import describe_adapters
from gralora_fx.exporters.conversion import base_trace
from gralora_fx.exporters.verification.manifest_adapters import check_active_adapters
from gralora_fx.exporters.verification.tensor_names import flat
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.model.merge import merge_lazily
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.tracing.traced_model import CALL_TRACE, TracedModel


def check_runnable(model: TracedModel | GraloraModel) -> None:
    """Check that a model is a traced or rewritten one whose weights are in memory.

    Raises:
        ExportError: It is not.
    """
    if not isinstance(model, (TracedModel, GraloraModel)):
        raise ExportError(f"cannot run a {type(model).__name__}; {CALL_TRACE} and give what it or rewrite() returned")
    traced = base_trace(model)
    missing = next((name for name, parameter in traced.tree.parameters.items() if parameter.is_meta), None)
    if missing is not None:
        raise ExportError(
            f"{missing} has no values in memory, so there is nothing to compare with; export a streamed model with "
            "verify=False, and compare the export with the model loaded whole (verify_onnx)"
        )


def check_same_model(output_dir: str | Path, manifest: Manifest, model: TracedModel | GraloraModel) -> None:
    """Check that an export is compared with its own model: of another, every difference would look like a fault.

    Args:
        output_dir: The export directory.
        manifest: Its manifest.
        model: The model to compare it with.

    Raises:
        ExportError: The model is of another base, or other adapters are active.
    """
    expected, found = manifest.base_fingerprint, fingerprint_of(model)
    if expected not in (None, found) and not _is_merged(model, manifest):
        if all(isinstance(shape, list) for shape in manifest.inputs.values()):  # of a single file
            check_inputs(manifest.inputs, base_trace(model).example_inputs)
        raise ExportError(
            f"{output_dir} was exported from another base: its weights have fingerprint {str(expected)[:12]}, those of "
            f"the given model {found[:12]}; give the base that was exported, with its adapters active rather than "
            "folded"
        )
    if manifest.adapter_inputs is None:
        check_active_adapters(manifest, str(output_dir), model)


def _is_merged(model: TracedModel | GraloraModel, manifest: Manifest) -> bool:
    """Whether an export's fingerprint is that of the model with active adapters folded, as after an export of a merge.

    Others may have been folded into that export afterwards, which leaves the fingerprint as it is: those that count are
    the first ones of the manifest.
    """
    if not isinstance(model, GraloraModel):
        return False
    order = [entry.sha256 for entry in manifest.adapters.values()]
    digests = {name: entry.sha256 for name, entry in describe_adapters(model).items()}
    names = sorted(
        (name for name in model.active_adapters if digests.get(name) in order),
        key=lambda name: order.index(digests[name]),
    )
    return any(
        fingerprint_of(merge_lazily(model, names[:count])) == manifest.base_fingerprint
        for count in range(len(names), 0, -1)
    )


def check_inputs(names: Iterable[str], case: Mapping[str, Any]) -> None:
    """Check that a model takes every input of an export.

    Args:
        names: The inputs of the export.
        case: Inputs of the model by name.

    Raises:
        ExportError: It does not; the message names those that are missing.
    """
    given = flat(case)
    missing = [name for name in names if name not in given]
    if missing:
        raise ExportError(f"the export takes {', '.join(missing)}, which the model does not; give the model it is of")
