"""The commands: what each option leads to, in the order of its steps."""

from __future__ import annotations

import gc
import sys
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import gralora_fx.cli.options as opt
from gralora_fx.cli.generate import generate
from gralora_fx.cli.help import Command
from gralora_fx.cli.request import check_inspection, check_request, exported_name
from gralora_fx.cli.serve import serve
from gralora_fx.config.checks import check_integer
from gralora_fx.errors import ConfigError, ExportError
from gralora_fx.exporters.options import LEVELS, check_choice
from gralora_fx.progress.console import Heartbeat, StageProgress
from gralora_fx.progress.stages import gc_pause, timed
from gralora_fx.runtime.manifest import read_manifest

app = typer.Typer(
    name="gralora-fx",
    help="Rewrite traced models with GraLoRA or LoRA adapters, export them to ONNX and check the result.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
notes = Console(stderr=True, highlight=False, soft_wrap=True)


command = partial(app.command, cls=Command)


@app.callback()
def _program(context: typer.Context, _: opt.Version = False) -> None:
    """Handle options of the program itself."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@command()
def inspect(
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    task: opt.Task = None,
    html: opt.Html = None,
    svg: opt.Svg = None,
    full: opt.Full = False,
    strict_base: opt.StrictBase = False,
) -> None:
    """Trace a model and print its linear call sites, or what an adapter does at each of them."""
    check_inspection(model, adapter, task, (html, svg))
    from gralora_fx.graph.site_table import site_table
    from gralora_fx.loading.bases import load_base, trace_base
    from gralora_fx.model.gralora_model import GraloraModel
    from gralora_fx.picture import html_of, save, svg_of

    with StageProgress():
        base = load_base(model, adapter, task, strict_base=strict_base)
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
    tied = {site.path: ", ".join(site.tied_with) for site in traced.sites if site.tied_with}
    print(site_table(traced.sites, {"tied with": tied}))
    print(f"{len(traced.sites)} sites; parameters: {traced.tree.parameter_count:,}")


@command()
def export(
    output: opt.Output,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    task: opt.Task = None,
    adapters: opt.AdaptersMode = "merged",
    adapter_name: opt.ExportedName = None,
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
    strict_base: opt.StrictBase = False,
) -> None:
    """Export a model to ONNX, an adapter folded into it or as data beside it, and compare it with PyTorch.

    A causal language model is exported with a cache, so that it generates; --task text-generation leaves it out.
    An export that holds adapters as data takes others later, with export-adapter: at the layers of --adapter, and
    with its gralora_k where the export has GraLoRA's blocks, which is printed.
    """
    options = opt.export_options(
        {
            "adapters": adapters,
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
    base = check_request(
        opt.checked(options),
        output,
        model=model,
        adapter=adapter,
        adapter_name=adapter_name,
        task=task,
        image_size=size,
        overwrite=overwrite,
        dump=dump,
    )
    with StageProgress(), gc_pause():
        with timed("import"):
            from gralora_fx.adapters.adapter_paths import check_adapter_name
            from gralora_fx.exporters import export_onnx
            from gralora_fx.loading.bases import load_traced
            from gralora_fx.loading.tokenizers import load_tokenizer
            from gralora_fx.model.model_class import without_trainer
        gc.freeze()  # imported objects stay alive and need not be scanned again
        named = adapter_name or "default"
        check_adapter_name(named)
        tokenizer = None if no_tokenizer else load_tokenizer(base)
        if texts is not None and tokenizer is None:
            raise ExportError(f"--texts needs a tokenizer, and {base} has none; leave it out")
        options_of_load: dict[str, Any] = {"with_cache": True, "stream": stream, "allow_random_head": allow_random_head}
        options_of_load["strict_base"] = strict_base
        with without_trainer():
            loaded = load_traced(model, adapter, task, adapter_name=named, image_size=size, **options_of_load)
        gc.freeze()
        report = export_onnx(loaded, output, tokenizer=tokenizer, overwrite=overwrite, dump=dump, **options)
    print(report)
    if stream and not no_verify:
        notes.print("not compared with PyTorch, since the weights were streamed; run gralora-fx verify")


@command("export-adapter")
def export_adapter(
    onnx: opt.Onnx,
    adapter: opt.SavedAdapter,
    name: opt.AdapterName = "default",
    overwrite: opt.OverwriteAdapter = False,
    strict_base: opt.StrictBase = False,
) -> None:
    """Add a PEFT adapter to an export that takes adapters as data, without loading a model."""
    with StageProgress(), timed("export adapter"):
        from gralora_fx.exporters import export_adapter as write

        path = write(adapter, onnx, name, overwrite=overwrite, strict_base=strict_base)
    print(f"wrote {path} ({path.stat().st_size:,} bytes) and {path.with_suffix('.json').name}")


@command()
def fold(
    onnx: opt.OnnxOrFile,
    adapter: opt.SavedAdapter,
    output: opt.Output,
    base: opt.Base = None,
    requantize: opt.Requantize = False,
    force: opt.Force = False,
    overwrite: opt.Overwrite = False,
    strict_base: opt.StrictBase = False,
) -> None:
    """Fold an adapter into an exported model by changing its weights alone; needs no model."""
    with StageProgress(), gc_pause():
        with timed("import"):
            from gralora_fx.exporters import fold_onnx
        given: dict[str, Any] = {"base": base, "requantize": requantize, "force": force, "overwrite": overwrite}
        report = fold_onnx(onnx, adapter, output, strict_base=strict_base, **given)
    print(report)
    if report.adapter_name is not None:
        each = " with --adapter for each of them" if len(report.adapters) > 1 else ""
        notes.print(f"not compared with PyTorch, which needs the model; run gralora-fx verify{each}")


@command()
def verify(
    onnx: opt.Verified,
    model: opt.Model = None,
    adapter: opt.FoldedAdapters = None,
    adapter_name: opt.VerifiedName = None,
    task: opt.Task = None,
    allow_random_head: opt.ExportedHead = False,
    level: opt.Level = None,
    prompt: opt.Prompts = None,
    provider: opt.Provider = None,
    provider_option: opt.ProviderOption = None,
    files: opt.Files = False,
    strict_base: opt.StrictBase = False,
) -> None:
    """Compare an export's files with their digests, then with the PyTorch model on fresh inputs.

    One that generates is compared by its greedy tokens too. --provider runs the export as it will be served.
    """
    check_choice("verify", level or "full", LEVELS)
    of_provider = opt.provider_options(provider, provider_option)
    if files:
        others = {"--model": model, "--adapter": adapter, "--task": task, "--prompt": prompt, "--verify": level}
        others |= {"--provider": provider, "--adapter-name": adapter_name}
        _verify_files(onnx, [name for name, value in others.items() if value])
        return
    if provider is not None:
        from gralora_fx.runtime.options import runtime_of

        runtime_of(provider, of_provider, None, None)
    manifest = read_manifest(onnx)  # before anything slow is imported
    with StageProgress(), gc_pause():
        with timed("import"):
            from gralora_fx.exporters import verify_onnx
            from gralora_fx.exporters.verification.manifest_adapters import check_given_adapters
            from gralora_fx.loading.bases import load_traced
            from gralora_fx.model.model_class import without_trainer
            from gralora_fx.runtime.export_files import check_files
        exported = manifest.task
        if exported is not None and task not in (None, exported):
            raise ExportError(f"{onnx} was exported for the task {exported}, not {task}; leave --task out")
        if prompt and exported != "text-generation-with-past":
            raise ExportError(
                f"{onnx} was exported for the task {exported}, which generates no text; leave --prompt out"
            )
        given = adapter or []
        if adapter_name is not None and not given:
            raise ConfigError(
                f"--adapter-name {adapter_name} has no effect without --adapter; give it, or leave it out"
            )
        check_given_adapters(manifest, str(onnx), given)
        named = exported_name(onnx, manifest, adapter_name)
        if manifest.files:  # a comparison runs some tokens only, and would not see every changed byte
            with timed("files"):
                check_files(onnx, manifest, digests=True)
        with without_trainer():
            loaded = load_traced(
                model,
                given[0] if given else None,
                exported or task,
                allow_random_head=allow_random_head,
                image_size=manifest.image_size,
                strict_base=strict_base,
                others=given[1:],
            )
        with timed("verify"):
            options: dict[str, Any] = {"level": level or "full", "prompts": prompt or None, "check": False}
            options |= {"providers": provider, "provider_options": of_provider}
            options["adapter_name"] = named if given else None  # a base alone has no adapter to look for
            report = verify_onnx(onnx, loaded, **options)
    print(report)
    if not report.passed:
        raise typer.Exit(1)


def _verify_files(output: Path, others: list[str]) -> None:
    from gralora_fx.runtime.export_files import check_files

    if others:
        raise ExportError(f"--files compares files alone, so {', '.join(others)} would have no effect; leave it out")
    with StageProgress(), timed("verify files"):
        count = check_files(output, read_manifest(output), digests=True)
    print(f"{count} files of {output} are what was exported")


@command()
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


@command()
def merge(
    adapter: opt.SavedAdapter,
    output: opt.Result,
    model: opt.Model = None,
    overwrite: opt.Replace = False,
    strict_base: opt.StrictBase = False,
) -> None:
    """Fold an adapter into the safetensors files of its base, one tensor at a time, and copy the other files."""
    with StageProgress():
        with timed("import"):
            from gralora_fx.exporters.checkpoint import merge_checkpoint
            from gralora_fx.loading.adapter_facts import base_name
        name = base_name(model, adapter)
        report = merge_checkpoint(name, adapter, output, overwrite=overwrite, strict_base=strict_base)
    print(report)


command()(serve)
command()(generate)


@command("export-triton")
def export_triton(
    output: opt.Repository,
    onnx: opt.OnnxToRun = None,
    directory: opt.Directory = None,
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
        report = write(
            opt.export_directory(onnx, directory),
            output,
            name=name,
            adapters=opt.read_adapters(adapter),
            max_batch=max_batch,
            threads=threads,
            overwrite=overwrite,
        )
    print(report)


@command()
def demo(output: opt.DemoOutput = Path("runs/demo"), epochs: opt.Epochs = 1, seed: opt.Seed = 0) -> None:
    """Train MiniLM to sort BBC news with GraLoRA, merge, export, verify and classify on ONNX Runtime."""
    with Heartbeat(Console(file=sys.stdout, highlight=False)) as heartbeat:
        heartbeat.begin("import")
        from gralora_fx.demo import run

    run(output, epochs=epochs, seed=seed)
