"""The commands: what each option leads to, in the order of its steps."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import gralora_fx.cli.options as opt
from gralora_fx.cli.export import check_base, export
from gralora_fx.cli.generate import generate
from gralora_fx.cli.help import Command
from gralora_fx.cli.serve import serve
from gralora_fx.cli.values import check_rounding, export_directory, read_adapters
from gralora_fx.cli.verify import verify
from gralora_fx.cli.wording import notes
from gralora_fx.compat.extras import require_extra
from gralora_fx.config.checks import check_integer
from gralora_fx.config.reading import config_fields
from gralora_fx.errors import GraloraError
from gralora_fx.exporters.artifact.staging import check_file
from gralora_fx.loading.adapter_facts import base_name, needed_quantization
from gralora_fx.progress.console import Heartbeat, StageProgress
from gralora_fx.progress.stages import gc_pause, timed
from gralora_fx.sources.base_quantization import RECORD

app = typer.Typer(
    name="gralora-fx",
    help="Rewrite traced models with GraLoRA, LoRA or DoRA adapters, export them to ONNX and check the result.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

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
    base_quantization: opt.BaseQuantization = None,
    strict_base: opt.StrictBase = False,
) -> None:
    """Trace a model and print its linear call sites, or what an adapter does at each of them."""
    check_base(model, adapter, task, None if adapter is None else config_fields(adapter)[0], base_quantization)
    for path in filter(None, (html, svg)):
        check_file(path)
    from gralora_fx.graph.sites import site_table
    from gralora_fx.loading.bases import load_base, trace_base
    from gralora_fx.model.gralora_model import GraloraModel
    from gralora_fx.picture import html_of, save, svg_of

    with StageProgress():
        base = load_base(model, adapter, task, strict_base=strict_base, base_quantization=base_quantization)
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


command()(export)


@command("export-adapter")
def export_adapter(
    onnx: opt.Onnx,
    adapter: opt.LoraFormAdapter,
    name: opt.AdapterName = "default",
    overwrite: opt.OverwriteAdapter = False,
    strict_base: opt.StrictBase = False,
) -> None:
    """Add a PEFT adapter to an export that takes adapters as data, without loading a model."""
    with StageProgress(), timed("converting"):
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
        with timed("importing"):
            from gralora_fx.exporters import fold_onnx
        given: dict[str, Any] = {"base": base, "requantize": requantize, "force": force, "overwrite": overwrite}
        report = fold_onnx(onnx, adapter, output, strict_base=strict_base, **given)
    print(report)
    if report.adapter_name is not None:
        each = " with --adapter for each of them" if len(report.adapters) > 1 else ""
        notes.print(f"not compared with PyTorch, which needs the model; run gralora-fx verify{each}")


command()(verify)


@command()
def to_lora(
    adapter: opt.LoraFormAdapter, output: opt.Result, rank: opt.Rank = None, overwrite: opt.Replace = False
) -> None:
    """Write a GraLoRA adapter as the exact plain LoRA checkpoint, for PEFT and whatever serves LoRA.

    With --rank also a smaller one: the nearest of that rank, with what it loses.
    """
    if rank is not None:
        check_integer("--rank", rank, 1)
    with StageProgress(), timed("converting"):
        from gralora_fx.exporters.lora_form import to_lora as convert

        report = convert(adapter, output, rank=rank, overwrite=overwrite)
    print(report)


@command()
def merge(
    adapter: opt.SavedAdapter,
    output: opt.Result,
    model: opt.Model = None,
    overwrite: opt.Replace = False,
    base_quantization: opt.BaseQuantization = None,
    strict_base: opt.StrictBase = False,
) -> None:
    """Fold an adapter into the safetensors files of its base, one tensor at a time, and copy the other files."""
    name = base_name(model, adapter)
    how: Any = base_quantization
    if how is None and model is None:
        how = needed_quantization(config_fields(adapter)[0].get(RECORD), name)
    check_rounding(how)
    with StageProgress():
        with timed("importing"):
            from gralora_fx.exporters.checkpoint_merge import merge_checkpoint
        options: dict[str, Any] = {"overwrite": overwrite, "strict_base": strict_base, "base_quantization": how}
        report = merge_checkpoint(name, adapter, output, **options)
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
        with timed("importing"):
            from gralora_fx.exporters import export_triton as write
        report = write(
            export_directory(onnx, directory),
            output,
            name=name,
            adapters=read_adapters(adapter),
            max_batch=max_batch,
            threads=threads,
            overwrite=overwrite,
        )
    print(report)


@command()
def demo(output: opt.DemoOutput = Path("runs/demo"), epochs: opt.Epochs = 1, seed: opt.Seed = 0) -> None:
    """Train MiniLM to sort BBC news with GraLoRA, and a small hybrid to write them; export, verify, and ask both."""
    require_extra("demo", "the demo", GraloraError)
    with Heartbeat(Console(file=sys.stdout, highlight=False)) as heartbeat:
        heartbeat.begin("importing")
        from gralora_fx.demo import run

    run(output, epochs=epochs, seed=seed)
