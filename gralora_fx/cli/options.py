"""The options of commands that no record declares, those of several commands first."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from gralora_fx.base.features import parts
from gralora_fx.cli.values import file_name, model_option, quantization_words, task_name, text_option, utf8
from gralora_fx.cli.wording import REQUIRED
from gralora_fx.core.config.option import MODEL, WRITTEN
from gralora_fx.format.tasks import task_names

_FORMS = [form for form in parts("weight forms") if form.texts]  # whose names and help are those of an option


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"gralora-fx {version('gralora-fx')}")
        raise typer.Exit


Model = Annotated[
    str | None,
    model_option(
        help="Take this base model: a local directory or a Hugging Face hub id.  [default: the one that the adapter "
        "names]",
        rich_help_panel=MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    model_option(
        help="Take this GraLoRA, LoRA or DoRA adapter, as PEFT saves it: a local directory or a Hugging Face hub id.",
        rich_help_panel=MODEL,
    ),
]
Task = Annotated[
    str | None,
    text_option(
        metavar="TASK",
        help=f"Use the model for this task: {', '.join(task_names())}.  [default: the adapter's or the model's own]",
        callback=task_name,
        rich_help_panel=MODEL,
    ),
]
BaseQuantization = Annotated[
    str | None,
    text_option(
        metavar="|".join(form.metavar for form in _FORMS) or "FORM",
        help=f"{' '.join(form.help for form in _FORMS)}  [default: what an adapter that names the base says]",
        callback=quantization_words,
        rich_help_panel=MODEL,
    ),
]
StrictBase = Annotated[
    bool,
    typer.Option(
        "--strict-base",
        help="Refuse an adapter that is not known to be of this base, instead of warning.",
        rich_help_panel=MODEL,
    ),
]
Output = Annotated[
    Path, text_option(metavar="DIR", help="Write to this directory, which is new, empty or an earlier export.")
]
Onnx = Annotated[Path, text_option("--onnx", metavar="DIR", help="Read the export in this directory.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print every figure of the report, not three lines alone.")
]
Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
]
# of inspect
Html = Annotated[
    Path | None, text_option(metavar="FILE", help="Write a web page that shows the model and each update to this file.")
]
Svg = Annotated[Path | None, text_option(metavar="FILE", help="Write the picture alone to this file.")]
Full = Annotated[bool, typer.Option("--full", help="Draw every layer, instead of one for each run of equal layers.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an earlier export, even one of another base or task, or with more adapters.",
        rich_help_panel=WRITTEN,
    ),
]
# of export-adapter, fold, to-lora and merge
OnnxOrFile = Annotated[
    Path,
    text_option("--onnx", metavar="DIR", help="Read the export in this directory, or another exporter's ONNX file."),
]
SavedAdapter = Annotated[
    str,
    model_option(
        "--adapter",
        help="Take this GraLoRA, LoRA or DoRA adapter, as PEFT saves it: a local directory or a Hugging Face hub id.",
    ),
]
LoraFormAdapter = Annotated[  # DoRA's update is not that of a plain LoRA
    str,
    model_option(
        "--adapter",
        help="Take this GraLoRA or LoRA adapter, as PEFT saves it: a local directory or a Hugging Face hub id.",
    ),
]
AdapterName = Annotated[
    str,
    text_option(
        "--adapter-name", "--name", metavar="NAME", help="Give the adapter this name in the export.", callback=file_name
    ),
]
OverwriteAdapter = Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that has the same name.")]
Base = Annotated[
    str | None,
    model_option(
        "--model",
        "--base",
        help="Read the base model too, a local directory or a Hugging Face hub id: it finds weights that have no known "
        "name, checks the others, and is what --requantize rounds.",
    ),
]
Requantize = Annotated[
    bool, typer.Option("--requantize", help="Round the weights of an int4 or int8 export again, best with --model.")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Write the result even if rounding loses half of an update, or an earlier adapter is incompatible.",
    ),
]
Result = Annotated[Path, text_option("--output", metavar="DIR", help="Write to this directory, which is new or empty.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output directory.")]
Rank = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Shorten every update to this rank, which loses a part of it.  [default: the exact rank]"
    ),
]
# of serve and generate, which took the directory without a name before
OnnxToRun = Annotated[
    Path | None,
    text_option("--onnx", metavar="DIR", help="Read the export in this directory.", rich_help_panel=REQUIRED),
]
Directory = Annotated[Path | None, typer.Argument(metavar="DIR", hidden=True, callback=utf8)]
# of demo
DemoOutput = Annotated[Path, text_option(metavar="DIR", help="Write to this directory.")]
Epochs = Annotated[int, typer.Option(min=1, metavar="N", help="Train MiniLM on all texts this many times.")]
Seed = Annotated[
    int, typer.Option(metavar="N", help="Draw the split, the first values and the batches from this seed.")
]
