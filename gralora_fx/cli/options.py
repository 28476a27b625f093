"""The options of the commands, each declared once, checked before anything is imported."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from gralora_fx.cli.help import REQUIRED
from gralora_fx.config.adapter_names import check_adapter_letters
from gralora_fx.config.tasks import TASKS, check_task
from gralora_fx.errors import ConfigError, first_line, shown
from gralora_fx.exporters.options import (
    ADAPTER_MODES,
    LEVELS,
    LOGITS,
    PRECISIONS,
    QUANTIZATIONS,
    ExportOptions,
)
from gralora_fx.runtime.adapter_name import check_name
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


def _names(names: list[str] | None) -> list[str] | None:
    """Check that no directory or hub id of several is empty."""
    for name in names or ():
        _name(name)
    return names


def _file_name(name: str | None) -> str | None:
    """Check the name of an adapter in an export, which is also that of a file."""
    return name if name is None else check_name(utf8(name), ConfigError)


def _graph_name(name: str | None) -> str | None:
    """Check the name of an adapter, which is also that of a file and of a part of the graph."""
    if _file_name(name) is not None:
        check_adapter_letters(name)
    return name


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
_MODEL, _ADAPTERS, _NUMBERS, _WRITTEN, _COMPARISON = (
    "Model",
    "Adapters",
    "Numbers",
    "What is written",
    "Comparison with PyTorch",
)
Model = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|ID",
        help="Base model: a local directory or a hub id. Left out: the one that the adapter names.",
        callback=_name,
        rich_help_panel=_MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|ID",
        help="PEFT-format GraLoRA or LoRA adapter: a local directory or a hub id.",
        callback=_name,
        rich_help_panel=_MODEL,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help=f"Task, by optimum's names. Left out: the adapter's or the model's own.\n\n\b\n{_TASKS}",
        callback=_task,
        rich_help_panel=_MODEL,
    ),
]
StrictBase = Annotated[
    bool,
    typer.Option(
        "--strict-base",
        help="Refuse an adapter that is not known to be of this base, rather than warn.",
        rich_help_panel=_MODEL,
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
# of export
AdaptersMode = Annotated[
    str,
    typer.Option(
        "--adapters",
        metavar=_either(ADAPTER_MODES),
        help="Fold the adapter into the weights (merged), or keep adapters apart as data that every run chooses: "
        "these need --adapter, at whose layers the export then takes others too.",
        rich_help_panel=_ADAPTERS,
    ),
]
ExportedName = Annotated[
    str | None,
    typer.Option(
        "--adapter-name",
        metavar="NAME",
        help="Name of --adapter in the export.  [default: default]",
        callback=_graph_name,
        rich_help_panel=_ADAPTERS,
    ),
]
Precision = Annotated[
    str,
    typer.Option(metavar=_either(PRECISIONS), help="Precision of weights and cache.", rich_help_panel=_NUMBERS),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar=_either(QUANTIZATIONS),
        help="Store matrices as blocks of small integers; int8-dynamic: multiply in int8, activations rounded too. "
        "Left out: none.",
        rich_help_panel=_NUMBERS,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Values of int8 or int4 that share a scale: a power of two, 16 or more.  [default: 32]",
        rich_help_panel=_NUMBERS,
    ),
]
AccuracyLevel = Annotated[
    int | None,
    typer.Option(
        metavar="[0|1|2|3|4]",
        help="How int8 or int4 weights multiply: 0 the runtime's choice, 1 float32, 2 float16, 3 bfloat16, 4 int8, "
        "the fastest.  [default: 4]",
        rich_help_panel=_NUMBERS,
    ),
]
Logits = Annotated[
    str,
    typer.Option(
        metavar=_either(LOGITS),
        help="Of a model with a cache: logits of the last position, or all.",
        rich_help_panel=_NUMBERS,
    ),
]
KeepPadding = Annotated[
    bool,
    typer.Option(
        "--keep-padding",
        help="Of an encoder, compute positions of padding too; else they are zero.",
        rich_help_panel=_NUMBERS,
    ),
]
ImageSizeText = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        metavar="[HxW|dynamic]",
        help="Images of one size, or of any.  [default: of any where the model takes them as it is, else of its own]",
        rich_help_panel=_MODEL,
    ),
]
RandomHead = Annotated[
    bool,
    typer.Option(
        "--allow-random-head",
        help="Export a head that the checkpoint lacks, with random values.",
        rich_help_panel=_MODEL,
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream", help="Read weights one by one while writing; nothing is compared.", rich_help_panel=_WRITTEN
    ),
]
NoTokenizer = Annotated[
    bool, typer.Option("--no-tokenizer", help="Leave the base's tokenizer out.", rich_help_panel=_WRITTEN)
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an earlier export of another base or task, or with more adapters.",
        rich_help_panel=_WRITTEN,
    ),
]
Dump = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Write the graph to this directory after each pass.",
        callback=utf8,
        rich_help_panel=_WRITTEN,
    ),
]
Verify = Annotated[
    str | None,
    typer.Option(
        metavar=_either(LEVELS),
        help="How thoroughly to compare with PyTorch.  [default: quick]",
        rich_help_panel=_COMPARISON,
    ),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Leave the comparison with PyTorch out.", rich_help_panel=_COMPARISON)
]
Texts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Compare a quantized export with the model on texts, one on each line.",
        callback=utf8,
        rich_help_panel=_COMPARISON,
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
        help="PEFT-format GraLoRA or LoRA adapter: a local directory or a hub id.",
        callback=_name,
    ),
]
AdapterName = Annotated[
    str,
    typer.Option(
        "--adapter-name", "--name", metavar="NAME", help="Name of the adapter in the export.", callback=_file_name
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
        callback=_name,
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
# of verify
FoldedAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="DIR|ID",
        help="PEFT-format GraLoRA or LoRA adapter: a local directory or a hub id; repeated for each that is folded in.",
        callback=_names,
        rich_help_panel=_MODEL,
    ),
]
Verified = Annotated[
    Path, typer.Option("--onnx", "--output", metavar="DIR", help="The directory of the export.", callback=utf8)
]
VerifiedName = Annotated[
    str | None,
    typer.Option(
        "--adapter-name",
        metavar="NAME",
        help="Of an export that holds adapters as data, the name of --adapter there.  [default: that of the only "
        "one, or default]",
        callback=_file_name,
        rich_help_panel=_MODEL,
    ),
]
ExportedHead = Annotated[
    bool, typer.Option("--allow-random-head", help="For an export that was made with it.", rich_help_panel=_MODEL)
]
Level = Annotated[
    str | None,
    typer.Option("--verify", metavar=_either(LEVELS), help="How thoroughly to compare.  [default: full]"),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help="A prompt of your own, for an export that generates; may be repeated.", callback=utf8
    ),
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
# of generate
Prompt = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="The text to go on from, or to answer (--chat, encoder-decoders); - reads it from stdin.",
    ),
]
Audio = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Of a model of speech, the recording to write down: a WAV file.", callback=utf8),
]
Language = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Language of --audio, as en or English.  [default: that which the model hears]",
        callback=utf8,
    ),
]
Chosen = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="NAME[=PATH]",
        help="Adapter to answer with: the name of one in the export, or a name and an .onnx_adapter file or a "
        "directory that PEFT saved. Left out: the base, or what was merged into it.",
        callback=utf8,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Most tokens of the answer.  [default: 64, or fewer if the context ends]"),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="Draw tokens, from logits divided by this.  [default: the likeliest token is taken]"
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="X", help="Draw from the likeliest tokens that have this share of the probability together."),
]
DrawSeed = Annotated[
    int | None, typer.Option("--seed", min=0, metavar="N", help="Seed of the draws.  [default: another in every run]")
]
Chat = Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")]
RunThreads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, metavar="N", help="Threads of an operator.  [default: one on each core that may be used]"
    ),
]
# of demo
DemoOutput = Annotated[Path, typer.Option(metavar="DIR", help="Where to write.", callback=utf8)]
Epochs = Annotated[int, typer.Option(min=1, metavar="N", help="Passes over the training texts.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the split, the initial values and the batches.")]


def export_directory(onnx: Path | None, directory: Path | None) -> Path:
    """The directory of an export, by its option or, as before there was one, without a name.

    Raises:
        typer.BadParameter: Neither or both are given.
    """
    if (onnx is None) == (directory is None):
        raise typer.BadParameter(
            "missing --onnx DIR, the directory of an export" if onnx is None else f"give --onnx {onnx} or {directory}"
        )
    return onnx or directory  # type: ignore[return-value]


def read_adapter(text: str, *, may_be_bare: bool = False) -> tuple[str, Path | None]:
    """The name and the path of an `--adapter NAME=PATH`.

    Args:
        text: What was given.
        may_be_bare: Whether a name without a path will do, whose path is None.

    Raises:
        ConfigError: It is not of that form.
    """
    name, equals, path = text.partition("=")
    if not name or (equals and not path) or not (equals or may_be_bare):
        form = "a name, or a name and a path as NAME=PATH" if may_be_bare else "a name and a path as NAME=PATH"
        raise ConfigError(f"--adapter takes {form}, but got {shown(text)}")
    return name, Path(path) if equals else None


def read_adapters(texts: list[str] | None) -> dict[str, Path]:
    """The adapters of several `--adapter NAME=PATH`, by name.

    Raises:
        ConfigError: One is not of that form, or a name is given twice.
    """
    found: dict[str, Path] = {}
    for name, path in map(read_adapter, texts or ()):
        if name in found:
            raise ConfigError(f"--adapter {name} is given twice; give it once")
        assert path is not None
        found[name] = path
    return found


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
    except FileNotFoundError as error:
        raise ConfigError(f"--texts {path} does not exist; give a file with one text on each line") from error
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
    """The options of `export_onnx`, together checked; `checked` checks the values.

    Args:
        options: Options that are valid by themselves.
        blocks: Options that need `--quantize`; None if not given.
        texts: A file of texts to compare on, which needs `--quantize` too.
        no_tokenizer: Whether the tokenizer is left out.
        no_verify: Whether to skip the comparison.
        stream: Whether weights are streamed, so that there is nothing to compare with.

    Raises:
        ConfigError: An option has no effect in combination with the others.
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
    if texts is not None:
        found["texts"] = read_texts(texts)
    return found


def checked(options: dict[str, Any]) -> ExportOptions:
    """The options of `export_onnx`, checked; texts are tokenized by the base's tokenizer, which is not loaded yet.

    Raises:
        ExportError: A value is not one that its option takes.
    """
    return ExportOptions(**options, tokenizer=Path() if "texts" in options else None)


def _check_texts(quantize: str | None, *, no_tokenizer: bool, no_verify: bool, stream: bool) -> None:
    if quantize is None:
        raise ConfigError("--texts has no effect without --quantize; give --quantize too, or leave it out")
    others = {"--no-tokenizer": no_tokenizer, "--no-verify": no_verify, "--stream": stream}
    if contradicting := [name for name, is_given in others.items() if is_given]:
        raise ConfigError(f"--texts contradicts {contradicting[0]}: texts are tokenized and compared; leave one out")
