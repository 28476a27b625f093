"""`export_onnx`: export a traced or rewritten model to a directory that ONNX Runtime serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from gralora_fx.base.progress.console import with_progress
from gralora_fx.base.progress.stages import gc_pause, timed
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, TraceError, listed, marked, option, warn_caller
from gralora_fx.exporters.artifact.manifest import describe, made_from, save_models, write_manifest
from gralora_fx.exporters.artifact.program_files import write_program_files
from gralora_fx.exporters.artifact.staging import (
    check_folder,
    check_output,
    check_replaced,
    file_sizes,
    staged,
    warn_of_lost_adapters,
)
from gralora_fx.exporters.kinds.conversion import Conversion, base_trace, conversion_of, is_streamed
from gralora_fx.exporters.kinds.flavour import Flavour, Models, flavour_of
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.reports import ExportReport, layers_reports
from gralora_fx.exporters.translation.export_graphs import check_exportable
from gralora_fx.format.export_usage import usage_of
from gralora_fx.format.input_names import beside_ids
from gralora_fx.format.manifest import Manifest, describe_files, file_names
from gralora_fx.format.tasks import TEXT_TO_TEXT, is_encoder_decoder


@with_progress
def export_onnx(
    model: TracedModel | GraloraModel,
    output_dir: str | Path,
    *,
    adapters: Literal["merged", "data", "inputs"] = "merged",
    dora: bool = False,
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    quantize: Literal["int4", "int8", "int8-dynamic", "kept", "float"] | None = None,
    quantize_companions: Literal["int4", "int8", "int8-dynamic", "float"] | None = None,
    bits: float | None = None,
    block_size: int | None = None,
    accuracy_level: int | None = None,
    logits: Literal["last", "all"] = "last",
    keep_padding: bool = False,
    tokenizer: Any = None,
    verify: bool | Literal["quick", "full"] = True,
    overwrite: bool = False,
    texts: Sequence[str] | None = None,
    dump: str | Path | None = None,
) -> ExportReport:
    """Export a model to `model.onnx` with its weights in `model.onnx_data`, and check it against PyTorch.

    An encoder-decoder with a cache becomes `encoder_model.onnx` and `decoder_model_merged.onnx`, optimum's layout.

    The directory is written atomically: an earlier export at the same place is replaced; after an error it is
    unchanged. The model keeps its state. Progress of long steps is shown on stderr, unless the environment variable
    `GRALORA_FX_PROGRESS` is 0.

    Args:
        model: A traced model, or a rewritten one, whose active adapters are folded into the exported weights.
        output_dir: The directory to write: new, empty, or an earlier export of the same base and task.
        adapters: How adapters are exported. `"merged"` folds the active ones into the weights. The others keep the base
            and take adapters as data (see `gralora_fx.format.adapter_inputs`), at the layers that any adapter of the
            model adapts; the active ones are written to `adapters/`. `"data"` makes them overridable initializers of
            `model.onnx`, of rank 0 by default, with one adapter a run; in `model_rows.onnx` they are stacked, with one
            adapter a row (`ExportReport.rows` says why there is no such graph if rows cannot be told apart). `"inputs"`
            makes them required inputs of `model.onnx`, for runtimes without overridable initializers. `"swappable"` and
            `"batched"` are earlier names of `"data"`. The faster of two forms is chosen, GraLoRA's blocks of one
            `gralora_k` or equivalent plain LoRA (`data_sites.takes_blocks`); the report says which.
        dora: Whether an export with adapters as data takes DoRA adapters at every layer that an adapter of the model
            adapts; if not, where one is a DoRA adapter. Costs a vector and a product more at each layer.
        precision: Precision of weights, activations and the cache: `"fp32"`, `"fp16"` or `"bf16"`. Parts that the
            model itself computes in float32 stay so; all other inputs and outputs are float32.
        quantize: Quantization, for any task, after adapters are folded: `"int8"` and `"int4"` store weights in blocks,
            `"int8-dynamic"` multiplies int8 weights by activations that are rounded row by row. `"kept"` keeps the
            integers of a quantized checkpoint, and rounds to int8 where it quantizes without any that blocks can hold;
            `"int4"` and `"int8"` keep them too. `"float"` stores floats. None for `"kept"` if the base's checkpoint is
            quantized in a form that exports keep, else for floats.
        quantize_companions: The kind for what runs beside a decoder, such as a vision encoder; None for the decoder's,
            but `"int8"` where that is `"int4"`: an encoder in four bits is several times further from floats, and
            hardly faster.
        bits: For int4, the mean bits of an integer over all quantized weights, from 4 to 8: layers whose rounding costs
            the outputs most have 8, the others 4 (see `quantize.choice`); None for 4.5. The report and the manifest
            list the bits by layer.
        block_size: For int8 and int4, values of a matrix's input axis that share a scale; a power of two, 16 or more,
            None for 32. Kept groups that are larger become blocks of this size with equal scales.
        accuracy_level: For int8 and int4, how ONNX Runtime multiplies with quantized weights: 0 its own choice, 1 in
            float32, 2 in float16, 3 in bfloat16, 4 in int8, its fastest; None for 4.
        logits: For a decoder with a cache, the positions whose logits it returns: `"last"` or `"all"`.
        keep_padding: For an encoder, whether positions of padding are computed too, for a reader of their outputs. If
            not, they cost no time, and outputs are zero there. No effect on other models.
        tokenizer: A tokenizer, a processor, or the directory of a tokenizer, to save beside the model.
        verify: Whether to compare ONNX Runtime with PyTorch on fresh inputs before the directory is put in place, and
            how thoroughly: True is `"quick"` (see `verify_onnx`).
        overwrite: Whether an earlier export of another base or task, or with more adapters, may be replaced.
        texts: Texts on which a quantized export is compared with the float32 model (`ExportReport.quality`); they need
            a tokenizer. With int4 and int8-dynamic every second one, from the first, is used to choose bits instead.
            None for texts sampled from a decoder, and for random inputs of other models. Not for an encoder-decoder
            with a cache.
        dump: A directory to write the graph to after each pass, as text; None for that of the environment variable
            `GRALORA_FX_DUMP`, or none.

    Returns:
        Files, seconds of each stage, the results of verification, the effect of quantization, and a report of every
        pass.

    Raises:
        ExportError: The output may not be written, the model cannot be exported, or the export's
            results differ from the model's.
        MergeError: An adapter cannot be folded.
    """
    options = ExportOptions(
        adapters=adapters,
        dora=dora,
        precision=precision,
        quantize=quantize,
        quantize_companions=quantize_companions,
        bits=bits,
        block_size=block_size,
        accuracy_level=accuracy_level,
        logits=logits,
        keep_padding=keep_padding,
        tokenizer=tokenizer,
        verify=verify,
        overwrite=overwrite,
        texts=texts,
        dump=dump,
    )
    check_output(output_dir)
    if options.dump is not None:
        check_folder(options.dump)
    seconds: dict[str, float] = {}
    with timed("fold", seconds, "preparing"):
        conversion = conversion_of(model, options)
        options = conversion.options
        flavour = flavour_of(conversion.traced)
        conversion.check_kind(flavour.name)
        flavour.check(options)
        check_exportable(conversion.traced, verify=options.level is not None)
        if not options.overwrite:
            check_replaced(output_dir, task=conversion.traced.task, fingerprint=conversion.fingerprint)
        warn_of_lost_adapters(output_dir, conversion.data_adapters)
    companions = _companions(model, conversion, seconds) if flavour.has_companions else {}
    if options.quantize_companions is not None and not companions:
        raise ExportError(
            f"{option(quantize_companions=options.quantize_companions)} has no effect: nothing is exported that runs "
            "beside the model's graph, such as a vision encoder; leave it out"
        )
    _warn_of_parts_left_out(model, conversion, companions)
    with ExitStack() as kept:
        if conversion.plan is not None:
            conversion = _with_kept_work(conversion, output_dir, kept)
            with timed("choose", seconds, "quantizing"):
                conversion, companions = _with_formats(conversion, flavour, companions)
        return _written(model, output_dir, conversion, flavour, companions, seconds)


def _with_kept_work(conversion: Conversion, output_dir: str | Path, kept: ExitStack) -> Conversion:
    """Return a quantized export's conversion; a streamed model's keeps results beside the output until the end."""
    from gralora_fx.exporters.quantize.kept_work import KeptWork, work_beside

    work = KeptWork()
    if is_streamed(conversion.model):
        work = kept.enter_context(work_beside(output_dir, made_from(conversion)))
    return dataclasses.replace(conversion, work=work)


def _with_formats(
    conversion: Conversion, flavour: Flavour, companions: dict[str, Conversion]
) -> tuple[Conversion, dict[str, Conversion]]:
    """Return a quantized export's conversion and its companions' with the formats chosen."""
    from gralora_fx.exporters.quantize.choice import choose_formats

    conversion = dataclasses.replace(conversion, plan=choose_formats(conversion, flavour.verification))
    if companions:
        from gralora_fx.exporters.kinds.companion_models import choose_companion_formats

        companions = choose_companion_formats(companions, conversion.options.tokenizer)
    return conversion, companions


def _written(
    model: TracedModel | GraloraModel,
    output_dir: str | Path,
    conversion: Conversion,
    flavour: Flavour,
    companions: dict[str, Conversion],
    seconds: dict[str, float],
) -> ExportReport:
    """Convert a model, write the directory, and compare it with the model before it is put in place."""
    options = conversion.options
    with timed("convert", seconds, "converting"), gc_pause():
        models = flavour.convert(conversion)
        models, companions, programs = _with_companions(models, conversion, companions)
        if conversion.adapters is not None:
            from gralora_fx.exporters.kinds.data_sites import check_found
            from gralora_fx.exporters.rules.adapters.site_marks import MarkedSites

            check_found(conversion.adapters, (found.paths for found in conversion.log.summaries(MarkedSites)))
    with staged(output_dir) as stage, ThreadPoolExecutor(1) as reader:  # computes digests in the background
        with timed("write", seconds, "writing"):
            save_models(models, stage, output_dir, shared=flavour.shares_weights)
            digests = reader.submit(describe_files, stage, file_names(stage))
            write_program_files(stage, conversion.traced)
            if options.tokenizer is not None:
                from gralora_fx.exporters.artifact.tokenizer_files import write_tokenizer

                write_tokenizer(stage, conversion.traced, options.tokenizer, companions)
            flavour.write_files(stage, conversion.traced, models)
            kind = {"flavour": flavour.name, "logits": flavour.logits(options)}
            manifest = describe(conversion, models, companions, programs, **kind)
            write_manifest(stage, manifest)
            active: list[str] = []
            if isinstance(model, GraloraModel) and conversion.adapters is not None:
                from gralora_fx.exporters.artifact.active_adapters import write_active_adapters

                active = model.active_adapters
                write_active_adapters(stage, model, manifest)
        verification = quality = None
        if options.level is not None:
            from gralora_fx.exporters.onnx_verify import verify_onnx

            with timed("verify", seconds, "comparing"):
                verification = verify_onnx(stage, model, options.level)
            if not verification.passed:
                found = marked(verification.details)
                raise ExportError(f"the export's results differ from the model's, so it was not written:\n{found}")
            if options.measures_quality:
                from gralora_fx.exporters.verify.quality import measure_quality

                with timed("quality", seconds, "measuring"):
                    texts, work = options.compared_texts, conversion.work
                    quality = measure_quality(
                        stage, model, flavour.verification, texts=texts, tokenizer=options.tokenizer, work=work
                    )
        files = digests.result()
        files |= describe_files(stage, [name for name in file_names(stage) if name not in files])
        record = None if verification is None else verification.to_dict()
        write_manifest(stage, dataclasses.replace(manifest, files=files, verification=record, quality=quality))
    return ExportReport(
        Path(output_dir),
        file_sizes(output_dir),
        seconds,
        verification,
        passes=tuple(conversion.log.reports),
        quality=quality,
        adapter_inputs=manifest.adapter_inputs,
        rows=manifest.rows,
        quantization=manifest.quantization,
        companions={name: own for name, each in manifest.companions.items() if (own := each.quantization)},
        usage=usage_of(output_dir, manifest.task, files, _input_names(manifest), next(iter(active), None)),
        **layers_reports(conversion.log),
    )


def _input_names(manifest: Manifest) -> list[str]:
    """Return the inputs of an export of one graph; none if it has several."""
    return [name for name, shape in manifest.inputs.items() if isinstance(shape, list)]


def _companions(
    model: TracedModel | GraloraModel, conversion: Conversion, seconds: dict[str, float]
) -> dict[str, Conversion]:
    """Return the conversions of a decoder's companions; one that cannot be traced is left out or refused."""
    traced = base_trace(model)
    if not beside_ids(traced.example_inputs):
        return {}
    with timed("companions", seconds, "tracing"):
        try:
            if not traced.companions:
                return {}
        except TraceError as error:
            _leave_out(error, conversion)
            return {}
        from gralora_fx.exporters.kinds.companion_models import companion_conversions

        return companion_conversions(conversion)


def _with_companions(
    models: Models, conversion: Conversion, companions: dict[str, Conversion]
) -> tuple[Models, dict[str, Conversion], tuple[str, ...]]:
    """Return the models with those of companions and of other programs, the companions, and the programs' names."""
    if not companions:
        return models, companions, ()
    from gralora_fx.exporters.kinds.companion_models import companion_models, program_models

    try:
        beside = companion_models(companions)
    except ExportError as error:
        _leave_out(error, conversion)
        return models, {}, ()
    whole = {**models, **beside}
    programs = program_models(conversion, whole, companions)
    return {**whole, **programs}, companions, tuple(programs)


def _leave_out(error: TraceError | ExportError, conversion: Conversion) -> None:
    """Refuse to verify a decoder whose companions cannot be exported, or warn if nothing is verified."""
    if conversion.options.level is None:
        warn_caller(f"{marked(error)}; the decoder is exported without it")
        return
    alone = f"export with {option(verify=False)}, the decoder alone and unverified"
    task = TEXT_TO_TEXT if is_encoder_decoder(conversion.traced.task) else "text-generation-with-past"
    texts = f"the decoder of its texts with {option(task=task)}"
    raise ExportError(f"{marked(error)}; nothing of it would be compared: {alone}, or {texts}") from error


def _warn_of_parts_left_out(
    model: TracedModel | GraloraModel, conversion: Conversion, companions: Mapping[str, Conversion]
) -> None:
    """Warn if an adapter changes layers that neither a decoder's step nor a companion runs."""
    if not isinstance(model, GraloraModel) or conversion.traced.cache_layout is not CacheLayout.DECODER:
        return
    called = {site.path for other in companions.values() for site in other.traced.adaptable if site.calls}
    for name in model.active_adapters if conversion.adapters is None else model.configs:
        adapter = model.adapter(name)
        sites = [planned.site for planned in adapter.plan.selected]
        left = [site.path for site in sites if not site.calls and site.path not in called]
        paths = [path for path in left if not adapter.factors[path].is_zero]
        if paths:
            warn_caller(
                f"adapter {name!r} changes {listed(paths, 3)} too, which the decoder that is exported does not run; "
                "the export has nothing of it there: keep it where that part of the model runs, such as in PyTorch"
            )
