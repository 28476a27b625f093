"""Tokenizers and feature extractors by name, and token ids of prompts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gralora_fx.base.progress.stages import quiet
from gralora_fx.base.sources.model_files import (
    MODEL_FILE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    check_json_objects,
    local_directory,
)
from gralora_fx.base.tensors import is_tensor
from gralora_fx.errors import CheckpointError, GraloraError, first_line, option

if TYPE_CHECKING:  # loaded where there are texts
    from transformers import PreTrainedTokenizerBase

    from gralora_fx.core.loading.text_tokenizer import TextTokenizer

PREPROCESSOR = "preprocessor_config.json"
_EXTRACTOR_FILES = (PREPROCESSOR, "processor_config.json")
_JSON = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    *_EXTRACTOR_FILES,
)
_TOKENIZER_FILES = (
    *_JSON[:2],
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_CONFIGS = (*_JSON, "config.json")  # which determine how the other files are read
_MESSAGE_CONTENTS = {"content", "tool_calls"}  # an assistant may call tools and say nothing


def load_tokenizer(name: str | Path, error: type[GraloraError] = CheckpointError) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a local directory or a hub id; None if it has no tokenizer files."""
    return _load_tokenizer(_auto_tokenizer, name, error)


def read_tokenizer(directory: Path, error: type[GraloraError]) -> TextTokenizer | None:
    """Read an export's tokenizer, by transformers if `TextTokenizer` cannot; None without tokenizer files."""
    read = None
    with suppress(Exception):  # of damaged files, which are named below
        read = _read_here(directory)

    def load(name: str | Path, **options: Any) -> Any:
        return _read_here(directory) or _auto_tokenizer(name, **options)

    return read or cast("TextTokenizer | None", _load_tokenizer(load, directory, error))


def read_ahead(directory: Path, error: type[GraloraError]) -> Callable[[], TextTokenizer | None]:
    """Begin `read_tokenizer` in a thread, while the caller opens a session; return a function that waits for it.

    That function itself reads a tokenizer that transformers has to load, or that is damaged.
    """
    if not (directory / TOKENIZER_FILE).is_file():
        return partial(read_tokenizer, directory, error)
    found: list[TextTokenizer | None] = []

    def read() -> None:
        with suppress(Exception):  # which `read_tokenizer` names
            found.append(_read_here(directory))

    thread = threading.Thread(target=read, name="tokenizer")
    thread.start()

    def wait() -> TextTokenizer | None:
        thread.join()
        return (found and found[0]) or read_tokenizer(directory, error)

    return wait


def _read_here(directory: Path) -> TextTokenizer | None:
    """Read a tokenizer without transformers; None if it is not one that `TextTokenizer` reads."""
    if not (directory / TOKENIZER_FILE).is_file():
        return None
    from gralora_fx.core.loading.text_tokenizer import TextTokenizer, is_read_here

    return TextTokenizer(directory) if is_read_here(directory) else None


@contextmanager
def _transformers(what: str, error: type[GraloraError]) -> Iterator[None]:
    """Run a block that imports torch or transformers, which the runtime alone lacks."""
    try:
        yield
    except ModuleNotFoundError as failure:
        if failure.name not in ("torch", "transformers"):
            raise
        raise error(f"{what} is read by {failure.name}, which is not installed: pip install gralora-fx") from failure


def _load_tokenizer(load: Callable[..., Any], name: str | Path, error: type[GraloraError]) -> Any | None:
    return _load_pretrained(
        load,
        name,
        error,
        what="tokenizer",
        files=_TOKENIZER_FILES,
        configs=_CONFIGS,
        remedy="repair these files, or leave the tokenizer out",
    )


def load_feature_extractor(name: str | Path, error: type[GraloraError] = CheckpointError) -> Any | None:
    """Load the feature extractor of a local directory or a hub id; None if it has none."""
    with _transformers("a feature extractor", error):
        from transformers import AutoFeatureExtractor

    return _load_extractor(AutoFeatureExtractor.from_pretrained, name, error, what="feature extractor")


def load_processor(name: str | Path, error: type[GraloraError] = CheckpointError) -> Any | None:
    """Load the processor of a local directory or a hub id, which reads more than texts; None if it has none."""
    with _transformers("a processor", error):
        from transformers import AutoProcessor

    return _load_extractor(AutoProcessor.from_pretrained, name, error, what="processor")


def _load_extractor(load: Callable[..., Any], name: str | Path, error: type[GraloraError], *, what: str) -> Any | None:
    files = _EXTRACTOR_FILES
    return _load_pretrained(load, name, error, what=what, files=files, configs=files, remedy="repair these files")


def _auto_tokenizer(name: str | Path, **options: Any) -> Any:
    """Load a tokenizer without importing the model's configuration class, if its own file names the tokenizer's class.

    transformers would import that class, and with it the code that loads models: a second, and 60 MB.
    """
    from transformers import AutoTokenizer, PreTrainedConfig

    directory = Path(name)
    if all((directory / file).is_file() for file in (MODEL_FILE, TOKENIZER_CONFIG)):
        own, model = (json.loads((directory / file).read_bytes()) for file in (TOKENIZER_CONFIG, MODEL_FILE))
        if own.get("tokenizer_class") and "auto_map" not in own and isinstance(model.get("model_type"), str):
            config = PreTrainedConfig(name_or_path=str(name))
            for field in ("model_type", "model_name", "tokenizer_class"):
                if field in model:
                    setattr(config, field, model[field])
            options["config"] = config
    return AutoTokenizer.from_pretrained(name, **options)


def _load_pretrained(
    load: Callable[..., Any],
    name: str | Path,
    error: type[GraloraError],
    *,
    what: str,
    files: Sequence[str],
    configs: Sequence[str],
    remedy: str,
) -> Any | None:
    """Load one kind of object from a local directory or a hub id; None if it has none of the files."""
    directory = local_directory(name, error)
    if directory is not None:
        present = [file for file in files if (directory / file).is_file()]
        if not present:
            return None
        check_json_objects(directory, configs, error)
        if empty := [file for file in present if not (directory / file).stat().st_size]:
            raise error(f"{directory / empty[0]} is empty; copy it again")
    try:
        with quiet(), _transformers(f"the {what} of {name}", error):
            return load(name, trust_remote_code=False)
    except GraloraError:
        raise
    except Exception as failure:  # transformers and tokenizers raise types of their own
        if directory is None:
            present = _downloaded(str(name), files)
        if not present:
            return None
        raise error(
            f"the {what} of {name} cannot be loaded from {', '.join(present)} ({first_line(failure)}); {remedy}"
        ) from failure


def _downloaded(name: str, files: Sequence[str]) -> list[str]:
    """Return those of a hub repository's files that are in the cache, after an attempt to load them."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return [file for file in files if isinstance(try_to_load_from_cache(name, file), str)]
    except HFValidationError:  # neither a directory nor a hub id
        return []


def prompt_ids(
    prompt: Any,
    tokenizer: TextTokenizer | PreTrainedTokenizerBase | None,
    error: type[GraloraError],
    tools: Sequence[Any] = (),
    check: Callable[[str, Any], None] | None = None,
) -> list[int]:
    """Return the token ids of a prompt: a text, a chat as a list of messages, or ids, which are returned unchanged."""
    if is_ids(prompt):
        return [int(token) for token in prompt]
    if isinstance(prompt, (list, tuple)) and not prompt:
        return []
    if not (isinstance(prompt, str) or is_chat(prompt)):
        raise error(f"a prompt is text, a list of messages or a list of token ids, but got {prompt!r:.80}")
    for message in () if isinstance(prompt, str) else prompt:
        if "role" not in message or message.keys().isdisjoint(_MESSAGE_CONTENTS):
            raise error(f"a message of a chat has a 'role' and its 'content', but got {message!r:.80}")
    if tokenizer is None:
        raise error(f"the export holds no tokenizer; give token ids, or export with {option(tokenizer=...)}")
    if not isinstance(prompt, str) and getattr(tokenizer, "chat_template", "") is None:
        raise error(
            "the tokenizer has no chat template: write one to chat_template.jinja in the tokenizer's directory and "
            "export the model again, or give the prompt as text, over HTTP to /v1/completions"
        )
    with _refusals_as(error, prompt):
        text = prompt if isinstance(prompt, str) else _written_chat(prompt, tokenizer, tools)
        text.encode()  # a lone surrogate is not text, which the tokenizers' own error does not say
    if check is not None:
        check(text, tokenizer)
    with _refusals_as(error, prompt):  # a template has the special tokens that a text is to begin with
        return list(tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"])


@contextmanager
def _refusals_as(error: type[GraloraError], prompt: Any) -> Iterator[None]:
    """Raise one error naming the prompt that a tokenizer or a chat template refuses; they raise types of their own."""
    try:
        yield
    except Exception as failure:
        raise error(f"the tokenizer does not take the prompt {prompt!r:.80} ({first_line(failure)})") from failure


def _written_chat(messages: Any, tokenizer: TextTokenizer | PreTrainedTokenizerBase, tools: Sequence[Any]) -> str:
    """Return a chat as its template renders it, up to where the assistant continues."""
    described = list(tools) or None
    return str(tokenizer.apply_chat_template(list(messages), described, add_generation_prompt=True, tokenize=False))


def is_chat(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(part, dict) for part in prompt)


def is_ids(prompt: Any) -> bool:
    """Return whether a prompt is token ids: a list of integers, or a one-dimensional array or tensor of them."""
    if is_tensor(prompt):
        import torch

        kinds = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        return prompt.ndim == 1 and prompt.dtype in kinds and not prompt.is_meta
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1 and prompt.dtype.kind in "iu"
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return all(isinstance(token, (int, np.integer)) and not isinstance(token, bool) for token in prompt)
