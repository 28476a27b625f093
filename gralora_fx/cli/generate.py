"""`gralora-fx generate`: one answer to one prompt, written to stdout as it comes."""

from __future__ import annotations

import shlex
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from gralora_fx.base.compat.extras import require_extra
from gralora_fx.base.progress.console import CommandProgress
from gralora_fx.base.progress.stages import timed
from gralora_fx.base.sources.paths import usable_path
from gralora_fx.cli.options import Directory, OnnxToRun
from gralora_fx.cli.values import export_directory, read_adapter, utf8
from gralora_fx.errors import ConfigError, ServingError, listed
from gralora_fx.format.adapter_paths import adapter_path, check_name, check_takes_adapters, own_adapters
from gralora_fx.format.manifest import Manifest, read_manifest
from gralora_fx.format.tasks import GENERATING

_STDIN = "-"
_SPEECH = "automatic-speech-recognition-with-past"

Prompt = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Continue this text, or answer it where --chat is given; - reads it from stdin.",
    ),
]
Audio = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write this recording down, a WAV file, with a model of speech.", callback=utf8),
]
Language = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Expect this language in --audio, such as en or English.  [default: the one that the model hears]",
        callback=utf8,
    ),
]
Chosen = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="NAME[=PATH]",
        help="Answer with this adapter: the name of one in the export, or a name and an .onnx_adapter file or a "
        "directory that PEFT saved.  [default: none but what was merged]",
        callback=utf8,
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
        metavar="X", help="Draw tokens at random, the more freely the higher this is.  [default: take the likeliest]"
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


def generate(
    prompt: Prompt = None,
    audio: Audio = None,
    language: Language = None,
    onnx: OnnxToRun = None,
    directory: Directory = None,
    adapter: Chosen = None,
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: DrawSeed = None,
    threads: RunThreads = None,
) -> None:
    """Answer one prompt with an exported model.

    The answer goes to stdout as it comes, and nothing else does. A language model continues the prompt, an
    encoder-decoder answers it, and a model of speech writes --audio down. The likeliest token is taken, unless
    --temperature, --top-p or --seed asks for draws.
    """
    path = export_directory(onnx, directory)
    manifest = read_manifest(path, ServingError)
    _check_generates(path, manifest)
    _check_input(path, manifest, prompt, audio, language, chat=chat)
    name, source = _read_adapter(path, manifest, adapter)
    sampling = _sampling(temperature, top_p, seed)
    data = _read_audio(audio) if audio is not None else None
    text = _read_stdin() if prompt == _STDIN else str(utf8(prompt or ""))
    if data is None and not text:
        raise ConfigError("the prompt is empty; give --prompt TEXT, or --prompt - to read it from stdin")
    with ExitStack() as stack:
        with CommandProgress():
            with timed("importing"):
                from gralora_fx.run.open_export import adapter_as_data
                from gralora_fx.serving import load
            with timed("opening"):
                model = load(path, threads=threads)
                has_template = getattr(model.tokenizer, "chat_template", None) is not None
                if chat and not has_template:
                    raise ConfigError(
                        f"the tokenizer of {path} has no chat template: write one to chat_template.jinja in the "
                        "tokenizer's directory and export the model again, or leave --chat out"
                    )
                if name is not None and source is not None:
                    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gralora-fx-"))
                    model.load_adapter(name, adapter_as_data(source, path, Path(folder), name))
            given: Any = [{"role": "user", "content": text}] if chat else text
            with timed("reading the prompt"):
                if data is not None:
                    given, sampling["language"] = _recording(model, data), language
                pieces = model.generate(given, stream=True, adapter=name, max_new_tokens=max_new_tokens, **sampling)
        if has_template and not chat and data is None:
            print(
                "the tokenizer has a chat template, which --chat uses; the prompt is continued as it is",
                file=sys.stderr,
            )
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def _check_generates(directory: Path, manifest: Manifest) -> None:
    """Check that an export generates text from text."""
    if manifest.task in GENERATING:
        return
    if manifest.task in ("text-generation", "text2text-generation", "automatic-speech-recognition"):
        how = f"it gives logits and has no cache; export the model with task='{manifest.task}-with-past'"
    else:
        how = f"serve it: gralora-fx serve --onnx {shlex.quote(str(directory))}"
    raise ServingError(f"{directory} was exported for the task {manifest.task}, which does not go on from text: {how}")


def _check_input(
    directory: Path, manifest: Manifest, prompt: str | None, audio: str | None, language: str | None, *, chat: bool
) -> None:
    """Check that an export is given what it answers: a model of speech a recording, others a text."""
    takes_audio = manifest.task == _SPEECH
    wanted, given = ("--audio FILE", prompt) if takes_audio else ("--prompt TEXT", audio)
    if given is not None or (chat and takes_audio):
        other = "--prompt" if takes_audio else "--audio"
        raise ConfigError(
            f"{directory} was exported for the task {manifest.task}; give {wanted} and leave "
            f"{other if given is not None else '--chat'} out"
        )
    if (audio if takes_audio else prompt) is None:
        raise ConfigError(f"there is nothing to answer; give {wanted}")
    if language is not None and not takes_audio:
        raise ConfigError("--language is of --audio, and has no effect; leave it out")


def _read_audio(path: str) -> bytes:
    """The content of an audio file."""
    try:
        data = usable_path(path, ConfigError).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the path of an audio file") from error
    if not data.startswith((b"RIFF", b"RF64")):  # as WAV does
        require_extra("audio", f"{path}, which is not WAV,", ConfigError)
    return data


def _recording(model: Any, data: bytes) -> dict[str, Any]:
    """A recording as `generate` takes it."""
    from gralora_fx.run.generate.recordings import read_audio

    audio = read_audio(data, model.encoder_inputs.speech.most_seconds)
    return {"array": audio.samples, "sampling_rate": audio.rate}


def _read_adapter(directory: Path, manifest: Manifest, given: str | None) -> tuple[str | None, Path | None]:
    """The adapter to answer with, and where it is to be loaded from; None for one of the export's own."""
    if given is None:
        return None, None
    name, path = read_adapter(given, may_be_bare=True)
    check_name(name, ConfigError)
    check_takes_adapters(
        manifest,
        directory,
        ServingError,
        remedy="leave adapter=... out, or export the model with adapters='data'",
    )
    if path is None:
        there = own_adapters(directory, ServingError)
        if name not in there:
            raise ServingError(f"no adapter {name!r}; there is {listed(there) or 'none'}: load it with load_adapter()")
        return name, None
    return name, adapter_path(path)


def _sampling(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """The options of `generate` that draw; none where the likeliest token is taken."""
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
    """The prompt from stdin, without the newline at its end."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not UTF-8 text ({error.reason}); give text in UTF-8") from error
