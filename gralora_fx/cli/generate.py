"""`gralora-fx generate`: one answer to one prompt, written to stdout as it comes."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import typer

from gralora_fx.base.features import parts
from gralora_fx.base.progress.console import CommandProgress
from gralora_fx.base.progress.stages import timed
from gralora_fx.cli.options import Directory, OnnxToRun
from gralora_fx.cli.values import export_directory, read_adapter, takes, text_option, utf8
from gralora_fx.core.config.option import declared_options
from gralora_fx.errors import ConfigError, ServingError, listed
from gralora_fx.format.adapter_paths import adapter_path, check_name, check_takes_adapters, own_adapters
from gralora_fx.format.manifest import Manifest, read_manifest
from gralora_fx.format.tasks import generates, is_decoder, with_past

_STDIN = "-"

Prompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Continue this text, or answer it where --chat is given; - reads it from stdin."),
]
Chosen = Annotated[
    str | None,
    text_option(
        "--adapter",
        metavar="NAME[=PATH]",
        help="Answer with this adapter: the name of one in the export, or a name and an .onnx_adapter file or a "
        "directory that PEFT saved.  [default: none but what was merged]",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Write at most this many tokens.  [default: 64, or fewer if the context ends]"
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="Draw tokens at random; higher values draw more freely.  [default: take the likeliest]"
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="X", help="Draw from the likeliest tokens alone, which have this probability together."),
]
DrawSeed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, metavar="N", help="Draw the same tokens for the same seed.  [default: another in every run]"
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Ask the prompt as a message of a chat, by the tokenizer's template.")
]
RunThreads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Compute on this many threads.  [default: one on each core that may be used]",
    ),
]


class PromptOptions(Protocol):
    """Options that a feature adds for prompts other than text: a dataclass.

    The first option is the prompt; the others need it.
    """

    TASK: ClassVar[str]  # the task whose exports take such a prompt
    IS_BESIDE: ClassVar[bool]  # whether it accompanies a text, which then is a chat message of a decoder
    ALONE: ClassVar[str]  # of one that does: the task in which it needs no text

    def content(self) -> Any:
        """Read the prompt's file, before anything slow is imported."""

    def inputs(self, model: Any, content: Any) -> Mapping[str, Any]:
        """Return the arguments of `generate` for the file's content."""


_KINDS: list[Any] = parts("generate options")
_OTHERS = [kind for kind in _KINDS if not kind.IS_BESIDE]
_BESIDE = [kind for kind in _KINDS if kind.IS_BESIDE]


@takes(*_KINDS)
def generate(
    prompt: Prompt = None,
    *,
    onnx: OnnxToRun = None,
    directory: Directory = None,
    adapter: Chosen = None,
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: DrawSeed = None,
    threads: RunThreads = None,
    **options: Any,
) -> None:
    """Answer one prompt with an exported model.

    The answer goes to stdout as it comes, and nothing else does. A language model continues the prompt, and an
    encoder-decoder answers it. The likeliest token is taken, unless --temperature, --top-p or --seed asks for draws.
    """
    path = export_directory(onnx, directory)
    manifest = read_manifest(path, ServingError)
    _check_generates(path, manifest)
    other = _check_input(path, manifest, prompt, options, chat=chat)
    beside = _beside(path, manifest, options)
    needs_text = other is None and all(manifest.task != kind.ALONE for kind in beside)
    chat = chat or (bool(beside) and is_decoder(manifest.task))
    name, source = _read_adapter(path, manifest, adapter)
    sampling = _sampling(temperature, top_p, seed)
    content = None if other is None else other.content()
    contents = [(each, each.content()) for each in beside]
    text = _read_stdin() if prompt == _STDIN else str(utf8(prompt or ""))
    if needs_text and not text:
        raise ConfigError("the prompt is empty; give --prompt TEXT, or --prompt - to read it from stdin")
    with ExitStack() as stack:
        with CommandProgress():
            with timed("importing"):
                from gralora_fx.run.open_export import adapter_as_data
                from gralora_fx.serving import load
            with timed("opening"):
                model = load(path, threads=threads)
                has_template = getattr(model.required_tokenizer, "chat_template", None) is not None
                if chat and not has_template:
                    raise ConfigError(
                        f"the tokenizer of {path} has no chat template: write one to chat_template.jinja in the "
                        "tokenizer's directory and export the model again, or leave --chat out"
                    )
                if name is not None and source is not None:
                    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gralora-fx-"))
                    model.load_adapter(name, adapter_as_data(source, path, Path(folder), name))
            with timed("reading the prompt"):
                if other is not None:
                    given = other.inputs(model, content)
                else:
                    given = {"prompts": [{"role": "user", "content": text}] if chat else text or None}
                    for each, read in contents:
                        given = {**given, **each.inputs(model, read)}
                pieces = model.generate(**given, stream=True, adapter=name, max_new_tokens=max_new_tokens, **sampling)
        if has_template and not chat and other is None:
            print(
                "the tokenizer has a chat template, which --chat uses; the prompt is continued as it is",
                file=sys.stderr,
            )
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def _check_generates(directory: Path, manifest: Manifest) -> None:
    """Check that an export generates text from text."""
    task = manifest.task
    if generates(task):
        return
    if task is not None and (cached := with_past(task)) != task:
        how = f"it gives logits and has no cache; export the model with --task {cached}"
    else:
        how = f"serve it: gralora-fx serve --onnx {shlex.quote(str(directory))}"
    raise ServingError(f"{directory} was exported for the task {manifest.task}, which does not continue text: {how}")


def _check_input(
    directory: Path, manifest: Manifest, prompt: str | None, options: Mapping[str, Any], *, chat: bool
) -> PromptOptions | None:
    """Check that the prompt suits the export: a text, or a feature's prompt options, which are returned."""
    own = next((kind for kind in _OTHERS if manifest.task == kind.TASK), None)
    mains = {kind: declared_options(kind)[0] for kind in _OTHERS}
    wanted = "--prompt TEXT" if own is None else f"{mains[own].flag} {mains[own].metavar}"
    unfit: dict[str, Any] = {main.flag: options[main.name] for kind, main in mains.items() if kind is not own}
    if own is not None:
        unfit = {"--prompt": prompt, **unfit, "--chat": chat or None}
    if wrong := [flag for flag, value in unfit.items() if value is not None]:
        raise ConfigError(
            f"{directory} was exported for the task {manifest.task}; give {wanted} and leave {wrong[0]} out"
        )
    is_alone = any(manifest.task == kind.ALONE and options[declared_options(kind)[0].name] for kind in _BESIDE)
    if (prompt if own is None else options[mains[own].name]) is None and not is_alone:
        raise ConfigError(f"there is nothing to answer; give {wanted}")
    for kind, main in mains.items():
        idle = [each.flag for each in declared_options(kind)[1:] if options[each.name] is not None]
        if idle and kind is not own:
            raise ConfigError(f"{idle[0]} has no effect without {main.flag}; leave it out")
    if own is None:
        return None
    found: PromptOptions = own(**{each.name: options[each.name] for each in declared_options(own)})
    return found


def _beside(directory: Path, manifest: Manifest, options: Mapping[str, Any]) -> list[PromptOptions]:
    """Return the feature options given beside a text, if the export reads them."""
    found: list[PromptOptions] = []
    for kind in _BESIDE:
        declared = declared_options(kind)
        if not options[declared[0].name]:
            continue
        if not manifest.companions and manifest.task != kind.ALONE:
            raise ConfigError(
                f"{declared[0].flag} is for an export with a part that reads it, and {directory} has none; export the "
                f"model with --task {kind.TASK}, or leave {declared[0].flag} out"
            )
        found.append(kind(**{each.name: options[each.name] for each in declared}))
    return found


def _read_adapter(directory: Path, manifest: Manifest, given: str | None) -> tuple[str | None, Path | None]:
    """Return the adapter's name, and its path unless it is one of the export's own."""
    if given is None:
        return None, None
    name, path = read_adapter(given, may_be_bare=True)
    check_name(name, ConfigError)
    check_takes_adapters(
        manifest, directory, ServingError, remedy="leave --adapter out, or export the model with --adapters data"
    )
    if path is None:
        there = own_adapters(directory, ServingError)
        if name not in there:
            raise ServingError(
                f"no adapter {name!r}; there is {listed(there) or 'none'}: load it with --adapter NAME=PATH"
            )
        return name, None
    return name, adapter_path(path)


def _sampling(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """Return the sampling options of `generate`; none for greedy decoding."""
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature takes a number from 0 on, but got {temperature}; 0 takes the likeliest token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p takes a number above 0, at most 1, but got {top_p}")
    if temperature == 0:
        idle = [option for option, value in (("--top-p", top_p), ("--seed", seed)) if value is not None]
        if idle:
            raise ConfigError(f"{idle[0]} has no effect with --temperature 0, which takes the likeliest token")
        return {}
    given = {"temperature": temperature, "top_p": top_p, "seed": seed}
    chosen = {option: value for option, value in given.items() if value is not None}
    return {"do_sample": True, **chosen} if chosen else {}


def _read_stdin() -> str:
    """Read the prompt from stdin, without the newline at its end."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not UTF-8 text ({error.reason}); give text in UTF-8") from error
