"""Tiny sentence encoders, saved by sentence-transformers, and the embeddings that an export gives for texts."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from transformers import AutoTokenizer

logging.getLogger("sentence_transformers").setLevel(logging.ERROR)

HIDDEN = 32
TEXTS = ["a", "A rather longer text, with which the others are padded", "two words"]


def save_transformer(name: str, directory: Path, *, padding_side: str = "right", **overrides: Any) -> Path:
    """Return a tiny model of one layer without its head, and a tokenizer, as transformers saves them."""
    layers = {"distilbert": "n_layers", "t5": "num_layers"}.get(name, "num_hidden_layers")
    model = tiny_model(name, pad_token_id=0, **{layers: 1, **overrides})
    (model if name == "t5" else model.base_model).save_pretrained(directory)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = padding_side
    tokenizer.save_pretrained(directory)
    return directory


def save_encoder(
    name: str, directory: Path, modes: Any, *modules: Any, padding_side: str = "right", **overrides: Any
) -> Path:
    """Return a tiny sentence encoder: a transformer, a pooling of these modes, and further modules."""
    base = save_transformer(name, directory / "transformer", padding_side=padding_side, **overrides)
    encoder = SentenceTransformer(modules=[Transformer(str(base)), Pooling(HIDDEN, modes), *modules], device="cpu")
    encoder.save_pretrained(str(directory / "encoder"), create_model_card=False)
    return directory / "encoder"


def encoded(directory: Path | SentenceTransformer, texts: list[str] | None = None) -> NDArray[Any]:
    """Return the embeddings of sentence-transformers, `[batch, size]`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(str(directory), device="cpu") if isinstance(directory, Path) else directory
    result: NDArray[Any] = model.encode(texts or TEXTS)
    return result


def embedded(export: Path, texts: list[str] | None = None) -> NDArray[Any]:
    """Return the embeddings of an export, by a plain session and the tokenizer beside it, `[batch, size]`."""
    session = onnxruntime.InferenceSession(export / "model.onnx")
    names = [value.name for value in session.get_inputs()]
    tokens = AutoTokenizer.from_pretrained(export)(texts or TEXTS, padding=True, truncation=True, return_tensors="np")
    tokens.setdefault("token_type_ids", np.zeros_like(tokens["input_ids"]))  # which the tiny tokenizer does not give
    result: NDArray[Any] = session.run(["sentence_embedding"], {name: tokens[name] for name in names})[0]
    return result


def gap(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
