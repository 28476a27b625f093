"""The commands: what each option leads to, in the order of its steps."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from gralora_fx.cli import options as opt
from gralora_fx.cli.serve import Directory, serve
from gralora_fx.config.checks import check_integer
from gralora_fx.errors import ExportError
from gralora_fx.exporters.options import LEVELS, check_choice
from gralora_fx.progress.console import StageProgress
from gralora_fx.progress.gc_pause import gc_pause
from gralora_fx.progress.timing import timed

app = typer.Typer(
    name="gralora-fx",
    help="Rewrite traced models with GraLoRA or LoRA adapters, export them to ONNX and check the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
notes = Console(stderr=True, highlight=False, soft_wrap=True)


@app.callback()
def _program(_: opt.Version = False) -> None:
    """Handle options of the program itself."""


@app.command()
def inspect(
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    task: opt.Task = None,
    html: opt.Html = None,
    svg: opt.Svg = None,
    full: opt.Full = False,
) -> None:
    """Trace a model and print its linear call sites, or what an adapter does at each of them."""
    from gralora_fx.loading.models import load_base, trace_base
    from gralora_fx.model.gralora_model import GraloraModel
    from gralora_fx.picture import html_of, save, svg_of

    with StageProgress():
        base = load_base(model, adapter, task)
        loaded = trace_base(base)
        written = [save(draw(loaded, full=full), path) for draw, path in ((html_of, html), (svg_of, svg)) if path]
    for path in written:
        notes.print(f"wrote {path}")
    if base.report is not None:
        print(base.report.describe(base.supplied))
    traced = loaded.traced if isinstance(loaded, GraloraModel) else loaded
    if traced.signature.image_sizes is not None:
        print(f"images: {traced.signature.image_sizes}")
    if isinstance(loaded, GraloraModel):
        print(loaded.plans["default"])
        return
    print(loaded)
    for site in loaded.sites:
        tied = f"  tied with {', '.join(site.tied_with)}" if site.tied_with else ""
        print(f"{site.path}  {site.kind}  {site.in_features} -> {site.out_features}  calls={len(site.calls)}{tied}")


@app.command()
def export(
    output: opt.Output,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    task: opt.Task = None,
    adapters: opt.AdaptersMode = "merged",
    adapter_form: opt.AdapterForm = None,
    precision: opt.Precision = "fp32",
    quantize: opt.Quantize = None,
    block_size: opt.BlockSize = None,
    accuracy_level: opt.AccuracyLevel = None,
    logits: opt.Logits = "last",
    keep_padding: opt.KeepPadding = False,
    image_size: opt.ImageSizeText = None,
    allow_random_head: opt.RandomHead = False,
    no_tokenizer: opt.NoTokenizer = False,
    stream: opt.Stream = False,
    verify: opt.Verify = None,
    no_verify: opt.NoVerify = False,
    overwrite: opt.Overwrite = False,
    texts: opt.Texts = None,
    dump: opt.Dump = None,
) -> None:
    """Export a model to ONNX, an adapter folded into it or as data beside it, and compare it with PyTorch.

    A causal language model is exported with a cache, so that it generates; --task text-generation leaves it out.
    """
    options = opt.export_options(
        {
            "adapters": adapters,
            "adapter_form": adapter_form,
            "precision": precision,
            "quantize": quantize,
            "logits": logits,
            "keep_padding": keep_padding,
            "verify": verify,
        },
        {"block_size": block_size, "accuracy_level": accuracy_level},
        texts=texts,
        no_tokenizer=no_tokenizer,
        no_verify=no_verify,
        stream=stream,
    )
    size = opt.read_image_size(image_size)
    with StageProgress(), gc_pause():
        with timed("import"):
            from gralora_fx.config.adapter_tasks import requested_task
            from gralora_fx.exporters import export_onnx
            from gralora_fx.exporters.artifact.staging import check_output, check_replaced
            from gralora_fx.loading.models import base_name, load_traced
            from gralora_fx.loading.tokenizers import load_tokenizer
            from gralora_fx.model.model_class import without_trainer
        gc.freeze()  # imported objects stay alive and need not be scanned again
        check_output(output)
        known = requested_task(adapter, task, with_cache=True)
        if known is not None and not overwrite:
            check_replaced(output, task=known)
        tokenizer = None if no_tokenizer else load_tokenizer(base_name(model, adapter))
        if texts is not None and tokenizer is None:
            raise ExportError(f"--texts needs a tokenizer, and {base_name(model, adapter)} has none; leave it out")
        options_of_load = {"with_cache": True, "stream": stream, "allow_random_head": allow_random_head}
        with without_trainer():
            loaded = load_traced(model, adapter, task, image_size=size, **options_of_load)
        gc.freeze()
        report = export_onnx(loaded, output, tokenizer=tokenizer, overwrite=overwrite, dump=dump, **options)
    print(report)
    if stream and not no_verify:
        notes.print("not compared with PyTorch, since the weights were streamed; run gralora-fx verify")


@app.command("export-adapter")
def export_adapter(
    onnx: opt.Onnx,
    adapter: opt.SavedAdapter,
    name: opt.AdapterName = "default",
    overwrite: opt.OverwriteAdapter = False,
) -> None:
    """Add a PEFT adapter to an export that takes adapters as data, without loading a model."""
    with StageProgress(), timed("export adapter"):
        from gralora_fx.exporters import export_adapter as write

        path = write(adapter, onnx, name, overwrite=overwrite)
    print(f"wrote {path} ({path.stat().st_size:,} bytes) and {path.with_suffix('.json').name}")


@app.command()
def fold(
    onnx: opt.Onnx,
    adapter: opt.SavedAdapter,
    output: opt.Output,
    base: opt.Base = None,
    requantize: opt.Requantize = False,
    force: opt.Force = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Fold an adapter into an exported model by changing its weights alone; needs no model."""
    with StageProgress(), gc_pause():
        with timed("import"):
            from gralora_fx.exporters import fold_onnx
        report = fold_onnx(onnx, adapter, output, base=base, requantize=requantize, force=force, overwrite=overwrite)
    print(report)
    if report.adapter_name is not None:
        notes.print("not compared with PyTorch, which needs the model; run gralora-fx verify")


@app.command()
def verify(
    output: opt.Output,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    task: opt.Task = None,
    allow_random_head: opt.ExportedHead = False,
    level: opt.Level = None,
    prompt: opt.Prompts = None,
    provider: opt.Provider = None,
    provider_option: opt.ProviderOption = None,
    files: opt.Files = False,
) -> None:
    """Compare an export's files with their digests, then with the PyTorch model on fresh inputs.

    One that generates is compared by its greedy tokens too. --provider runs the export as it will be served.
    """
    check_choice("verify", level or "full", LEVELS)
    of_provider = opt.provider_options(provider, provider_option)
    if files:
        others = {"--model": model, "--adapter": adapter, "--task": task, "--prompt": prompt, "--verify": level}
        others["--provider"] = provider
        _verify_files(output, [name for name, value in others.items() if value])
        return
    with StageProgress(), gc_pause():
        with timed("import"):
            from gralora_fx.exporters import verify_onnx
            from gralora_fx.exporters.verification.manifest_adapters import check_given_adapter
            from gralora_fx.loading.models import load_traced
            from gralora_fx.model.model_class import without_trainer
            from gralora_fx.runtime.export_files import check_files
            from gralora_fx.runtime.manifest import read_manifest
            from gralora_fx.runtime.options import runtime_of
        if provider is not None:  # before a model is loaded
            runtime_of(provider, of_provider, None, None)
        manifest = read_manifest(output)
        exported = manifest.task
        if exported is not None and task not in (None, exported):
            raise ExportError(f"{output} was exported for the task {exported}, not {task}; leave --task out")
        if prompt and exported != "text-generation-with-past":
            raise ExportError(
                f"{output} was exported for the task {exported}, which generates no text; leave --prompt out"
            )
        check_given_adapter(manifest, str(output), adapter)
        if manifest.files:  # a comparison runs some tokens only, and would not see every changed byte
            with timed("files"):
                check_files(output, manifest, digests=True)
        with without_trainer():
            loaded = load_traced(
                model,
                adapter,
                exported or task,
                allow_random_head=allow_random_head,
                image_size=manifest.image_size,
            )
        with timed("verify"):
            options: dict[str, Any] = {"level": level or "full", "prompts": prompt or None, "check": False}
            options |= {"providers": provider, "provider_options": of_provider}
            report = verify_onnx(output, loaded, **options)
    print(report)
    if not report.passed:
        raise typer.Exit(1)


def _verify_files(output: Path, others: list[str]) -> None:
    from gralora_fx.runtime.export_files import check_files
    from gralora_fx.runtime.manifest import read_manifest

    if others:
        raise ExportError(f"--files compares files alone, so {', '.join(others)} would have no effect; leave it out")
    with StageProgress(), timed("verify files"):
        count = check_files(output, read_manifest(output), digests=True)
    print(f"{count} files of {output} are what was exported")


@app.command()
def to_lora(
    adapter: opt.SavedAdapter, output: opt.Result, rank: opt.Rank = None, overwrite: opt.Replace = False
) -> None:
    """Write a GraLoRA adapter as the exact plain LoRA checkpoint, for PEFT and whatever serves LoRA.

    With --rank also a smaller one: the nearest of that rank, with what it loses.
    """
    if rank is not None:
        check_integer("--rank", rank, 1)
    with StageProgress(), timed("convert"):
        from gralora_fx.exporters.lora import to_lora as convert

        report = convert(adapter, output, rank=rank, overwrite=overwrite)
    print(report)


@app.command()
def merge(
    adapter: opt.SavedAdapter, output: opt.Result, model: opt.Model = None, overwrite: opt.Replace = False
) -> None:
    """Fold an adapter into the safetensors files of its base, one tensor at a time, and copy the other files."""
    with StageProgress():
        with timed("import"):
            from gralora_fx.exporters.checkpoint import merge_checkpoint
            from gralora_fx.loading.models import base_name
        report = merge_checkpoint(base_name(model, adapter), adapter, output, overwrite=overwrite)
    print(report)


app.command()(serve)


@app.command("export-triton")
def export_triton(
    directory: Directory,
    output: opt.Repository,
    name: opt.ModelName = None,
    adapter: opt.AdapterFiles = None,
    max_batch: opt.TritonBatch = 8,
    threads: opt.TritonThreads = None,
    overwrite: opt.ReplaceModel = False,
) -> None:
    """Write an export into a Triton model repository, for Triton's ONNX Runtime backend."""
    with StageProgress():
        with timed("import"):
            from gralora_fx.exporters import export_triton as write
            from gralora_fx.serving.http.settings import read_adapters
        report = write(
            directory,
            output,
            name=name,
            adapters=read_adapters(adapter),
            max_batch=max_batch,
            threads=threads,
            overwrite=overwrite,
        )
    print(report)


@app.command()
def demo(output: opt.DemoOutput = Path("runs/demo"), epochs: opt.Epochs = 1, seed: opt.Seed = 0) -> None:
    """Train MiniLM to sort BBC news with GraLoRA, merge, export, verify and classify on ONNX Runtime."""
    from gralora_fx.demo import run

    run(output, epochs=epochs, seed=seed)
