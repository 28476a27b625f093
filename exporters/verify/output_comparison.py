"""Outputs of an export compared with the model's on the same inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from gralora_fx.base.progress.stages import counted
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.input_trees import own_inputs
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.verify.cases import Case, TokenResult, TokenRun
from gralora_fx.exporters.verify.compared_tensors import (
    flat,
    largest_gap,
    largest_value,
    last_logits,
    named_outputs,
    without_padding,
)
from gralora_fx.exporters.verify.tolerances import Float64Model, ToleranceCheck
from gralora_fx.exporters.verify_report import TensorCheck
from gralora_fx.format.export_directory import ROWS_NAME
from gralora_fx.run.sessions.ort_values import as_tensor, image_arguments, run_values
from gralora_fx.run.sessions.session_views import transposed_states


@dataclass(frozen=True)
class OutputComparison:
    """An export and the model that it is compared with.

    Attributes:
        session: The export.
        model: The model, in evaluation mode.
        logits: Which positions' logits the export gives: `"last"` or `"all"`.
    """

    session: Any
    model: TracedModel | GraloraModel
    logits: str

    def run(self, cases: Sequence[Case], tolerance_check: ToleranceCheck) -> tuple[list[TensorCheck], bool]:
        """Compare every output on inputs: how each differs at most, and whether all are close enough everywhere."""
        differences: dict[str, list[tuple[float, float, float | None]]] = {}
        passed = True
        for description, case in counted(cases, "comparing outputs", "inputs"):
            expected, actual = (without_padding(outputs, case) for outputs in self.both(case, description))
            in_float64 = cache(partial(self._counted, case))  # by model: each runs once
            for index, (name, value) in enumerate(expected.items()):
                if value.shape != actual[name].shape:
                    ours, models = list(actual[name].shape), list(value.shape)
                    raise ExportError(
                        f"{name} has shape {ours} in the export and {models} in the model on {description}; it is an "
                        "export of another model"
                    )
                pair = value.float(), actual[name].float()
                differences.setdefault(name, []).append(_difference(name, *pair))
                passed &= tolerance_check.accepts(f"{description}, {name}", *pair, partial(_output, in_float64, index))
        return [_summary(name, values) for name, values in differences.items()], passed

    def both(self, case: Mapping[str, Any], description: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All outputs of the model and of the export, by the export's names, padding included."""
        values, names = flat(case), [value.name for value in self.session.get_inputs()]
        names += [value.name for value in image_arguments(self.session)]
        try:
            with torch.no_grad():
                expected = self._outputs(self.model, case)
        except Exception as error:  # a model raises what it likes
            raise ExportError(f"the model itself fails on {description}: {first_line(error)}") from error
        missing = [name for name in names if name not in values]
        if missing:
            raise ExportError(f"{description} lack {', '.join(missing)}, which the export takes; give every input")
        swapped = transposed_states(self.session)
        feed = {name: values[name].mT if name in swapped else values[name] for name in names}
        results = {name: as_tensor(value) for name, value in run_values(self.session, feed, description).items()}
        actual = {name: value.mT if name in swapped else value for name, value in results.items()}
        if len(expected) != len(actual):
            raise ExportError(f"the export gives {', '.join(actual)}, the model {', '.join(expected)}; export it again")
        if set(expected) != set(actual):
            expected = dict(zip(actual, expected.values(), strict=True))
        return expected, actual

    def _outputs(self, model: Callable[..., Any], case: Mapping[str, Any]) -> dict[str, Tensor]:
        """A model's outputs by name, with the logits that the export returns."""
        outputs = named_outputs(model(**own_inputs(case)))
        if self.logits == "last":
            outputs["logits"] = last_logits(outputs["logits"], flat(case)["attention_mask"])
        return outputs

    def _counted(self, case: Mapping[str, Any], model: Float64Model) -> list[Tensor]:
        """A float64 model's outputs in their order, without padding."""
        return list(without_padding(self._outputs(model, case), case).values())


def compare_rows(run: TokenRun) -> TokenResult:
    """The outputs of `model_rows.onnx`, where there is one, on the inputs that were compared of `model.onnx`."""
    if run.rows is None:
        return TokenResult()
    tensors, passed = OutputComparison(run.rows, run.model, "all").run(run.cases, run.tolerance_check)
    named = (dataclasses.replace(tensor, name=f"{ROWS_NAME}: {tensor.name}") for tensor in tensors)
    return TokenResult(passed, tensors=tuple(named))


def _output(run: Callable[[Float64Model], list[Tensor]], index: int, model: Float64Model) -> Tensor:
    return run(model)[index]


def _difference(name: str, expected: Tensor, actual: Tensor) -> tuple[float, float, float | None]:
    absolute, largest = largest_gap(expected, actual), largest_value(expected)
    agreement = None
    if "logits" in name and expected.numel():
        agreement = float((expected.argmax(-1) == actual.argmax(-1)).float().mean())
    return absolute, absolute / largest if largest else absolute, agreement


def _summary(name: str, differences: list[tuple[float, float, float | None]]) -> TensorCheck:
    agreements = [agreement for _, _, agreement in differences if agreement is not None]
    return TensorCheck(
        name=name,
        max_abs_error=max(absolute for absolute, _, _ in differences),
        max_rel_error=max(relative for _, relative, _ in differences),
        argmax_agreement=min(agreements) if agreements else None,
    )
