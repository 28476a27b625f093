"""`verify_onnx`: compare an export with the PyTorch model on fresh inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnxruntime

from gralora_fx.base.progress.console import with_progress
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError
from gralora_fx.exporters.artifact.manifest import describes
from gralora_fx.exporters.formats import DYNAMIC
from gralora_fx.exporters.kinds.conversion import base_trace, check_runnable, is_streamed
from gralora_fx.exporters.kinds.flavour import flavour_of
from gralora_fx.exporters.options import LEVELS, check_choice
from gralora_fx.exporters.verify.cases import Case, PromptBatch, TokenRun
from gralora_fx.exporters.verify.comparable import Comparable, Variant, evaluating, open_comparable, variants
from gralora_fx.exporters.verify.outputs import OutputComparison, check_inputs
from gralora_fx.exporters.verify.tolerances import ToleranceCheck, describe_weights, tolerance_of
from gralora_fx.exporters.verify_report import ProviderRun, VerifyReport
from gralora_fx.format.adapter_inputs import is_adapter_input
from gralora_fx.format.manifest import Manifest, read_manifest
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.run.engine.session_decoders import RowsDecoder
from gralora_fx.run.sessions.session import CPU, Runtime

if TYPE_CHECKING:
    from gralora_fx.run.sessions.run_options import ProviderOptions, Providers


@with_progress
def verify_onnx(
    output_dir: str | Path,
    model: TracedModel | GraloraModel,
    level: Literal["quick", "full"] = "full",
    *,
    inputs: Mapping[str, Any] | None = None,
    prompts: Sequence[Any] | None = None,
    tolerance: float | None = None,
    providers: Providers | None = None,
    provider_options: ProviderOptions | None = None,
    seed: int = 0,
    check: bool = True,
    adapter_name: str | None = None,
) -> VerifyReport:
    """Compare an export with the model on fresh inputs: other sizes, padded rows, single rows.

    An export with a cache also generates, its cache fed back at every step: greedy tokens and logits are compared for
    prompts of unequal length, padded on either side, and for one that fills the context (up to 1,000 positions). A
    quick verification compares two short prompts for four tokens. `model_rows.onnx` reads the same prompts or inputs,
    each row beside one with another adapter, those of a decoder also beside idle ones, on the CPU's and CUDA's
    providers.

    Args:
        output_dir: The export directory.
        model: The model it was exported from; a `GraloraModel` runs with its active adapters unfolded, so that a wrong
            fold would show.
        level: `"full"`, or `"quick"` for few and short inputs of a model with a cache: each kind of step once. Models
            without a cache are compared on the same inputs either way.
        inputs: A user's own inputs, compared in addition.
        prompts: A user's own prompts for an export with a cache, compared in addition: texts, chats or token ids.
        tolerance: Largest difference allowed, relative to the largest value; None for the export precision's tolerance,
            or four times the rounding error of float32 itself if that is larger (see `tolerances`).
        providers: Execution providers to run the export on, as `load` takes them; None for the CPU. Their arithmetic
            sets the tolerance too (see `tolerances`), and the report lists the nodes that each one ran.
        provider_options: Options of each provider, if they are not given beside its name.
        seed: Seed of the fresh inputs.
        check: Whether to compare every file with its SHA-256 first; False if that has been done.
        adapter_name: For an export that takes adapters as data, the name in it of the model's only active adapter; None
            if it has the same name in the model.

    Returns:
        Differences and argmax agreement for every output, and the greedy tokens of an export with a cache. A bfloat16
            export, which ONNX Runtime's CPU provider cannot run, is run with its own weights and float32 arithmetic,
            and so is a quantized one. They are compared with the model with the same rounded weights: the cost of the
            rounding itself must be measured on a task. If an export takes adapters as data, the base is compared, then
            each active adapter of the model alone, with the export's file of that name. The int8 products of an
            int8-dynamic export are also compared in int8.

    Raises:
        ExportError: The directory is not an export, or one of another base or adapter, a file has changed since the
            export, its inputs or outputs are not the model's, a prompt does not fit, or a case cannot run.
        ServingError: A provider is not installed, has no such device, or an option is unknown.
    """
    check_choice("level", level, LEVELS)
    runtime = None
    if providers is not None or provider_options is not None:
        from gralora_fx.run.sessions.run_options import runtime_of

        runtime = runtime_of(providers, provider_options, None, None)
    manifest, quick = read_manifest(output_dir), level == "quick"
    if check and manifest.files is not None:  # a comparison on some inputs would not notice every changed byte
        from gralora_fx.format.export_checks import check_files

        check_files(output_dir, manifest, digests=True)
    check_runnable(model)
    if not describes(manifest, model):
        from gralora_fx.exporters.verify.same_model import check_same_model

        check_same_model(output_dir, manifest, model)
    traced = base_trace(model)
    verification = flavour_of(traced).verification
    cases = verification.cases(traced, seed, quick=quick)
    batches = [] if verification.prompts is None else list(verification.prompts(traced, seed, quick))
    if prompts is not None and verification.prompts is None:
        raise ExportError("the export has no cache, so it takes no prompts; give inputs")
    if prompts is not None:
        from gralora_fx.exporters.verify.given_texts import user_prompts

        batches.append(user_prompts(prompts, output_dir, traced))
    with open_comparable(Path(output_dir), manifest, runtime, streamed=is_streamed(model)) as opened:
        taken = [value.name for value in opened.session.get_inputs() if not is_adapter_input(value.name)]
        check_inputs(taken, cases[0][1])
        cases += [] if inputs is None else [("given inputs", dict(inputs))]
        report = _Comparison(
            Path(output_dir),
            manifest,
            model,
            _companions(manifest, model),
            opened,
            cases,
            batches,
            level,
            tolerance,
            runtime,
            seed,
            adapter_name,
        ).of_all_states()
    from gralora_fx.exporters.verify.stored_weights import differences

    if found := differences(Path(output_dir), manifest, model, flavour_of(traced).write_files):
        report = dataclasses.replace(report, passed=False, differences=found)
    quantized = (manifest.quantization, *(entry.quantization for entry in manifest.companions.values()))
    if all(each is None or each.kind != DYNAMIC for each in quantized):
        return report
    from gralora_fx.exporters.verify.quantized_references import PRODUCT_TOLERANCE, compare_products

    products = compare_products(Path(output_dir))
    is_exact = report.passed and products.max_rel_error <= PRODUCT_TOLERANCE
    return dataclasses.replace(report, passed=is_exact, tensors=(*report.tensors, products))


@dataclass(frozen=True)
class _Comparison:
    """A comparison of an opened export with a model, in each state of their adapters."""

    directory: Path
    manifest: Manifest
    model: TracedModel | GraloraModel
    companions: Mapping[str, TracedModel | GraloraModel]
    opened: Comparable
    cases: list[Case]
    batches: list[PromptBatch]
    level: str
    given_tolerance: float | None
    runtime: Runtime | None
    seed: int
    adapter_name: str | None

    def of_all_states(self) -> VerifyReport:
        """Compare the export in every state of its adapters."""
        session, rows, _, companions = self.opened
        report: VerifyReport | None = None
        states = variants(session, self.model, self.manifest, self.directory, self.adapter_name, rows, companions)
        for variant in states:
            with variant.active(), evaluating(self.model, variant.reference):
                found = self._compared(variant)
            report = found if report is None else report.with_adapter(self.adapter_name or str(variant.name), found)
        assert report is not None
        return report

    def _compared(self, variant: Variant) -> VerifyReport:
        """Compare outputs and greedy tokens of the export and the model, in one state of their adapters."""
        reference, quick = variant.reference, self.level == "quick"
        check = self._checked(reference)
        outputs = OutputComparison(variant.session, reference, self.manifest.logits).run(self.cases, check)
        adapters = Adapters(self.directory, self.manifest)
        run = TokenRun(variant.session, reference, self.cases, self.batches, check, quick, adapters, variant.rows)
        tokens = flavour_of(base_trace(self.model)).verification.compare_tokens(run)
        found = VerifyReport(
            outputs.passed and tokens.passed,
            check.tolerance,
            tuple(description for description, _ in self.cases),
            (*outputs.tensors, *tokens.tensors),
            tokens.tokens,
            describe_weights(self.manifest),
            self.opened.arithmetic,
            rounding=tuple(check.exceeded),
            level=self.level,
            reference=_describe_reference(self.model, reference, self.adapter_name),
            provider=None if self.runtime is None else _provider_run(self.runtime, variant.session),
            rows=tokens.rows,
        )
        if not self.manifest.companions:
            return found
        from gralora_fx.exporters.verify.together import compare_companions

        beside = compare_companions(
            self.directory,
            self.manifest,
            self.model,
            self.companions,
            variant,
            None if self.opened.rows is None else partial(self._open_rows, adapters),
            self._checked,
            quick=quick,
            seed=self.seed,
        )
        passed, tensors = found.passed and beside.passed, (*found.tensors, *beside.tensors)
        return dataclasses.replace(found, passed=passed, tensors=tensors, companions=beside.tokens)

    def _checked(self, reference: TracedModel | GraloraModel) -> ToleranceCheck:
        given, arithmetic = self.given_tolerance, self.opened.arithmetic
        is_rough = given is None and self.runtime is not None and arithmetic != "fp32"
        explained = tolerance_of(self.manifest.precision, arithmetic if is_rough else "fp32")
        limit = explained if given is None else given
        return ToleranceCheck(reference, limit, use_float64=given is None, arithmetic=arithmetic)

    def _open_rows(self, adapters: Adapters, count: int, length: int) -> Decoder:
        limits, size = DecoderLimits(None, length, frozenset()), DecoderSize(count, chunk=length)
        return RowsDecoder(self.opened.rows, adapters, limits, size)


def _companions(manifest: Manifest, model: TracedModel | GraloraModel) -> dict[str, TracedModel | GraloraModel]:
    """Return the model's companions in the export; most models have none."""
    if not manifest.companions:
        return {}
    from gralora_fx.core.model.companions import companions_of

    return companions_of(model)


def _provider_run(runtime: Runtime, session: Any) -> ProviderRun:
    """Return where an export ran: the first provider, its device, and the nodes of each provider."""
    name, _ = runtime.providers[0]
    device = next((device for device in runtime.devices if device.provider == name), None)
    from gralora_fx.run.sessions.placement import placement_of

    placement = placement_of(session)
    nodes = {} if placement is None else {provider: dict(counts) for provider, counts in placement.items()}
    if device is None:
        return ProviderRun(name, onnxruntime.__version__, "CPU" if name == CPU else "", nodes)
    return ProviderRun(name, device.version, f"{device.kind} ({device.name})", nodes)


def _describe_reference(
    model: TracedModel | GraloraModel, reference: TracedModel | GraloraModel, adapter_name: str | None
) -> str:
    """Describe the reference of a comparison, with an adapter's name in the export."""
    active = model.active_adapters if isinstance(model, GraloraModel) else []
    names = [adapter_name] if adapter_name is not None and active else active
    adapters = f" with {', '.join(map(repr, names))} active" if names else ""
    return f"the PyTorch model{adapters}" + ("" if reference is model else ", its weights rounded as the export's are")
