"""`verify_onnx`: an export held against the PyTorch model on fresh inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from gralora_fx.errors import ExportError
from gralora_fx.exporters.cases import attended, flat, fresh_cases, last_logits
from gralora_fx.exporters.folding import as_traced
from gralora_fx.exporters.manifest import read_manifest
from gralora_fx.exporters.precision import precision_of
from gralora_fx.exporters.quantization import Quantization
from gralora_fx.exporters.reports import TensorCheck, VerifyReport
from gralora_fx.exporters.rounding import rounded
from gralora_fx.exporters.session import MODEL_NAME, check_external_data, open_session
from gralora_fx.exporters.tolerance import describe_weights, tolerance_of
from gralora_fx.exporters.twin import write_float32_twin
from gralora_fx.model import GraloraModel
from gralora_fx.tracing.cached import PAST
from gralora_fx.tracing.traced import TracedModel


def verify_onnx(
    output_dir: str | Path,
    model: TracedModel | GraloraModel,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> VerifyReport:
    """Compare an export with the model on inputs that neither has seen: other sizes, padded rows, a single row.

    Args:
        output_dir: The export directory.
        model: The model it was exported from; a `GraloraModel` runs with its active adapters as they stand, so that a
            wrong fold would show.
        inputs: A user's own inputs, compared in addition.
        tolerance: Largest difference allowed, relative to the largest value or to 1 where that is smaller; None for
            the one of the export's precision (see `tolerance`).
        seed: Seed of the fresh inputs.

    Returns:
        Differences and argmax agreement for every output. A bfloat16 export, which ONNX Runtime's CPU provider cannot
        run, is run with its own weights and float32 arithmetic, and so is a quantized one. They are held against the
        model with the same rounded weights: what the rounding itself costs is for a task to say.

    Raises:
        ExportError: The directory is no export, its inputs or outputs are not the model's, or a case cannot run.
    """
    manifest = read_manifest(output_dir)
    last_only = manifest.get("logits") == "last"
    if not isinstance(model, (TracedModel, GraloraModel)):
        raise ExportError(f"cannot run a {type(model).__name__}; give a TracedModel or GraloraModel")
    refuse_without_values(model)
    session, arithmetic = _session(Path(output_dir), manifest)
    tolerance = tolerance_of(manifest) if tolerance is None else tolerance
    names = [value.name for value in session.get_inputs()]
    traced = model.traced if isinstance(model, GraloraModel) else model
    cases = list(fresh_cases(traced, seed))
    if inputs is not None:
        cases.append(("given inputs", dict(inputs)))
    was_training = model.training
    model = _reference(model, manifest)
    model.eval()
    differences: dict[str, list[tuple[float, float, float | None]]] = {}
    passed = True
    try:
        for description, case in cases:
            for name, expected, actual in _compare(session, names, model, case, description, last_only):
                absolute, relative, agreement = _difference(name, expected, actual)
                differences.setdefault(name, []).append((absolute, relative, agreement))
                largest = float(expected.abs().max()) if expected.numel() else 0.0
                passed &= absolute <= tolerance * max(1.0, largest)
    finally:
        model.train(was_training)
    tensors = tuple(_summary(name, found) for name, found in differences.items())
    described = tuple(description for description, _ in cases)
    return VerifyReport(passed, tolerance, described, tensors, describe_weights(manifest), arithmetic)


def refuse_without_values(model: TracedModel | GraloraModel) -> None:
    """Refuse to run a model whose weights stand in their files.

    Raises:
        ExportError: Some do.
    """
    traced = model.traced if isinstance(model, GraloraModel) else model
    missing = next((name for name, parameter in traced.tree.parameters.items() if parameter.is_meta), None)
    if missing is not None:
        raise ExportError(
            f"{missing} has no values in memory, so there is nothing to compare with; export a streamed model with "
            "verify=False, and compare the export with the model loaded whole (gralora-fx verify)"
        )


def _session(directory: Path, manifest: Mapping[str, Any]) -> tuple[Any, str]:
    """A session over an export, or over its float32 twin (see `twin`), and what it computes in."""
    precision = str(manifest.get("precision", "fp32"))
    if precision != "bf16" and not manifest.get("quantization"):
        return open_session(directory), precision
    check_external_data(directory / MODEL_NAME)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.absolute().parent) as twin:
        write_float32_twin(directory, Path(twin))
        return open_session(twin), "fp16" if precision == "fp16" else "fp32"


def _reference(model: TracedModel | GraloraModel, manifest: Mapping[str, Any]) -> TracedModel | GraloraModel:
    """The model itself; for an export of another precision the adapter-free one with the same rounded weights."""
    precision, found = str(manifest.get("precision", "fp32")), manifest.get("quantization")
    traced = model.traced if isinstance(model, GraloraModel) else model
    if found is None and {precision, precision_of(traced.graph_module)} == {"fp32"}:
        return model
    how = None if found is None else Quantization(found["kind"], found["block_size"], found["accuracy_level"])
    known = sum({id(site.weight): site.weight.numel() for site in traced.sites}.values())
    if found is not None and found["values"] != known:
        raise ExportError(
            f"the export holds {found['values']:,} quantized values and the model's linear layers {known:,}, so there "
            "is no model with the same rounded weights to compare it with; export with verify=False and judge it by "
            "what it is for"
        )
    return rounded(as_traced(model), precision, how, with_tables=found is not None and found["lookups"] > 0)


def _compare(
    session: Any,
    names: list[str],
    model: TracedModel | GraloraModel,
    case: Mapping[str, Any],
    description: str,
    last_only: bool,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    feed = flat(case)
    missing = [name for name in names if name not in feed]
    if missing:
        raise ExportError(f"the export takes {', '.join(missing)}, which the model does not; give the model it is of")
    try:
        with torch.no_grad():
            expected = named_outputs(model(**case))
        if last_only:
            expected["logits"] = last_logits(expected["logits"], feed["attention_mask"])
    except Exception as error:  # a model raises what it likes
        raise ExportError(f"the model itself fails on {description}: {str(error).splitlines()[0]}") from error
    try:
        actual = session.run(None, _as_taken(session, feed))
    except Exception as error:  # ONNX Runtime raises types of its own
        raise ExportError(f"ONNX Runtime fails on {description}: {str(error).splitlines()[0]}") from error
    outputs = zip(session.get_outputs(), actual, strict=True)
    found = {value.name: torch.from_numpy(np.asarray(array)) for value, array in outputs}
    if len(expected) != len(found):
        raise ExportError(f"the export gives {', '.join(found)}, the model {', '.join(expected)}; export it again")
    if set(expected) != set(found):
        expected = dict(zip(found, expected.values(), strict=True))
    kept_expected, kept_actual = attended(expected, case), attended(found, case)
    for name, value in kept_expected.items():
        if value.shape != kept_actual[name].shape:
            raise ExportError(
                f"{name} has shape {list(kept_actual[name].shape)} in the export and {list(value.shape)} in the model"
                f" on {description}; it is an export of another model"
            )
        yield name, value.float(), kept_actual[name].float()


def _as_taken(session: Any, feed: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs as arrays of the precision that a graph takes."""
    floats = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
    taken = {}
    for value in session.get_inputs():
        tensor, dtype = feed[value.name], floats.get(value.type)
        taken[value.name] = (tensor if dtype is None else tensor.to(dtype)).numpy()
    return taken


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """The tensors of a model's return value by name, nested ones by their path."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, Mapping) and isinstance(outputs.get(PAST), DynamicCache):
        return flat(outputs)
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    found: dict[str, Tensor] = {}
    for key, value in items:
        if isinstance(value, Tensor):
            found[str(key)] = value
        elif isinstance(value, (Mapping, tuple, list)):
            found |= {f"{key}.{name}": tensor for name, tensor in named_outputs(value).items()}
    return found


def _difference(name: str, expected: Tensor, actual: Tensor) -> tuple[float, float, float | None]:
    if not expected.numel():
        return 0.0, 0.0, None
    both_missing = expected.isnan() & actual.isnan()
    gap = (expected - actual).abs().masked_fill(both_missing, 0.0)
    absolute = float(gap.max()) if bool(torch.isfinite(gap).all()) else float("inf")
    largest = float(expected.nan_to_num().abs().max())
    agreement = None
    if "logits" in name:
        agreement = float((expected.argmax(-1) == actual.argmax(-1)).float().mean())
    return absolute, absolute / largest if largest else absolute, agreement


def _summary(name: str, found: list[tuple[float, float, float | None]]) -> TensorCheck:
    agreements = [agreement for _, _, agreement in found if agreement is not None]
    return TensorCheck(
        name=name,
        max_abs_error=max(absolute for absolute, _, _ in found),
        max_rel_error=max(relative for _, relative, _ in found),
        argmax_agreement=min(agreements) if agreements else None,
    )
