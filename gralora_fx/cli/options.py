"""The options of the commands, each declared once, checked before anything is imported."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from gralora_fx.config.tasks import TASKS, check_task
from gralora_fx.errors import ConfigError, first_line
from gralora_fx.exporters.options import (
    ADAPTER_FORMS,
    ADAPTER_MODES,
    LEVELS,
    LOGITS,
    PRECISIONS,
    QUANTIZATIONS,
    ExportOptions,
)
from gralora_fx.tracing.inputs.image_sizes import DYNAMIC, ImageSize


def utf8(value: Any) -> Any:
    """Check that an option's value is valid UTF-8, which the operating system does not guarantee."""
    for part in value if isinstance(value, (list, tuple)) else [value]:
        try:
            str(part).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{str(part)[:80]!a} is not valid UTF-8; give text in UTF-8") from error
    return value


def _name(name: str | None) -> str | None:
    """Check that a directory or hub id is not empty."""
    if name is not None and not name.strip():
        raise ConfigError("--model, --adapter and --base take a local directory or a hub id, but one of them is empty")
    return utf8(name)  # type: ignore[no-any-return]


def _task(task: str | None) -> str | None:
    """Check a task's name before anything slow is imported."""
    check_task(utf8(task))
    return task


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"gralora-fx {version('gralora-fx')}")
        raise typer.Exit


def _either(choices: tuple[str, ...]) -> str:
    """Format choices for the help."""
    return f"[{'|'.join(choices)}]"


_TASKS = "\n".join(TASKS)
Model = Annotated[str | None, typer.Option(help="Base model: a local directory or a hub id.", callback=_name)]
Adapter = Annotated[
    str | None, typer.Option(help="PEFT-format GraLoRA or LoRA adapter: a local directory or a hub id.", callback=_name)
]
Task = Annotated[
    str | None,
    typer.Option(metavar="TASK", help=f"Task, by optimum's names:\n\n\b\n{_TASKS}", callback=_task),
]
Output = Annotated[Path, typer.Option(help="The export directory.", callback=utf8)]
Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
]
# of inspect
Html = Annotated[
    Path | None, typer.Option(help="Also write a page with the graph's picture and heat maps.", callback=utf8)
]
Svg = Annotated[Path | None, typer.Option(help="Also write the picture alone.", callback=utf8)]
Full = Annotated[bool, typer.Option("--full", help="Draw every layer, rather than one for each run of equal layers.")]
# of export
AdaptersMode = Annotated[
    str,
    typer.Option(
        "--adapters",
        metavar=_either(ADAPTER_MODES),
        help="Fold the adapter into the weights, or keep adapters apart as data that every run chooses.",
    ),
]
AdapterForm = Annotated[
    str | None,
    typer.Option(
        metavar=_either(ADAPTER_FORMS),
        help="Of adapters that are data: with GraLoRA's blocks, or as plain LoRA: fewer nodes, more values.",
    ),
]
Precision = Annotated[str, typer.Option(metavar=_either(PRECISIONS), help="Precision of weights and cache.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar=_either(QUANTIZATIONS),
        help="Store matrices as blocks of small integers; int8-dynamic: multiply in int8, activations rounded too.",
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(help="Values of int8 or int4 that share a scale: a power of two, 16 or more.  [default: 32]"),
]
AccuracyLevel = Annotated[
    int | None,
    typer.Option(
        metavar="[0|1|2|3|4]",
        help="How int8 or int4 weights multiply: 0 the runtime's choice, 1 float32, 2 float16, 3 bfloat16, 4 int8, "
        "the fastest.  [default: 4]",
    ),
]
Logits = Annotated[
    str, typer.Option(metavar=_either(LOGITS), help="Of a model with a cache: logits of the last position, or all.")
]
ImageSizeText = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        metavar="[HxW|dynamic]",
        help="Images of one size, or of any.  [default: of any where the model takes them as it is, else of its own]",
    ),
]
RandomHead = Annotated[
    bool, typer.Option("--allow-random-head", help="Export a head that the checkpoint lacks, with random values.")
]
NoTokenizer = Annotated[bool, typer.Option("--no-tokenizer", help="Leave the base's tokenizer out.")]
Stream = Annotated[bool, typer.Option("--stream", help="Read weights one by one while writing; nothing is compared.")]
Verify = Annotated[
    str | None,
    typer.Option(metavar=_either(LEVELS), help="How thoroughly to compare with PyTorch.  [default: quick]"),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Leave the comparison with PyTorch out.")]
KeepPadding = Annotated[
    bool, typer.Option("--keep-padding", help="Of an encoder, compute positions of padding too; else they are zero.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export of another base or task.")]
Texts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Compare a quantized export with the model on texts, one on each line.", callback=utf8
    ),
]
Dump = Annotated[Path | None, typer.Option(help="Write the graph to this directory after each pass.", callback=utf8)]
# of export-adapter, fold, to-lora and merge
Onnx = Annotated[Path, typer.Option(help="An export directory.", callback=utf8)]
SavedAdapter = Annotated[
    str,
    typer.Option(
        "--adapter", help="PEFT-format GraLoRA or LoRA adapter: a local directory or a hub id.", callback=_name
    ),
]
AdapterName = Annotated[str, typer.Option("--name", help="Name of the adapter in the export.", callback=utf8)]
OverwriteAdapter = Annotated[bool, typer.Option("--overwrite", help="Replace an adapter of the same name.")]
Base = Annotated[
    str | None,
    typer.Option(
        help="Base model, a local directory or a hub id: to find weights by value, check them, and quantize from.",
        callback=_name,
    ),
]
Requantize = Annotated[
    bool, typer.Option("--requantize", help="Quantize weights of an int4 or int8 export again, best with --base.")
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Write it though rounding takes half of an update away, or bases differ in name."),
]
Result = Annotated[Path, typer.Option("--output", help="The directory to write: new or empty.", callback=utf8)]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output directory.")]
Rank = Annotated[
    int | None,
    typer.Option(help="Truncate every update to this rank by its singular values.  [default: the exact rank]"),
]
# of export-triton
Repository = Annotated[
    Path, typer.Option("--output", help="The model repository, whose other models stay.", callback=utf8)
]
ModelName = Annotated[
    str | None, typer.Option("--name", help="Name of the model.  [default: the export directory's]", callback=utf8)
]
AdapterFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=PATH",
        help="An .onnx_adapter file beside those of a batched export; may be repeated.",
        callback=utf8,
    ),
]
TritonBatch = Annotated[int, typer.Option("--max-batch", min=1, help="Most rows that Triton runs together.")]
TritonThreads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of an operator.  [default: ONNX Runtime's choice]")
]
ReplaceModel = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier model of the name.")]
# of verify
ExportedHead = Annotated[bool, typer.Option("--allow-random-head", help="For an export that was made with it.")]
Level = Annotated[
    str | None,
    typer.Option("--verify", metavar=_either(LEVELS), help="How thoroughly to compare.  [default: full]"),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(help="A prompt of your own, for an export that generates; may be repeated.", callback=utf8),
]
Files = Annotated[
    bool, typer.Option("--files", help="Only compare every file with its size and digest; needs no model.")
]
Provider = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Execution provider to run on.  [default: the CPU provider]", callback=utf8),
]
ProviderOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="An option of the provider; may be repeated.", callback=utf8),
]
# of demo
DemoOutput = Annotated[Path, typer.Option(help="Where to write.", callback=utf8)]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training texts.")]
Seed = Annotated[int, typer.Option(help="Seed of the split, the initial values and the batches.")]


def provider_options(provider: str | None, options: list[str] | None) -> dict[str, str] | None:
    """The options of a provider by name; None if there are none.

    Args:
        provider: The provider, if one was given.
        options: `KEY=VALUE` each.

    Raises:
        ConfigError: There is no provider that they are for, one is not `KEY=VALUE`, or a key is given twice.
    """
    if not options:
        return None
    if provider is None:
        raise ConfigError(f"--provider-option {options[0]} needs --provider; name the provider that it is for")
    found: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals):
            raise ConfigError(f"--provider-option takes KEY=VALUE, but got {option!r:.80}")
        if key in found:
            raise ConfigError(f"--provider-option {key} is given twice; give it once")
        found[key] = value
    return found


def read_image_size(text: str | None) -> ImageSize:
    """The image size of `--image-size`: `224x224` is a height and a width.

    Raises:
        ConfigError: It is neither that nor `dynamic`.
    """
    if text is None:
        return None
    if text == DYNAMIC:
        return DYNAMIC
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ConfigError(f"--image-size takes a height and a width, such as 224x224, or dynamic, but got {text!r:.80}")
    return int(match[1]), int(match[2])


def read_texts(path: Path) -> list[str]:
    """The texts of a file, one on each line; empty lines are left out.

    Raises:
        ConfigError: The file cannot be read, or holds no text.
    """
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts {path} cannot be read as UTF-8 text ({first_line(error)})") from error
    if not texts:
        raise ConfigError(f"--texts {path} holds no text; write one on each line")
    return texts


def export_options(
    options: dict[str, Any],
    blocks: dict[str, int | None],
    *,
    texts: Path | None,
    no_tokenizer: bool,
    no_verify: bool,
    stream: bool,
) -> dict[str, Any]:
    """The options of `export_onnx`, checked before anything slow is imported.

    Args:
        options: Options that are valid by themselves.
        blocks: Options that need `--quantize`; None if not given.
        texts: A file of texts to compare on, which needs `--quantize` too.
        no_tokenizer: Whether the tokenizer is left out.
        no_verify: Whether to skip the comparison.
        stream: Whether weights are streamed, so that there is nothing to compare with.

    Raises:
        ConfigError: An option has no effect in combination with the others.
        ExportError: A value is not among its choices.
    """
    given = {name: value for name, value in blocks.items() if value is not None}
    if given and options["quantize"] is None:
        option = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{option} has no effect without --quantize; give --quantize too, or leave it out")
    if texts is not None:
        _check_texts(options["quantize"], no_tokenizer=no_tokenizer, no_verify=no_verify, stream=stream)
    if options["verify"] is not None and (no_verify or stream):
        other = "--no-verify" if no_verify else "--stream, which leaves nothing to compare with"
        raise ConfigError(f"--verify {options['verify']} contradicts {other}; leave one of them out")
    level = options["verify"] or not (no_verify or stream)
    found = {**options, **given, "verify": level}
    ExportOptions(**found)  # which checks them
    return found if texts is None else {**found, "texts": read_texts(texts)}


def _check_texts(quantize: str | None, *, no_tokenizer: bool, no_verify: bool, stream: bool) -> None:
    if quantize is None:
        raise ConfigError("--texts has no effect without --quantize; give --quantize too, or leave it out")
    others = {"--no-tokenizer": no_tokenizer, "--no-verify": no_verify, "--stream": stream}
    if contradicting := [name for name, is_given in others.items() if is_given]:
        raise ConfigError(f"--texts contradicts {contradicting[0]}: texts are tokenized and compared; leave one out")
