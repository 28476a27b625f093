"""The options of commands that no record declares, those of several commands first."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from gralora_fx.cli.help import REQUIRED
from gralora_fx.cli.values import file_name, model_name, quantization_words, task_name, utf8
from gralora_fx.config.option import MODEL, WRITTEN
from gralora_fx.config.tasks import TASKS


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"gralora-fx {version('gralora-fx')}")
        raise typer.Exit


_TASKS = "\n".join(TASKS)
Model = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|ID",
        help="Base model: a local directory or a hub id. Left out: the one that the adapter names.",
        callback=model_name,
        rich_help_panel=MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|ID",
        help="PEFT-format GraLoRA, LoRA or DoRA adapter: a local directory or a hub id.",
        callback=model_name,
        rich_help_panel=MODEL,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help=f"Task, by optimum's names. Left out: the adapter's or the model's own.\n\n\b\n{_TASKS}",
        callback=task_name,
        rich_help_panel=MODEL,
    ),
]
BaseQuantization = Annotated[
    str | None,
    typer.Option(
        metavar="nf4[-double][-N][-DTYPE]",
        help="Take the base as a QLoRA adapter was trained on it, its layers rounded by bitsandbytes: nf4, nf4-double. "
        "A checkpoint that is in four bits needs none.  [default: what an adapter that names the base says]",
        callback=quantization_words,
        rich_help_panel=MODEL,
    ),
]
StrictBase = Annotated[
    bool,
    typer.Option(
        "--strict-base",
        help="Refuse an adapter that is not known to be of this base, rather than warn.",
        rich_help_panel=MODEL,
    ),
]
Output = Annotated[
    Path,
    typer.Option(metavar="DIR", help="The export directory to write: new, empty or an earlier export.", callback=utf8),
]
Onnx = Annotated[Path, typer.Option("--onnx", metavar="DIR", help="The directory of an export.", callback=utf8)]
Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
]
# of inspect
Html = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also write a page with the graph's picture and heat maps.", callback=utf8),
]
Svg = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the picture alone.", callback=utf8)]
Full = Annotated[bool, typer.Option("--full", help="Draw every layer, rather than one for each run of equal layers.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an earlier export of another base or task, or with more adapters.",
        rich_help_panel=WRITTEN,
    ),
]
# of export-adapter, fold, to-lora and merge
OnnxOrFile = Annotated[
    Path,
    typer.Option(
        "--onnx", metavar="DIR", help="The directory of an export, or another exporter's ONNX file.", callback=utf8
    ),
]
SavedAdapter = Annotated[
    str,
    typer.Option(
        "--adapter",
        metavar="DIR|ID",
        help="PEFT-format GraLoRA, LoRA or DoRA adapter: a local directory or a hub id.",
        callback=model_name,
    ),
]
LoraFormAdapter = Annotated[  # DoRA's update is not that of a plain LoRA
    str,
    typer.Option(
        "--adapter",
        metavar="DIR|ID",
        help="PEFT-format GraLoRA or LoRA adapter: a local directory or a hub id.",
        callback=model_name,
    ),
]
AdapterName = Annotated[
    str,
    typer.Option(
        "--adapter-name", "--name", metavar="NAME", help="Name of the adapter in the export.", callback=file_name
    ),
]
OverwriteAdapter = Annotated[bool, typer.Option("--overwrite", help="Replace an adapter of the same name.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--base",
        metavar="DIR|ID",
        help="Base model, a local directory or a hub id: to find weights by value, check them, and quantize from.",
        callback=model_name,
    ),
]
Requantize = Annotated[
    bool, typer.Option("--requantize", help="Quantize weights of an int4 or int8 export again, best with --model.")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Write it though rounding takes half of an update away, or an earlier adapter does not go with it.",
    ),
]
Result = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="The directory to write: new or empty.", callback=utf8)
]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output directory.")]
Rank = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Truncate every update to this rank by its singular values.  [default: the exact rank]"
    ),
]
# of serve, generate and export-triton, which took the directory without a name before
OnnxToRun = Annotated[
    Path | None,
    typer.Option("--onnx", metavar="DIR", help="The directory of an export.", callback=utf8, rich_help_panel=REQUIRED),
]
Directory = Annotated[Path | None, typer.Argument(metavar="DIR", hidden=True, callback=utf8)]
# of export-triton
Repository = Annotated[
    Path,
    typer.Option("--output", metavar="DIR", help="The model repository, whose other models stay.", callback=utf8),
]
ModelName = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the model.  [default: the export directory's]", callback=utf8),
]
AdapterFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=FILE",
        help="An .onnx_adapter file beside those of the export, which holds adapters as data; may be repeated.",
        callback=utf8,
    ),
]
TritonBatch = Annotated[
    int, typer.Option("--max-batch", min=1, metavar="N", help="Most rows that Triton runs together.")
]
TritonThreads = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Threads of an operator.  [default: ONNX Runtime's choice]"),
]
ReplaceModel = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier model of the name.")]
# of demo
DemoOutput = Annotated[Path, typer.Option(metavar="DIR", help="Where to write.", callback=utf8)]
Epochs = Annotated[int, typer.Option(min=1, metavar="N", help="Passes of MiniLM over the training texts.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the split, the initial values and the batches.")]
