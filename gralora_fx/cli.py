"""The command line: `gralora-fx inspect | export | verify | demo`."""

from __future__ import annotations

import gc
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from gralora_fx.collection import fewer_collections
from gralora_fx.errors import GraloraError
from gralora_fx.progress import StageProgress
from gralora_fx.stages import timed

app = typer.Typer(
    name="gralora-fx",
    help="Rewrite traced models with GraLoRA adapters, export them to ONNX and check the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_notes = Console(stderr=True, highlight=False, soft_wrap=True)

Model = Annotated[str | None, typer.Option(help="Base model: a local directory or a hub id.")]
Adapter = Annotated[str | None, typer.Option(help="PEFT-format GraLoRA adapter: a local directory or a hub id.")]
Task = Annotated[str | None, typer.Option(help="Task, by optimum's names, such as text-classification.")]
Output = Annotated[Path, typer.Option(help="The export directory.")]


@app.command()
def inspect(
    model: Model = None,
    adapter: Adapter = None,
    task: Task = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the graph's picture and heat maps.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Also write the picture alone.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Draw layers that look alike one by one.")] = False,
) -> None:
    """Trace a model and print its linear call sites, or what an adapter does with each of them."""
    from gralora_fx.loading import load_traced
    from gralora_fx.model import GraloraModel
    from gralora_fx.picture import html_of, save, svg_of

    with StageProgress():
        loaded = load_traced(model, adapter, task)
        drawn = [save(draw(loaded, full=full), path) for draw, path in ((html_of, html), (svg_of, svg)) if path]
    for path in drawn:
        _notes.print(f"wrote {path}")
    if isinstance(loaded, GraloraModel):
        print(loaded.plans["default"])
        return
    print(loaded)
    for site in loaded.sites:
        tied = f"  tied with {', '.join(site.tied_with)}" if site.tied_with else ""
        print(f"{site.path}  {site.kind}  {site.in_features} -> {site.out_features}  calls={len(site.calls)}{tied}")


@app.command()
def export(
    output: Output,
    model: Model = None,
    adapter: Adapter = None,
    task: Task = None,
    precision: Annotated[str, typer.Option(help="Precision of weights and cache: fp32, fp16 or bf16.")] = "fp32",
    quantize: Annotated[str | None, typer.Option(help="Store matrices as int4 or int8.")] = None,
    block_size: Annotated[int, typer.Option(help="Quantized values that share a scale.")] = 32,
    accuracy_level: Annotated[int, typer.Option(help="How quantized weights multiply; 4 is int8, the fastest.")] = 4,
    logits: Annotated[str, typer.Option(help="Of a model with a cache: logits of the last position, or all.")] = "last",
    stream: Annotated[
        bool, typer.Option("--stream", help="Read weights one by one while writing; nothing is compared.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Leave the comparison with PyTorch out.")] = False,
) -> None:
    """Fold an adapter into its base model, export it to ONNX and compare it with PyTorch.

    A causal language model is exported with a cache, so that it generates; --task text-generation leaves it out.
    """
    with StageProgress():
        with timed("import"), fewer_collections():
            from gralora_fx.exporters import export_onnx
            from gralora_fx.exporters.directory import check_output
            from gralora_fx.loading import load_traced
            from gralora_fx.model import GraloraModel
            from gralora_fx.tokenizers import load_tokenizer
        check_output(output)
        loaded = load_traced(model, adapter, task, with_cache=True, stream=stream)
        traced = loaded.traced if isinstance(loaded, GraloraModel) else loaded
        report = export_onnx(
            loaded,
            output,
            precision=precision,  # type: ignore[arg-type]  # export_onnx refuses others with a clear error
            quantize=quantize,  # type: ignore[arg-type]  # so it does here
            block_size=block_size,
            accuracy_level=accuracy_level,
            logits=logits,  # type: ignore[arg-type]  # and here
            tokenizer=load_tokenizer(model or traced.tokenizer_source or ""),
            verify=not (no_verify or stream),
        )
    print(report)
    if stream and not no_verify:
        _notes.print("not compared with PyTorch, since the weights were streamed; run gralora-fx verify")


@app.command()
def verify(
    output: Output,
    model: Model = None,
    adapter: Adapter = None,
    task: Task = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt of one's own, for an export that generates; may be repeated.")
    ] = None,
) -> None:
    """Compare an export with the PyTorch model on fresh inputs, one that generates by its greedy tokens too."""
    with StageProgress():
        with timed("import"):
            from gralora_fx.exporters import verify_onnx
            from gralora_fx.exporters.manifest import read_manifest
            from gralora_fx.loading import load_traced
        manifest = read_manifest(output)
        loaded = load_traced(model, adapter, task or manifest.get("task"))
        with timed("verify"):
            report = verify_onnx(output, loaded, prompts=prompt or None)
    print(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where to write.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training texts.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the split, the initial values and the batches.")] = 0,
) -> None:
    """Train MiniLM to sort BBC news with GraLoRA, merge, export, verify and classify on ONNX Runtime."""
    from gralora_fx.demo import run

    run(output, epochs=epochs, seed=seed)


def main() -> None:
    """Run the command line; errors of gralora-fx end it with one line and status 1."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except GraloraError as error:
        _notes.print(f"error: {'; '.join(str(error).splitlines())}", markup=False)
        sys.exit(1)
    finally:
        gc.freeze()  # what is left goes with the process; to look through it once more takes a second


def _terminate(number: int, _: object) -> NoReturn:
    """End as by an error, so that what was begun is cleaned up; the status is the shell's for a signal."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
