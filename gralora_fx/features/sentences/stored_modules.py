"""Description of the modules after a transformer, from sentence-transformers' files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gralora_fx.base.sources.model_files import read_json, read_json_object
from gralora_fx.errors import TraceError, an, option, shown, warn_caller
from gralora_fx.features.sentences.recognised import MODULES_NAME, SETTINGS_NAME

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"

_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# the flags of directories that older releases wrote, in the order in which their results are concatenated
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_OTHER_MODELS = (
    *("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs"),
    "query_expansion",
)
_TOKENIZING = ("processing_kwargs", "query_length", "document_length")
_ACTIVATIONS = "torch.nn.modules."
_REMEDY = f"take {option(task='feature-extraction')} to export the transformer alone"


@dataclass(frozen=True)
class Pooling:
    """Pools token embeddings `[batch, length, size]` to `[batch, modes * size]`."""

    modes: tuple[str, ...]  # of `POOLING_MODES`; results of several are concatenated in this order


@dataclass(frozen=True)
class Normalize:
    """Divides embeddings by their L2 norm."""

    reads: str = SENTENCE  # its input: `TOKENS` or `SENTENCE`
    writes: str = SENTENCE  # its output, likewise


@dataclass(frozen=True)
class Dense:
    """A linear layer with an activation."""

    file: Path  # the safetensors file of its weights
    activation: str = "Tanh"  # name of a module class in `torch.nn`
    has_residual: bool = False  # whether its input is added to its output
    reads: str = SENTENCE  # its input: `TOKENS` or `SENTENCE`
    writes: str = SENTENCE  # its output, likewise


@dataclass(frozen=True)
class SentenceModules:
    """The description of a sentence encoder."""

    source: str  # where it was read from, for messages
    steps: tuple[Pooling | Normalize | Dense, ...]  # the modules after the transformer, in order
    max_seq_length: int | None = None  # number of tokens to which texts are truncated, or None for the tokenizer's own
    lowercases: bool = False  # whether texts are lowercased before they are tokenized
    truncate_dim: int | None = None  # number of values of an embedding to keep, or None for all
    # `config_sentence_transformers.json`: prompts and the similarity function; empty if there is none
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_sentence_modules(directory: Path) -> SentenceModules:
    """Read the modules after the transformer from a sentence-transformers directory."""
    path = directory / MODULES_NAME
    entries = _entries(path)
    kinds = [_kind(entry, path) for entry in entries]
    if kinds[0] != "Transformer":
        raise TraceError(f"{path} begins with {entries[0]['type']}, not with a Transformer; {_REMEDY}")
    if entries[0]["path"]:
        raise TraceError(
            f"{path} has its transformer in {entries[0]['path']}, as sentence-transformers 1 wrote it; load and save "
            "the directory with a later release"
        )
    steps = []
    for kind, entry in zip(kinds[1:], entries[1:], strict=True):
        if kind not in _READERS:
            raise TraceError(
                f"{path} has the module {entry['type']}, which is not supported; supported are Transformer, "
                f"{', '.join(_READERS)}, so {_REMEDY}"
            )
        steps.append(_READERS[kind](directory / entry["path"]))
    _check_order(steps, path)
    options = _transformer_options(directory)
    settings = _object_if_there(directory / SETTINGS_NAME)
    if prompt := settings.get("default_prompt_name"):
        warn_caller(
            f"{directory / SETTINGS_NAME} has the default prompt {shown(prompt)}, which sentence-transformers "
            "prepends to every text; an export does not: prepend it yourself"
        )
    return SentenceModules(
        str(directory),
        tuple(steps),
        max_seq_length=_size(options, "max_seq_length", directory),
        lowercases=bool(options.get("do_lower_case")),
        truncate_dim=_size(settings, "truncate_dim", directory),
        settings=settings,
    )


def stored_prompts(directory: Path) -> dict[str, str]:
    """Return the prompts of a sentence encoder or of its export, by name."""
    prompts = _object_if_there(directory / SETTINGS_NAME).get("prompts") or {}
    return {str(name): str(prompt) for name, prompt in prompts.items()}


def _check_order(steps: Sequence[Pooling | Normalize | Dense], path: Path) -> None:
    """Check that a Pooling precedes every module that reads a sentence embedding."""
    pooled = next((index for index, step in enumerate(steps) if isinstance(step, Pooling)), None)
    if pooled is None:
        raise TraceError(f"{path} has no Pooling, so that it makes no sentence embedding; {_REMEDY}")
    if early := [step for step in steps[:pooled] if not isinstance(step, Pooling) and step.reads == SENTENCE]:
        kind = type(early[0]).__name__
        raise TraceError(
            f"{path} has {an(kind)} that reads {SENTENCE} before a Pooling makes it; repair or copy the file"
        )


def _size(options: Mapping[str, Any], name: str, directory: Path) -> int | None:
    size = options.get(name)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise TraceError(f"{name} is {shown(size)} in {directory}, not a positive number; repair or copy its files")
    return size


def _object_if_there(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file."""
    return read_json_object(path, TraceError) if path.is_file() else {}


def _entries(path: Path) -> list[dict[str, Any]]:
    """Read the entries of `modules.json`, each with a `type` and a `path` within the directory."""
    entries = read_json(path, TraceError)
    if not isinstance(entries, list) or not entries:
        raise TraceError(f"{path} is not a list of modules; copy it again, or {_REMEDY}")
    for entry in entries:
        texts = [entry.get(key) for key in ("type", "path")] if isinstance(entry, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise TraceError(f"{path} has the entry {shown(entry)}, not a module with a type and a path; copy it again")
        folder = Path(entry["path"])
        if folder.is_absolute() or ".." in folder.parts:
            raise TraceError(f"{path} names {entry['path']}, outside its directory; do not trust it, or save it again")
    return entries


def _kind(entry: Mapping[str, Any], path: Path) -> str:
    """Return the class name of a sentence-transformers module; raise for other code."""
    package, _, name = entry["type"].rpartition(".")
    if package.partition(".")[0] != "sentence_transformers":
        raise TraceError(f"{path} has the module {entry['type']}, which is code of its own and is not run; {_REMEDY}")
    return str(name)


def _read_pooling(folder: Path) -> Pooling:
    path = folder / "config.json"
    config = read_json_object(path, TraceError)
    unknown = [key for key in config if key.startswith("pooling_mode_") and key not in _FLAGS and config[key]]
    modes = config.get("pooling_mode") or [mode for key, mode in _FLAGS.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list):
        raise TraceError(f"pooling_mode in {path} is {shown(modes)}, not a mode or a list of modes; copy it again")
    unknown += [shown(mode) for mode in modes if mode not in POOLING_MODES]
    if unknown:
        raise TraceError(
            f"{path} has the pooling mode {', '.join(unknown)}, which is not supported; supported are "
            f"{', '.join(POOLING_MODES)}, so {_REMEDY}"
        )
    if config.get("include_prompt") is False:
        raise TraceError(
            f"{path} has include_prompt false, so that the tokens of a prompt do not count; a graph cannot tell them "
            f"from the text, so {_REMEDY}"
        )
    return Pooling(tuple(modes))


def _read_normalize(folder: Path) -> Normalize:
    return Normalize(*_ends(folder, _object_if_there(folder / "config.json")))


def _read_dense(folder: Path) -> Dense:
    path = folder / "config.json"
    config = read_json_object(path, TraceError)
    file = folder / "model.safetensors"
    if not file.is_file():
        raise TraceError(f"{folder} holds no {file.name}; load and save it with sentence-transformers, as safetensors")
    name = str(config.get("activation_function", f"{_ACTIVATIONS}activation.Tanh"))
    if not name.startswith(_ACTIVATIONS):
        raise TraceError(f"{path} has the activation {name}, which is not one of torch.nn's modules; {_REMEDY}")
    reads, writes = _ends(folder, config)
    return Dense(file, name.rpartition(".")[2], bool(config.get("use_residual")), reads, writes)


def _ends(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the embeddings that a module reads and writes."""
    reads = config.get("module_input_name") or SENTENCE
    writes = config.get("module_output_name") or reads
    if other := [name for name in (reads, writes) if name not in (TOKENS, SENTENCE)]:
        raise TraceError(
            f"{folder / 'config.json'} names {shown(other[0])}, but a module reads and writes {TOKENS} or {SENTENCE}; "
            f"{_REMEDY}"
        )
    return reads, writes


_READERS: Mapping[str, Callable[[Path], Pooling | Normalize | Dense]] = {
    "Pooling": _read_pooling,
    "Normalize": _read_normalize,
    "Dense": _read_dense,
}


def _transformer_options(directory: Path) -> dict[str, Any]:
    """Return `sentence_bert_config.json`; raise for options that would have to be part of the graph."""
    path = next((path for name in _TRANSFORMER_CONFIGS if (path := directory / name).is_file()), None)
    if path is None:
        return {}
    options = read_json_object(path, TraceError)
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    usual = {"transformer_task": "feature-extraction", "module_output_name": TOKENS, "modality_config": text}
    given = {**usual, **options}
    if isinstance(given["modality_config"], dict):
        given["modality_config"] = given["modality_config"].get("text", text)
    unusual = [key for key, value in usual.items() if given[key] != value]
    unusual += [key for key in _OTHER_MODELS if options.get(key)]
    if unusual:
        raise TraceError(f"{path} has {unusual[0]} {shown(options[unusual[0]])}, which is not supported; {_REMEDY}")
    if tokenizing := [key for key in _TOKENIZING if options.get(key)]:
        warn_caller(f"{path} has {', '.join(tokenizing)}, which is not part of an export; tokenize as it says")
    return options
