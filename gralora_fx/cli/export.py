"""`gralora-fx export`: a model, by name, to a directory that ONNX Runtime serves."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

import gralora_fx.cli.options as opt
from gralora_fx.base.features import parts
from gralora_fx.base.progress.console import CommandProgress
from gralora_fx.base.progress.stages import gc_pause, timed
from gralora_fx.base.sources.base_quantization import BaseQuantization, check_not_packed
from gralora_fx.base.sources.model_directories import check_model_files
from gralora_fx.base.sources.model_files import MODEL_FILE, RECORD, local_directory, read_json_object
from gralora_fx.base.sources.same_base import BaseSource
from gralora_fx.cli.values import Declared, check_rounding, graph_name, read_texts, takes, text_option
from gralora_fx.cli.wording import show
from gralora_fx.core.config.option import ADAPTERS, COMPARISON, MODEL, WRITTEN, declared_options
from gralora_fx.core.config.reading import config_fields
from gralora_fx.core.loading.adapter_facts import base_name, needed_quantization
from gralora_fx.errors import ConfigError, ExportError, TraceError
from gralora_fx.exporters.artifact.staging import check_base_replaced, check_folder, check_output, check_replaced
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.format.tasks import TEXT_TO_TEXT, check_adapter_task, requested_task

ExportedName = Annotated[
    str | None,
    text_option(
        "--adapter-name",
        metavar="NAME",
        help="Give the adapter this name in the export.  [default: default]",
        callback=graph_name,
        rich_help_panel=ADAPTERS,
    ),
]
RandomHead = Annotated[
    bool,
    typer.Option(
        "--allow-random-head",
        help="Export a last layer that the checkpoint lacks, with random values.",
        rich_help_panel=MODEL,
    ),
]
NoTokenizer = Annotated[
    bool, typer.Option("--no-tokenizer", help="Leave the base's tokenizer out of the export.", rich_help_panel=WRITTEN)
]
Stream = Annotated[
    bool, typer.Option("--stream", help="Read weights one by one, to need less memory.", rich_help_panel=WRITTEN)
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Skip the comparison with PyTorch.", rich_help_panel=COMPARISON)
]
Texts = Annotated[
    Path | None,
    text_option(
        metavar="FILE",
        help="Measure what quantization costs on the texts of this file, one on each line.",
        rich_help_panel=COMPARISON,
    ),
]


class TraceOptions(Protocol):
    """Options that a feature adds for tracing its kind of model: a dataclass."""

    def check(self, task: str | None) -> None:
        """Check that they have an effect for a task; None if the task is not known yet."""

    def trace_options(self) -> Mapping[str, Any]:
        """Return additional arguments for `trace`."""


_OTHERS: list[Any] = parts("export options")


@takes(*_OTHERS, ExportOptions)
def export(
    output: opt.Output,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    task: opt.Task = None,
    *,
    allow_random_head: RandomHead = False,
    base_quantization: opt.BaseQuantization = None,
    strict_base: opt.StrictBase = False,
    adapter_name: ExportedName = None,
    no_tokenizer: NoTokenizer = False,
    stream: Stream = False,
    overwrite: Declared = False,
    dump: Declared = None,
    verify: Declared = None,
    no_verify: NoVerify = False,
    texts: Texts = None,
    verbose: opt.Verbose = False,
    **options: Any,
) -> None:
    """Write a model as ONNX and compare it with PyTorch.

    An adapter is merged into the weights, or kept as data beside them (--adapters data). An export with adapters as
    data takes others later, by export-adapter: at the layers of --adapter, and with its gralora_k if -v prints that
    the export fixes it. A language model is exported with a key-value cache, so that it can generate;
    --task text-generation leaves the cache out.
    """
    _check_together(options, verify, texts, no_verify=no_verify, no_tokenizer=no_tokenizer)
    options |= {"overwrite": overwrite, "dump": dump, "verify": verify or not no_verify}
    if texts is not None:
        options["texts"] = read_texts(texts)
    traced = [own(**{each.name: options.pop(each.name) for each in declared_options(own)}) for own in _OTHERS]
    # texts are tokenized by the base's tokenizer, which is not loaded yet
    checked = ExportOptions(**options, tokenizer=None if texts is None else Path())
    base = check_request(
        checked,
        output,
        model=model,
        adapter=adapter,
        adapter_name=adapter_name,
        task=task,
        traced=traced,
        base_quantization=base_quantization,
    )
    with CommandProgress(), gc_pause():
        with timed("importing"):
            from gralora_fx.core.config.checks import check_adapter_name
            from gralora_fx.core.loading.bases import load_traced
            from gralora_fx.core.loading.tokenizers import load_tokenizer
            from gralora_fx.core.model.model_class import without_trainer
            from gralora_fx.exporters import export_onnx
        gc.freeze()  # imported objects stay alive and need not be scanned again
        named = adapter_name or "default"
        check_adapter_name(named)
        tokenizer = None if no_tokenizer else load_tokenizer(base)
        if texts is not None and tokenizer is None:
            raise ExportError(f"--texts needs a tokenizer, and {base} has none; leave it out")
        with without_trainer():
            loaded = load_traced(
                model,
                adapter,
                task,
                adapter_name=named,
                trace_options={name: value for each in traced for name, value in each.trace_options().items()},
                with_cache=True,
                stream=stream,
                allow_random_head=allow_random_head,
                strict_base=strict_base,
                base_quantization=base_quantization,
            )
        gc.freeze()
        report = export_onnx(loaded, output, tokenizer=tokenizer, **options)
    show(report, verbose=verbose, model=model, adapter=adapter)


def _check_together(
    options: Mapping[str, Any], verify: str | None, texts: Path | None, *, no_verify: bool, no_tokenizer: bool
) -> None:
    """Check that every option has an effect beside the others."""
    for name in ("quantize_companions", "bits", "block_size", "accuracy_level"):
        if options[name] is not None and options["quantize"] is None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} has no effect without --quantize; give --quantize too, or leave it out")
    if texts is not None:
        if options["quantize"] is None:
            raise ConfigError("--texts has no effect without --quantize; give --quantize too, or leave it out")
        is_unused = no_verify and options["quantize"] != "int4"
        if contradicting := ["--no-tokenizer"] * no_tokenizer + ["--no-verify"] * is_unused:
            raise ConfigError(
                f"--texts contradicts {contradicting[0]}: texts are tokenized and compared; leave one out"
            )
    if verify is not None and no_verify:
        raise ConfigError(f"--verify {verify} contradicts --no-verify; leave one of them out")


def check_request(
    options: ExportOptions,
    output: Path,
    *,
    model: str | None,
    adapter: str | None,
    adapter_name: str | None,
    task: str | None,
    traced: Sequence[TraceOptions] = (),
    base_quantization: str | None = None,
) -> str:
    """Check the request and the output directory before anything is loaded; return the base's name."""
    check_output(output)
    if options.dump is not None:
        check_folder(options.dump)
    if adapter_name is not None and adapter is None:
        raise ConfigError(f"--adapter-name {adapter_name} has no effect without --adapter; give it, or leave it out")
    if adapter is None:
        options.check_model(methods={}, task=task)
    fields = None if adapter is None else config_fields(adapter)[0]  # once, since each read of a hub id is a look-up
    known = requested_task((fields or {}).get("task_type"), task, with_cache=True)
    if known is not None and not options.overwrite:
        check_replaced(output, task=known)
    base = check_base(model, adapter, task, fields, base_quantization)
    if not options.overwrite:
        recorded = None if model or fields is None else fields.get(RECORD)
        check_base_replaced(output, BaseSource(base, record=base_quantization or recorded))
    from gralora_fx.core.methods import method_described  # numpy comes with it

    methods = {} if fields is None else {str(adapter): method_described(fields, str(adapter))}
    options.check_model(methods=methods, task=known or (TEXT_TO_TEXT if _is_pair(base) else None))
    for each in traced:
        each.check(known)
    _check_apart(output, (base, adapter))
    return base


def check_base(
    model: str | None,
    adapter: str | None,
    task: str | None,
    fields: Mapping[str, object] | None,
    base_quantization: str | None = None,
) -> str:
    """Check the base and the options that depend on it; return its name."""
    if adapter is not None and fields is not None:
        check_adapter_task(str(fields.get("task_type")), task, adapter)
    base = base_name(model, adapter, fields)
    directory = check_model_files(base, TraceError, named_by=None if model else adapter)
    if base_quantization is not None and directory is not None:
        asked = BaseQuantization.of(base_quantization)
        check_not_packed(read_json_object(directory / MODEL_FILE, TraceError), base, asked, TraceError)
    recorded = None if model or fields is None else fields.get(RECORD)
    check_rounding(base_quantization or needed_quantization(recorded, base))
    return base


def _is_pair(base: str) -> bool:
    """Return whether a base is an encoder-decoder that is exported with its cache if no task is given."""
    directory = local_directory(base, TraceError)
    if directory is None:
        return False
    fields = read_json_object(directory / "config.json", TraceError)
    return bool(fields.get("is_encoder_decoder")) and "ForConditionalGeneration" in str(fields.get("architectures"))


def _check_apart(output: Path, sources: Iterable[str | None]) -> None:
    """Check that no input lies in the output directory, which is replaced."""
    target = output.resolve()
    for source in filter(None, sources):
        directory = local_directory(source, ExportError)
        if directory is not None and (found := directory.resolve()) and (found == target or target in found.parents):
            raise ExportError(
                f"{source} lies within the output {output}, which is replaced whole; give another output directory"
            )
