"""The command line: `gralora-fx inspect | export | verify | demo`."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from gralora_fx.config.tasks import TASKS, check_task
from gralora_fx.errors import ConfigError, ExportError, GraloraError
from gralora_fx.exporters.options import LEVELS, LOGITS, PRECISIONS, QUANTIZATIONS, ExportOptions, check_choice
from gralora_fx.progress.console import StageProgress
from gralora_fx.progress.gc_pause import fewer_collections
from gralora_fx.progress.timing import timed

app = typer.Typer(
    name="gralora-fx",
    help="Rewrite traced models with GraLoRA adapters, export them to ONNX and check the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_shown: set[str] = set()  # warnings
_notes = Console(stderr=True, highlight=False, soft_wrap=True)


def _utf8(value: Any) -> Any:
    """A value of an option, or several, whose bytes are text: what the system hands over is not always."""
    for part in value if isinstance(value, (list, tuple)) else [value]:
        try:
            str(part).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{str(part)[:80]!a} is not valid UTF-8; give text in UTF-8") from error
    return value


def _name(name: str | None) -> str | None:
    """A directory or hub id, which is not empty."""
    if name is not None and not name.strip():
        raise ConfigError("--model and --adapter take a local directory or a hub id, but one of them is empty")
    return _utf8(name)  # type: ignore[no-any-return]


def _task(task: str | None) -> str | None:
    """A task's name, checked before anything is imported."""
    check_task(_utf8(task))
    return task


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"gralora-fx {version('gralora-fx')}")
        raise typer.Exit


def _either(choices: tuple[str, ...]) -> str:
    """How the help shows choices."""
    return f"[{'|'.join(choices)}]"


_TASKS = "\n".join(TASKS)
Model = Annotated[str | None, typer.Option(help="Base model: a local directory or a hub id.", callback=_name)]
Adapter = Annotated[
    str | None, typer.Option(help="PEFT-format GraLoRA adapter: a local directory or a hub id.", callback=_name)
]
Task = Annotated[
    str | None,
    typer.Option(metavar="TASK", help=f"Task, by optimum's names:\n\n\b\n{_TASKS}", callback=_task),
]
Output = Annotated[Path, typer.Option(help="The export directory.", callback=_utf8)]


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def inspect(
    model: Model = None,
    adapter: Adapter = None,
    task: Task = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page with the graph's picture and heat maps.", callback=_utf8),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Also write the picture alone.", callback=_utf8)] = None,
    full: Annotated[bool, typer.Option("--full", help="Draw layers that look alike one by one.")] = False,
) -> None:
    """Trace a model and print its linear call sites, or what an adapter does with each of them."""
    from gralora_fx.loading.models import load_base, trace_base
    from gralora_fx.model.gralora_model import GraloraModel
    from gralora_fx.picture import html_of, save, svg_of

    with StageProgress():
        base = load_base(model, adapter, task)
        loaded = trace_base(base)
        drawn = [save(draw(loaded, full=full), path) for draw, path in ((html_of, html), (svg_of, svg)) if path]
    for path in drawn:
        _notes.print(f"wrote {path}")
    if base.report is not None:
        print(base.report.describe(base.supplied))
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
    precision: Annotated[
        str, typer.Option(metavar=_either(PRECISIONS), help="Precision of weights and cache.")
    ] = "fp32",
    quantize: Annotated[
        str | None, typer.Option(metavar=_either(QUANTIZATIONS), help="Store matrices as blocks of small integers.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Quantized values that share a scale: a power of two, 16 or more.  [default: 32]")
    ] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            metavar="[0|1|2|3|4]",
            help="How quantized weights multiply: 0 the runtime's choice, 1 float32, 2 float16, 3 bfloat16, 4 int8, "
            "the fastest.  [default: 4]",
        ),
    ] = None,
    logits: Annotated[
        str, typer.Option(metavar=_either(LOGITS), help="Of a model with a cache: logits of the last position, or all.")
    ] = "last",
    allow_random_head: Annotated[
        bool, typer.Option("--allow-random-head", help="Export a head that the checkpoint lacks, with random values.")
    ] = False,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Leave the base's tokenizer out.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read weights one by one while writing; nothing is compared.")
    ] = False,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar=_either(LEVELS),
            help="How thoroughly to compare with PyTorch.  [default: quick]",
        ),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Leave the comparison with PyTorch out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export of another base or task.")
    ] = False,
    dump: Annotated[
        Path | None, typer.Option(help="Write the graph to this directory after each pass.", callback=_utf8)
    ] = None,
) -> None:
    """Fold an adapter into its base model, export it to ONNX and compare it with PyTorch.

    A causal language model is exported with a cache, so that it generates; --task text-generation leaves it out.
    """
    options = _export_options(
        {"precision": precision, "quantize": quantize, "logits": logits, "verify": verify},
        {"block_size": block_size, "accuracy_level": accuracy_level},
        no_verify=no_verify,
        stream=stream,
    )
    with StageProgress(), fewer_collections():
        with timed("import"):
            from gralora_fx.config.adapter_tasks import asked_task
            from gralora_fx.exporters import export_onnx
            from gralora_fx.exporters.artifact.staging import check_output, check_replaced
            from gralora_fx.loading.models import base_name, load_traced
            from gralora_fx.loading.tokenizers import load_tokenizer
            from gralora_fx.model.model_class import without_trainer
        gc.freeze()  # what was imported stays, and need not be looked through again
        check_output(output)
        known = asked_task(adapter, task, with_cache=True)
        if known is not None and not overwrite:
            check_replaced(output, task=known)
        tokenizer = None if no_tokenizer else load_tokenizer(base_name(model, adapter))
        options_of_load = {"with_cache": True, "stream": stream, "allow_random_head": allow_random_head}
        with without_trainer():
            loaded = load_traced(model, adapter, task, **options_of_load)
        gc.freeze()
        report = export_onnx(loaded, output, tokenizer=tokenizer, overwrite=overwrite, dump=dump, **options)
    print(report)
    if stream and not no_verify:
        _notes.print("not compared with PyTorch, since the weights were streamed; run gralora-fx verify")


def _export_options(
    options: dict[str, Any], blocks: dict[str, int | None], *, no_verify: bool, stream: bool
) -> dict[str, Any]:
    """Options of `export_onnx`, checked before anything is imported.

    Args:
        options: Those that stand by themselves.
        blocks: Those that need `--quantize`; None where they were not given.
        no_verify: Whether the comparison is left out.
        stream: Whether there is nothing to compare with.

    Raises:
        ConfigError: An option has no effect beside the others.
        ExportError: A value is not among its choices.
    """
    given = {name: value for name, value in blocks.items() if value is not None}
    if given and options["quantize"] is None:
        option = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{option} has no effect without --quantize; give --quantize too, or leave it out")
    if options["verify"] is not None and (no_verify or stream):
        other = "--no-verify" if no_verify else "--stream, which leaves nothing to compare with"
        raise ConfigError(f"--verify {options['verify']} contradicts {other}; leave one of them out")
    level = options["verify"] or not (no_verify or stream)
    found = {**options, **given, "verify": level}
    ExportOptions(**found)  # which checks them
    return found


@app.command()
def verify(
    output: Output,
    model: Model = None,
    adapter: Adapter = None,
    task: Task = None,
    allow_random_head: Annotated[
        bool, typer.Option("--allow-random-head", help="For an export that was made with it.")
    ] = False,
    level: Annotated[
        str | None,
        typer.Option("--verify", metavar=_either(LEVELS), help="How thoroughly to compare.  [default: full]"),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt of one's own, for an export that generates; may be repeated.", callback=_utf8),
    ] = None,
    files: Annotated[
        bool, typer.Option("--files", help="Only compare every file with its size and digest; needs no model.")
    ] = False,
) -> None:
    """Compare an export's files with their digests, then with the PyTorch model on fresh inputs.

    One that generates is compared by its greedy tokens too.
    """
    check_choice("verify", level or "full", LEVELS)
    if files:
        others = {"--model": model, "--adapter": adapter, "--task": task, "--prompt": prompt, "--verify": level}
        _verify_files(output, [name for name, value in others.items() if value])
        return
    with StageProgress(), fewer_collections():
        with timed("import"):
            from gralora_fx.exporters import verify_onnx
            from gralora_fx.exporters.verification.manifest_adapters import check_given_adapter
            from gralora_fx.loading.models import load_traced
            from gralora_fx.model.model_class import without_trainer
            from gralora_fx.runtime.export_files import check_files
            from gralora_fx.runtime.manifest import read_manifest
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
            loaded = load_traced(model, adapter, exported or task, allow_random_head=allow_random_head)
        with timed("verify"):
            options: dict[str, Any] = {"level": level or "full", "prompts": prompt or None, "check": False}
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
def demo(
    output: Annotated[Path, typer.Option(help="Where to write.", callback=_utf8)] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training texts.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the split, the initial values and the batches.")] = 0,
) -> None:
    """Train MiniLM to sort BBC news with GraLoRA, merge, export, verify and classify on ONNX Runtime."""
    from gralora_fx.demo import run

    run(output, epochs=epochs, seed=seed)


_ENDS = {130: "interrupted", 143: "terminated"}  # the shell's statuses for SIGINT and SIGTERM
_CLOSED = 141  # its status for SIGPIPE


def main() -> None:
    """Run the command line; errors of gralora-fx end it with a line, and one for each problem, and status 1."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _show_warning
    warnings.simplefilter("ignore", FutureWarning)  # for who calls the libraries underneath
    try:
        app()
    except GraloraError as error:
        _notes.print(f"error: {error}", markup=False)
        sys.exit(1)
    except SystemExit as end:
        if end.code in _ENDS:
            _notes.print(f"{_ENDS[end.code]}; nothing was left half written")
        _flush(end)
        raise
    finally:
        gc.freeze()  # what is left goes with the process; to look through it once more takes a second


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning as a line of its own, without the line of code that it was raised for."""
    text = str(message)
    if text not in _shown:  # an adapter's configuration is read by several stages
        _shown.add(text)
        _notes.print(f"warning: {text}", markup=False)


def _flush(end: SystemExit) -> None:
    """Write what was printed; a reader that has gone, as `head` does, is told by the status alone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter flushes once more
        end.code = end.code or _CLOSED


def _terminate(number: int, _: object) -> NoReturn:
    """End as by an error, so that what was begun is cleaned up; the status is the shell's for a signal."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
