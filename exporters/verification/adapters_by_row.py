"""A graph without a cache whose rows have an adapter each, compared with the model."""

from __future__ import annotations

import dataclasses

from gralora_fx.exporters.verification.cases import TokenResult, TokenRun, Verification
from gralora_fx.exporters.verification.outputs import OutputComparison
from gralora_fx.exporters.verification.plain_inputs import drop_padding, plain_inputs
from gralora_fx.runtime.export_directory import ROWS_NAME


def compare_rows(run: TokenRun) -> TokenResult:
    """The outputs of `model_rows.onnx`, where there is one, on the inputs that were compared of `model.onnx`.

    Raises:
        ExportError: It cannot run, or its outputs are not made of rows.
    """
    if run.rows is None:
        return TokenResult()
    of_kind = Verification(plain_inputs, drop_padding)
    tensors, passed = OutputComparison(run.rows, run.model, of_kind, "all", run.tolerance_check).run(run.cases)
    named = (dataclasses.replace(tensor, name=f"{ROWS_NAME}: {tensor.name}") for tensor in tensors)
    return TokenResult(passed, tensors=tuple(named))
