"""`export_onnx`: a traced or rewritten model to a directory that ONNX Runtime serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, Protocol

from gralora_fx.config.option import by_keywords
from gralora_fx.errors import ExportError, warn_caller
from gralora_fx.exporters.adapters_as_data import DataSites, check_found, data_sites, trace_to_export
from gralora_fx.exporters.artifact.active_adapters import write_active_adapters
from gralora_fx.exporters.artifact.companions import write_companions
from gralora_fx.exporters.artifact.fingerprint import fingerprint_of
from gralora_fx.exporters.artifact.manifest import describe, write_manifest
from gralora_fx.exporters.artifact.save import save_models
from gralora_fx.exporters.artifact.staging import (
    check_folder,
    check_output,
    check_replaced,
    file_sizes,
    staged,
    warn_of_lost_adapters,
)
from gralora_fx.exporters.flavours.flavour import Flavour, Models, Request
from gralora_fx.exporters.flavours.registry import flavour_of
from gralora_fx.exporters.folded_model import base_trace
from gralora_fx.exporters.fx_passes.exportable import check_exportable, graph_to_translate
from gralora_fx.exporters.onnx_passes.mark_sites import MarkedSites
from gralora_fx.exporters.onnx_passes.quantization import quantized_weights
from gralora_fx.exporters.onnx_pipeline import export_log
from gralora_fx.exporters.options import DYNAMIC, ExportOptions
from gralora_fx.exporters.reports import AttentionReport, ExportReport, VerifyReport
from gralora_fx.exporters.verification.quality import measure_quality
from gralora_fx.exporters.verification.same_model import check_runnable
from gralora_fx.exporters.verify import verify_onnx
from gralora_fx.graph.pipeline import PassLog
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.progress.stages import gc_pause, timed
from gralora_fx.runtime.export_files import describe_files, file_names
from gralora_fx.runtime.manifest import Manifest, RowsEntry
from gralora_fx.runtime.quantized_weights import Quality
from gralora_fx.tracing.inputs.decoder_cache import CacheLayout
from gralora_fx.tracing.traced_model import TracedModel

Keywords = ParamSpec("Keywords")


class _ExportOnnx(Protocol[Keywords]):
    """`export_onnx` as its callers have it: the options are keywords."""

    def __call__(
        self,
        model: TracedModel | GraloraModel,
        output_dir: str | Path,
        *args: Keywords.args,
        **options: Keywords.kwargs,
    ) -> ExportReport:
        """Export a model."""


def _by_keywords(
    options: Callable[Keywords, ExportOptions],
) -> Callable[[Callable[[TracedModel | GraloraModel, str | Path, ExportOptions], ExportReport]], _ExportOnnx[Keywords]]:
    return by_keywords(ExportOptions)


@_by_keywords(ExportOptions)
def export_onnx(  # noqa: D417  # the options are documented by name
    model: TracedModel | GraloraModel, output_dir: str | Path, options: ExportOptions
) -> ExportReport:
    """Export a model to `model.onnx` with its weights in `model.onnx_data`, and check it against PyTorch.

    An encoder-decoder with a cache becomes `encoder_model.onnx` and `decoder_model_merged.onnx`, optimum's layout.

    The directory is written whole or not at all: an earlier export at the same place is replaced, after an error it
    is as it was. The model keeps its state.

    Args:
        model: A traced model, or a rewritten one, whose active adapters are folded into the exported weights.
        output_dir: The directory to write: new, empty, or an earlier export of the same base and task.
        adapters: How adapters are held: `"merged"` folds the active ones into the weights. All others keep the base and
            take adapters as data (see `gralora_fx.runtime.adapter_inputs`), at the layers that any adapter of the model
            adapts; the active ones are written to `adapters/`. `"data"`: in `model.onnx` as initializers that may be
            overridden, of rank 0 unless they are, one adapter a run; in `model_rows.onnx` stacked, one adapter a row
            (`ExportReport.rows` says why there is none, where rows cannot be told apart). `"inputs"`: as required
            inputs of `model.onnx`, for runtimes without overridable initializers. `"swappable"` and `"batched"` are
            earlier names of `"data"`. Whether adapters have GraLoRA's blocks, of one `gralora_k`, or are each the plain
            LoRA that they equal, is chosen by what is faster (`adapters_as_data.takes_blocks`); the report says which.
        precision: Precision of weights, activations and the cache: `"fp32"`, `"fp16"` or `"bf16"`. What the model
            computes in float32 in half precision stays so; all other inputs and outputs are float32.
        quantize: Quantization, for any task, after adapters are folded: `"int8"` and `"int4"` store weights in blocks,
            `"int8-dynamic"` multiplies int8 weights by activations that are rounded to uint8 as they come; or None.
        block_size: For int8 and int4, values of a matrix's input axis that share a scale; a power of two, 16 or more,
            None for 32.
        accuracy_level: For int8 and int4, how ONNX Runtime multiplies with quantized weights: 0 its own choice, 1 in
            float32, 2 in float16, 3 in bfloat16, 4 in int8, its fastest; None for 4.
        logits: For a decoder with a cache, `"last"` or `"all"`: which positions' logits to return.
        keep_padding: For an encoder, whether positions that the mask calls padding are computed too, for a reader of
            their outputs. Left out, they cost no time, and outputs are zero there. No effect on other models.
        tokenizer: A tokenizer, a processor, or the directory of a tokenizer, to save beside the model.
        verify: Whether to compare ONNX Runtime with PyTorch on fresh inputs before the directory is put in place, and
            how thoroughly: True is `"quick"` (see `verify_onnx`). Not for a model whose weights are streamed
            (`loading.load_streamed`), which cannot be run.
        overwrite: Whether an earlier export of another base or task, or with more adapters, may be replaced.
        texts: Texts on which a quantized export is compared with the float32 model (`ExportReport.quality`); they need
            a tokenizer. None for texts that a decoder draws itself, and for random inputs of other models. Not for an
            encoder-decoder with a cache.
        dump: A directory to write the graph to after each pass, as text; None for that of the environment variable
            `GRALORA_FX_DUMP`, or none.

    Returns:
        Files, seconds of each stage, what verification found, what quantization changes, and what every pass did.

    Raises:
        ExportError: The output may not be written, the model cannot be exported, or the export's results differ from
            the model's.
        MergeError: An adapter cannot be folded.
    """
    check_output(output_dir)
    if options.dump is not None:
        check_folder(options.dump)
    if isinstance(model, (TracedModel, GraloraModel)):
        types = [config.peft_type for config in model.configs.values()] if isinstance(model, GraloraModel) else []
        options.check_model(peft_types=types, task=base_trace(model).task)
    log = export_log(options.dump)
    seconds: dict[str, float] = {}
    with timed("fold", seconds):
        traced = trace_to_export(model, options.adapters)
        data = data_sites(model, options.adapters, options.precision, is_quantized=options.quantization is not None)
        flavour = flavour_of(traced)
        _check(model, traced, flavour, options, output_dir)
    with timed("convert", seconds), gc_pause():
        models = flavour.convert(Request(traced, graph_to_translate(traced), options, log, data))
        check_found(data, (found.paths for found in log.summaries(MarkedSites)))
    with staged(output_dir) as stage, ThreadPoolExecutor(1) as reader:  # which computes digests in the background
        with timed("write", seconds):
            save_models(models, stage, output_dir, shared=flavour.shares_weights)
            digests = reader.submit(describe_files, stage, file_names(stage))
            write_companions(stage, traced, options.tokenizer)
            flavour.write_files(stage, traced, models)
            manifest = _described(model, models, flavour, options, log, data)
            write_manifest(stage, manifest)
            if data is not None and isinstance(model, GraloraModel):
                write_active_adapters(stage, model, manifest)
        verification = _verified(stage, model, options, seconds)
        quality = _quality(stage, model, flavour, options, seconds)
        files = digests.result()
        files |= describe_files(stage, [name for name in file_names(stage) if name not in files])
        found = None if verification is None else verification.to_dict()
        write_manifest(stage, dataclasses.replace(manifest, files=files, verification=found, quality=quality))
    passes = tuple(log.reports)
    return ExportReport(
        Path(output_dir),
        file_sizes(output_dir),
        seconds,
        verification,
        _attention(log),
        passes,
        quality,
        None if data is None else data.inputs,
        _rows(log),
    )


def _check(
    model: TracedModel | GraloraModel,
    traced: TracedModel,
    flavour: Flavour,
    options: ExportOptions,
    output_dir: str | Path,
) -> None:
    """Check that a model can be exported with these options to this place.

    Raises:
        ExportError: It cannot.
    """
    check_exportable(traced, verify=options.level is not None)
    if options.logits == "all" and not flavour.has_last_logits:
        warn_caller(
            "logits='all' is for a decoder with a cache; this model returns all that its forward does, so leave it out"
        )
    if options.texts is not None and traced.cache_layout is CacheLayout.ENCODER_DECODER:
        raise ExportError(
            "texts=... is for decoders and models without a cache, and the task is an encoder-decoder's with one; "
            "leave it out"
        )
    if options.level is not None:
        check_runnable(model)
    if not options.overwrite:
        check_replaced(output_dir, task=traced.task, fingerprint=fingerprint_of(model))
    active = model.active_adapters if isinstance(model, GraloraModel) else ()
    warn_of_lost_adapters(output_dir, () if options.adapters == "merged" else active)


def _described(
    model: TracedModel | GraloraModel,
    models: Models,
    flavour: Flavour,
    options: ExportOptions,
    log: PassLog,
    data: DataSites | None,
) -> Manifest:
    """The manifest of what was converted."""
    attention = _attention(log)
    return describe(
        model,
        {name: onnx_model.graph for name, onnx_model in models.items()},
        adapters=options.adapters,
        precision=options.precision,
        quantization=quantized_weights(options.quantization, log),
        logits=flavour.logits(options),
        attention=None if attention is None else dataclasses.asdict(attention),
        passes=[entry.to_dict() for entry in log.reports],
        adapter_inputs=None if data is None else data.inputs,
        rows=_rows(log),
        flavour=flavour.name,
    )


def _rows(log: PassLog) -> RowsEntry | None:
    """The graph whose rows differ, or why there is none, where one was asked for."""
    return next(iter(log.summaries(RowsEntry)), None)


def _attention(log: PassLog) -> AttentionReport | None:
    """Which layers' attention is fused, in all parts of the model, where there is any."""
    reports = log.summaries(AttentionReport)
    over_cache = next((report for report in reports if report.cached), None)
    if over_cache is not None or not reports:
        return over_cache
    plain = {layer: why for report in reports for layer, why in report.plain.items()}
    return AttentionReport(sum(report.fused for report in reports), plain)


def _verified(
    stage: Path, model: TracedModel | GraloraModel, options: ExportOptions, seconds: dict[str, float]
) -> VerifyReport | None:
    """What verification found, or None where it is left out.

    Raises:
        ExportError: It failed.
    """
    if options.level is None:
        return None
    with timed("verify", seconds):
        report = verify_onnx(stage, model, options.level)
    if not report.passed:
        raise ExportError(f"the export's results differ from the model's, so it was not written:\n{report}")
    return report


def _quality(
    stage: Path,
    model: TracedModel | GraloraModel,
    flavour: Flavour,
    options: ExportOptions,
    seconds: dict[str, float],
) -> Quality | None:
    """What quantization changes; None where nothing is compared, or blocks serve an encoder-decoder with a cache.

    Raises:
        ExportError: It cannot be measured, or the export gives values that are not finite.
    """
    is_pair = base_trace(model).cache_layout is CacheLayout.ENCODER_DECODER
    is_measured = options.quantize == DYNAMIC or (options.quantize is not None and not is_pair)
    if options.level is None or not is_measured or options.precision == "bf16":  # which the CPU provider does not run
        return None
    with timed("quality", seconds):
        return measure_quality(
            stage,
            model,
            flavour.verification,
            logits=flavour.logits(options),
            texts=options.texts,
            tokenizer=options.tokenizer,
        )
