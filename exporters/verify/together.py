"""Comparison of a decoder's companion models with the model's: outputs, and tokens of prompts that they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gralora_fx.base.features import parts
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.conversion import base_trace, fold_adapters, is_streamed
from gralora_fx.exporters.translation.export_graphs import precision_of
from gralora_fx.exporters.verify.cases import Case, Verification
from gralora_fx.exporters.verify.comparable import Variant, evaluating, float32_model
from gralora_fx.exporters.verify.outputs import OutputComparison
from gralora_fx.exporters.verify.tolerances import Tally, ToleranceCheck
from gralora_fx.exporters.verify_report import TensorCheck, TokenCheck
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.engine.decoder import Decoder

ToleranceFor = Callable[[TracedModel | GraloraModel], ToleranceCheck]


class StepTally(Protocol):
    """Accumulates comparisons of tokens."""

    cases: list[str]  # descriptions of the prompts

    def add_step(self, index: int, case: str, expected: Tensor, actual: Tensor, in_float64: Any) -> None:
        """Add the logits of a step, `[batch, vocabulary]`."""
        ...


@dataclass(frozen=True)
class TogetherRun:
    """A decoder and its companions, of the model and of the export, in one state of the adapters."""

    models: Mapping[str, TracedModel | GraloraModel]  # the model's companions by file name
    sessions: Mapping[str, Any]  # the export's companions, and other programs' graphs
    model: TracedModel | GraloraModel  # the decoder, as `Variant.reference`
    session: Any  # the session of `model.onnx`
    # opens a decoder over `model_rows.onnx` for a number of rows and tokens per row; None if there is none, or it is
    # not compared
    open_rows: Callable[[int, int], Decoder] | None
    adapter: str | None  # the adapter of the rows; None for the base, or if adapters are folded
    tally: StepTally  # accumulates comparisons
    generator: torch.Generator  # random generator of inputs
    quick: bool  # whether few prompts are enough
    inputs: Sequence[Mapping[str, Tensor]] = ()  # inputs of the companion, one for each prompt; none to draw some


class CompanionCheck(Protocol):
    """A feature's comparison of companions: a part of the point "companion checks"."""

    @staticmethod
    def cases(part: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[Case]:
        """Yield fresh inputs of a companion."""
        ...

    @staticmethod
    def measured(part: TracedModel, tokenizer: Any, seed: int) -> tuple[list[dict[str, Tensor]], str]:
        """Return inputs like those that a companion is used on, and their description."""
        ...

    @staticmethod
    def compare_tokens(run: TogetherRun) -> None:
        """Compare greedy tokens of prompts that companions read partly."""
        ...


@dataclass(frozen=True)
class CompanionResult:
    """Comparison of companions, and of tokens of prompts that they read partly."""

    passed: bool = True
    tensors: tuple[TensorCheck, ...] = ()
    tokens: TokenCheck | None = None


def compare_companions(
    directory: Path,
    manifest: Manifest,
    model: TracedModel | GraloraModel,
    own: Mapping[str, TracedModel | GraloraModel],
    variant: Variant,
    open_rows: Callable[[int, int], Decoder] | None,
    tolerance_for: ToleranceFor,
    *,
    quick: bool,
    seed: int,
) -> CompanionResult:
    """Compare an export's companions with the model's of the same names, in one state of the adapters."""
    (check,) = parts("companion checks", manifest.companions)
    models = {name: reference_of(name, part, manifest, variant, directory) for name, part in own.items()}
    passed, tensors = True, list[TensorCheck]()
    for name, reference in models.items():
        cases = list(check.cases(base_trace(reference), torch.Generator().manual_seed(seed), quick))
        with evaluating(model, reference):
            comparison = OutputComparison(variant.companions[name], reference, "all")
            tally = comparison.run(cases, tolerance_for(reference))
        passed &= tally.passed
        tensors += [dataclasses.replace(tensor, name=f"{name}: {tensor.name}") for tensor in tally.tensors]
    together = Tally(tolerance_for(variant.reference))
    run = TogetherRun(
        models,
        variant.companions,
        variant.reference,
        variant.session,
        open_rows,
        variant.name,
        together,
        torch.Generator().manual_seed(seed),
        quick,
    )
    check.compare_tokens(run)
    return CompanionResult(passed and together.passed, tuple(tensors), together.tokens if together.cases else None)


def reference_of(
    name: str, part: TracedModel | GraloraModel, manifest: Manifest, variant: Variant, directory: Path | None
) -> TracedModel | GraloraModel:
    """Return a companion with a state's adapters and the export's rounded weights; in float32 without a directory."""
    inputs, adapter = manifest.adapter_inputs, variant.name
    quantized = None if directory is None else manifest.companions[name].quantization
    precision = "fp32" if directory is None else manifest.precision
    is_exact = {precision, precision_of(base_trace(part).graph_module)} == {"fp32"} and quantized is None
    base = base_trace(part)

    def rounded(traced: TracedModel) -> TracedModel:
        reference = float32_model(traced, precision, streamed=is_streamed(base))
        if quantized is None:
            return reference
        from gralora_fx.exporters.verify.quantized_references import with_stored_weights

        assert directory is not None
        return with_stored_weights(reference, base, quantized, directory)

    if isinstance(part, GraloraModel) and inputs is not None:
        if adapter not in part.configs:
            part = base
        elif is_exact:
            part.set_adapter(adapter)
        else:  # the base and the adapter's tensors are rounded separately
            from gralora_fx.exporters.verify.adapters_as_data import with_folded

            return with_folded(rounded(base), variant.tensors, inputs)
    return part.eval() if is_exact else rounded(fold_adapters(part))


def measuring(name: str, part: TracedModel, tokenizer: Any, seed: int) -> Verification:
    """Return the inputs on which the formats of a quantized companion are chosen."""
    (check,) = parts("companion checks", [name])
    found, description = check.measured(part, tokenizer, seed)
    return Verification(lambda *_: ((description, each) for each in found), description=description)
