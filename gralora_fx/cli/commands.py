"""The commands, each a short list of steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import gralora_fx.cli.options as opt
from gralora_fx.base.compat.packages import require_extra
from gralora_fx.base.progress.console import CommandProgress
from gralora_fx.base.progress.stages import gc_pause, quiet, timed
from gralora_fx.base.sources.model_files import RECORD
from gralora_fx.cli.export import check_base, export
from gralora_fx.cli.generate import generate
from gralora_fx.cli.serve import serve
from gralora_fx.cli.values import check_rounding
from gralora_fx.cli.verify import verify
from gralora_fx.cli.wording import Command, Group, notes, show
from gralora_fx.core.config.checks import check_integer
from gralora_fx.core.config.reading import config_fields
from gralora_fx.core.loading.adapter_facts import base_name, needed_quantization
from gralora_fx.errors import GraloraError
from gralora_fx.exporters.artifact.staging import check_file

app = typer.Typer(
    name="gralora-fx",
    cls=Group,
    help="Turn a model with a GraLoRA, LoRA or DoRA adapter into a checked ONNX model, and run it.",
    epilog="gralora-fx export --model BASE --adapter ADAPTER --output onnx",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def command(name: str | None = None, *, example: str) -> Callable[[Any], Any]:
    """Add a command, whose help leads with an example."""
    return app.command(name, cls=Command, epilog=f"gralora-fx {example}")


@app.callback()
def _program(context: typer.Context, _: opt.Version = False) -> None:
    """Handle options of the program itself."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@command(example="inspect --model BASE --adapter ADAPTER --html graph.html")
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
    """Show a model's layers and what an adapter changes.

    Without --adapter it lists the linear layers, which an adapter can change; with one, also what it does at each, and
    why it leaves out the others.
    """
    check_base(model, adapter, task, None if adapter is None else config_fields(adapter)[0], base_quantization)
    for path in filter(None, (html, svg)):
        check_file(path)
    from gralora_fx.core.graph.sites import site_table
    from gralora_fx.core.loading.bases import load_base, trace_base
    from gralora_fx.core.model.gralora_model import GraloraModel
    from gralora_fx.picture import html_of, save, svg_of

    with CommandProgress():
        base = load_base(model, adapter, task, strict_base=strict_base, base_quantization=base_quantization)
        loaded = trace_base(base)
        written = [save(draw(loaded, full=full), path) for draw, path in ((html_of, html), (svg_of, svg)) if path]
    for path in written:
        notes.print(f"wrote {path}")
    if base.report is not None:
        print(base.report.describe(base.supplied))
    traced = loaded.traced if isinstance(loaded, GraloraModel) else loaded
    for facts in traced.signature.facts.values():
        print(f"{facts.title}: {facts}")
    for limit in traced.signature.limits:
        print(f"size: {limit}")
    if isinstance(loaded, GraloraModel):
        print(loaded.plans["default"])
        return
    tied = {site.path: ", ".join(site.tied_with) for site in traced.sites if site.tied_with}
    print(site_table(traced.sites, {"tied with": tied}))
    print(f"{len(traced.sites)} sites; parameters: {traced.tree.parameter_count:,}")


command(example="export --model BASE --adapter ADAPTER --output onnx")(export)
command(example="verify --onnx onnx --model BASE --adapter ADAPTER")(verify)
command(example="generate --onnx onnx --prompt 'The capital of France is'")(generate)
command(example="serve --onnx onnx --port 8000")(serve)


@command("export-adapter", example="export-adapter --onnx onnx --adapter ADAPTER --adapter-name news")
def export_adapter(
    onnx: opt.Onnx,
    adapter: opt.LoraFormAdapter,
    name: opt.AdapterName = "default",
    overwrite: opt.OverwriteAdapter = False,
    strict_base: opt.StrictBase = False,
    verbose: opt.Verbose = False,
) -> None:
    """Add an adapter to an ONNX export.

    The export was made with --adapters data or inputs, so that each call chooses its adapter. No model is loaded.
    """
    with CommandProgress(), timed("converting"):
        from gralora_fx.exporters import export_adapter as write
        from gralora_fx.exporters.adapter_export import report_of

        path = write(adapter, onnx, name, overwrite=overwrite, strict_base=strict_base)
        report = report_of(path, onnx)
    show(report, verbose=verbose, adapter=adapter, adapter_name=None if name == "default" else name)


@command(example="fold --onnx onnx --adapter ADAPTER --output folded")
def fold(
    onnx: opt.OnnxOrFile,
    adapter: opt.SavedAdapter,
    output: opt.Output,
    base: opt.Base = None,
    requantize: opt.Requantize = False,
    force: opt.Force = False,
    overwrite: opt.Overwrite = False,
    strict_base: opt.StrictBase = False,
    verbose: opt.Verbose = False,
) -> None:
    """Merge an adapter into an ONNX export, without PyTorch.

    Weights alone change, in a copy of the export; no model is loaded. verify compares the result with the model.
    """
    with CommandProgress(), gc_pause():
        with timed("importing"):
            from gralora_fx.exporters import fold_onnx
        given: dict[str, Any] = {"base": base, "requantize": requantize, "force": force, "overwrite": overwrite}
        report = fold_onnx(onnx, adapter, output, strict_base=strict_base, **given)
    others = ["DIR"] * (len(report.adapters) - 1)  # placeholders for adapters folded in earlier
    show(report, verbose=verbose, model=base, adapter=[adapter, *others])


@command(example="to-lora --adapter ADAPTER --output lora")
def to_lora(
    adapter: opt.LoraFormAdapter,
    output: opt.Result,
    rank: opt.Rank = None,
    overwrite: opt.Replace = False,
    verbose: opt.Verbose = False,
) -> None:
    """Write a GraLoRA adapter as an equal LoRA adapter.

    PEFT and servers of LoRA read it. With --rank it is the nearest adapter of that smaller rank.
    """
    if rank is not None:
        check_integer("--rank", rank, 1)
    with CommandProgress(), timed("converting"):
        from gralora_fx.exporters.lora_form import to_lora as convert

        report = convert(adapter, output, rank=rank, overwrite=overwrite)
    show(report, verbose=verbose)


@command(example="merge --model BASE --adapter ADAPTER --output merged")
def merge(
    adapter: opt.SavedAdapter,
    output: opt.Result,
    model: opt.Model = None,
    overwrite: opt.Replace = False,
    base_quantization: opt.BaseQuantization = None,
    strict_base: opt.StrictBase = False,
    verbose: opt.Verbose = False,
) -> None:
    """Merge an adapter into a model's safetensors files.

    The result is a checkpoint of transformers, with the base's other files. Memory holds one tensor at a time.
    """
    name = base_name(model, adapter)
    how: Any = base_quantization
    if how is None and model is None:
        how = needed_quantization(config_fields(adapter)[0].get(RECORD), name)
    check_rounding(how)
    with CommandProgress():
        with timed("importing"):
            from gralora_fx.exporters.checkpoint_merge import merge_checkpoint
        options: dict[str, Any] = {"overwrite": overwrite, "strict_base": strict_base, "base_quantization": how}
        report = merge_checkpoint(name, adapter, output, **options)
    show(report, verbose=verbose)


@command(example="demo --output runs/demo")
def demo(output: opt.DemoOutput = Path("runs/demo"), epochs: opt.Epochs = 1, seed: opt.Seed = 0) -> None:
    """Train two small models on news, export and ask them.

    MiniLM learns to sort BBC news with a GraLoRA adapter, and a small language model to write them.
    """
    require_extra("demo", "the demo", GraloraError)
    with CommandProgress(Console(file=sys.stdout, highlight=False), silence=0.5), timed("importing"), quiet():
        from gralora_fx.demo.run import run

    run(output, epochs=epochs, seed=seed)
