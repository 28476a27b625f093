"""`load`: an export directory as a callable model on ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters.encoder_decoder_session import EncoderDecoderSession, empty_past
from gralora_fx.exporters.manifest import read_manifest
from gralora_fx.exporters.session import open_session
from gralora_fx.serving.generation import Answers, Generator, Sampling
from gralora_fx.serving.outputs import Outputs
from gralora_fx.tokenizers import load_tokenizer
from gralora_fx.tracing.cached import PAST, cache_of
from gralora_fx.tracing.signature import default_input

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
}


def load(export_dir: str | Path, providers: Sequence[str] | None = None) -> OrtModel:
    """Open an export on ONNX Runtime.

    Args:
        export_dir: A directory that `export_onnx` wrote.
        providers: Execution providers in order of preference; None for the CPU.

    Returns:
        The model, ready to be called.

    Raises:
        ServingError: The directory is no export, a file is missing or lies outside it, or a provider is not installed.
    """
    return OrtModel(export_dir, providers)


class OrtModel:
    """An exported model, called with arrays or tensors by the names of the PyTorch model's inputs.

    Attributes:
        directory: The export directory.
        manifest: What `gralora_export.json` says.
        input_names: Inputs of the graph.
        output_names: Outputs of the graph.
    """

    def __init__(self, export_dir: str | Path, providers: Sequence[str] | None = None) -> None:
        """Open an export; `load` is the public way."""
        self.directory = Path(export_dir)
        self.manifest = _read(self.directory)
        _check_providers(providers)
        self.session = open_session(self.directory, providers, error=ServingError)
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self.input_names = tuple(self._inputs)
        self.output_names = tuple(value.name for value in self.session.get_outputs())

    @property
    def task(self) -> str | None:
        """The task the model was exported for."""
        task: str | None = self.manifest.get("task")
        return task

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`, empty where there is none."""
        path = self.directory / "config.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer saved beside the model.

        Raises:
            ServingError: There is none.
        """
        tokenizer = self._tokenizer_or_none
        if tokenizer is None:
            raise ServingError(f"{self.directory} holds no tokenizer; export with tokenizer=..., or tokenize yourself")
        return tokenizer

    def __call__(self, **inputs: Any) -> Outputs:
        """Run the model once.

        Args:
            **inputs: Arrays, tensors or nested lists by name; a mask that is left out is all ones, token types zeros,
                a cache empty. Integers and floats are cast to the graph's own width.

        Returns:
            Outputs by name: tensors if any input was a tensor, else arrays.

        Raises:
            ServingError: An input is missing, unknown, of the wrong kind or shape, or holds ids out of range.
        """
        gives_tensors = any(isinstance(value, torch.Tensor) for value in inputs.values())
        feed = self._feed({name: value for name, value in inputs.items() if value is not None})
        try:
            results = self.session.run(None, feed)
        except Exception as error:  # ONNX Runtime raises types of its own, without a common base
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise ServingError(f"ONNX Runtime refuses {shapes}: {str(error).splitlines()[0]}") from error
        found = zip(self.output_names, results, strict=True)
        return Outputs({name: torch.from_numpy(array) if gives_tensors else array for name, array in found})

    def generate(self, prompts: Any, *, stop: str | Sequence[str] = (), stream: bool = False, **sampling: Any) -> Any:
        """Answer prompts; onnxruntime-genai keeps the cache and chooses the tokens.

        Args:
            prompts: A text, a chat as a list of messages (`{"role": ..., "content": ...}`, by the tokenizer's
                template), a list of token ids, or a list of any of them, which run together.
            stop: Strings that end an answer, which does not hold them.
            stream: Whether to give pieces of text (token ids, for prompts of ids) as they come.
            **sampling: `max_new_tokens=None` (64, or what the context leaves), `do_sample=False`, `top_k=50`,
                `top_p=1.0`, `temperature=1.0`, `seed=None`.

        Returns:
            The answer to one prompt, a list for a list of prompts: texts, or token ids for prompts of ids. With
            `stream` an iterator over pieces, of lists of pieces for a list of prompts.

        Raises:
            ServingError: The export has no cache, onnxruntime-genai is not installed, a prompt is empty, too long or
                holds ids out of range, or an option is invalid.
        """
        if not any(name.startswith("past_key_values.") for name in self.input_names):
            raise ServingError(f"this export (task {self.task!r}) has no cache, so it cannot generate")
        if isinstance(self.session, EncoderDecoderSession):
            raise ServingError(
                "onnxruntime-genai does not run an encoder-decoder in this layout; generate with optimum's "
                "ORTModelForSeq2SeqLM or ORTModelForSpeechSeq2Seq, or with transformers.js: they read this directory"
            )
        unknown = [name for name in sampling if name not in Sampling.__dataclass_fields__]
        if unknown:
            known = ", ".join(Sampling.__dataclass_fields__)
            raise ServingError(f"unknown option {', '.join(unknown)}; there are {known}")
        found = Answers(self._generator, prompts, self._tokenizer_or_none, Sampling(**sampling), stop)
        return found if stream else found.result()

    @cached_property
    def _generator(self) -> Generator:
        return Generator(self.directory)

    @cached_property
    def _tokenizer_or_none(self) -> PreTrainedTokenizerBase | None:
        return load_tokenizer(self.directory, ServingError)

    def _feed(self, inputs: dict[str, Any]) -> dict[str, NDArray[Any]]:
        unknown = [name for name in inputs if name not in self._inputs]
        if unknown:
            raise ServingError(f"unknown input {', '.join(unknown)}; the model takes {', '.join(self.input_names)}")
        arrays = {name: self._as_array(name, value) for name, value in inputs.items()}
        self._refuse_ids_out_of_range(arrays)
        pasts = [name for name in self.input_names if name.startswith(f"{PAST}.")]
        if arrays and not any(name in arrays for name in pasts):
            arrays |= empty_past(tuple(self._inputs.values()), len(next(iter(arrays.values()))))
        given: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if not isinstance(self.session, EncoderDecoderSession) and pasts and all(name in arrays for name in pasts[:2]):
            given[PAST] = cache_of([[given[name] for name in pasts[:2]]])
        for name in self.input_names:
            if name not in arrays:
                default = default_input(name, given)
                if default is None:
                    raise ServingError(f"input {name!r} is missing; the model takes {', '.join(self.input_names)}")
                arrays[name] = default.contiguous().numpy()
        self._refuse_unequal(arrays)
        return arrays

    def _refuse_ids_out_of_range(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Refuse ids that no table holds: ONNX Runtime takes negative ones, and counts them from the end."""
        text = self.config.get("text_config", self.config)
        vocabulary = text.get("vocab_size", self.config.get("vocab_size"))
        for name, array in arrays.items():
            if not name.endswith("_ids") or not array.size:
                continue
            if array.min() < 0:
                raise ServingError(f"input {name!r} holds {array.min()}, but ids are 0 or more; mask padding instead")
            if name.endswith("input_ids") and isinstance(vocabulary, int) and array.max() >= vocabulary:
                raise ServingError(
                    f"input {name!r} holds token {array.max()}, outside the vocabulary of {vocabulary} tokens"
                )

    def _refuse_unequal(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Refuse inputs that differ on an axis of one name: ONNX Runtime would run some of them."""
        seen: dict[str, tuple[str, int]] = {}
        for name, array in arrays.items():
            for axis, size in zip(self._inputs[name].shape, array.shape, strict=True):
                if isinstance(axis, str):
                    other, expected = seen.setdefault(axis, (name, size))
                    if size != expected:
                        raise ServingError(
                            f"input {name!r} has {axis} {size}, but {other!r} has {expected}; give inputs of one size"
                        )
        if all(axis in seen for axis in ("total_sequence_length", "past_sequence_length", "sequence_length")):
            (name, total), (_, past), (_, new) = (
                seen[axis] for axis in ("total_sequence_length", "past_sequence_length", "sequence_length")
            )
            if total != past + new:
                raise ServingError(
                    f"input {name!r} has shape {list(arrays[name].shape)}, but {past} cached and {new} new positions "
                    f"need [{arrays[name].shape[0]}, {past + new}]; give a mask over all of them"
                )

    def _as_array(self, name: str, value: Any) -> NDArray[Any]:
        expected = self._inputs[name]
        try:
            array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        except ValueError as error:
            raise ServingError(f"input {name!r} is no array ({error}); pad its rows to one length") from error
        dtype = _DTYPES.get(expected.type, array.dtype)
        if array.dtype.kind not in "biuf" or (dtype.kind in "iu" and array.dtype.kind == "f"):
            raise ServingError(f"input {name!r} is {array.dtype}, but the model takes {dtype}")
        shape = list(expected.shape)
        fixed = [(axis, size) for axis, size in enumerate(shape) if isinstance(size, int)]
        if array.ndim != len(shape) or any(array.shape[axis] != size for axis, size in fixed):
            raise ServingError(f"input {name!r} has shape {list(array.shape)}, but the model takes {shape}")
        return np.ascontiguousarray(array, dtype=dtype)


def _read(directory: Path) -> dict[str, Any]:
    try:
        return read_manifest(directory)
    except ExportError as error:
        raise ServingError(str(error)) from error


def _check_providers(providers: Sequence[str] | None) -> None:
    available = onnxruntime.get_available_providers()
    missing = [name for name in providers or () if name not in available]
    if missing:
        raise ServingError(
            f"execution provider {', '.join(missing)} is not installed; there are {', '.join(available)}"
        )
