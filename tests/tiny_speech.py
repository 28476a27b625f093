"""A tiny multilingual Whisper: its model, its processor, and recordings as files."""

from __future__ import annotations

import functools
import io
import warnings
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_once import made_once
from numpy.typing import NDArray
from tiny_models import WIDE, tiny_model
from transformers import GenerationConfig, PreTrainedModel, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

from gralora_fx import TracedModel, trace
from gralora_fx.exporters import export_onnx

RATE, SECONDS = 16_000, 1  # of the recordings that it reads
LETTERS = [chr(code) for code in range(33, 127)] + ["\u0120"]  # as byte-level BPE writes them
SPECIAL = {
    f"<|{name}|>": len(LETTERS) + index
    for index, name in enumerate(
        (
            "endoftext",
            "startoftranscript",
            "en",
            "de",
            "transcribe",
            "translate",
            "startofprev",
            "nospeech",
            "notimestamps",
        )
    )
}
END, START = SPECIAL["<|endoftext|>"], SPECIAL["<|startoftranscript|>"]
VOCABULARY = len(LETTERS) + len(SPECIAL)
RULES: dict[str, Any] = {
    "decoder_start_token_id": START,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
    "max_length": 32,
    "is_multilingual": True,
    "lang_to_id": {name: SPECIAL[name] for name in ("<|en|>", "<|de|>")},
    "task_to_id": {name: SPECIAL[f"<|{name}|>"] for name in ("transcribe", "translate")},
    "no_timestamps_token_id": SPECIAL["<|notimestamps|>"],
    "prev_sot_token_id": SPECIAL["<|startofprev|>"],
    "suppress_tokens": [5, 6, 7, *(index for index in SPECIAL.values() if index != END)],
    "begin_suppress_tokens": [len(LETTERS) - 1, END],
}


def tiny_whisper(**rules: Any) -> PreTrainedModel:
    """Return a random Whisper that reads a second of sound.

    Args:
        rules: Fields of its generation configuration beside `RULES`, or instead of them.
    """
    special = {name: RULES[name] for name in RULES if name.endswith("_token_id") and name[:2] not in ("no", "pr")}
    model = tiny_model("whisper", vocab_size=VOCABULARY, **{**special, **WIDE["whisper"]})
    model.generation_config = GenerationConfig(**{**RULES, **rules})
    return model


@functools.cache
def traced_whisper() -> TracedModel:
    """Return a trace of it with a cache, made once a process, to be exported as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layerdrop is not part of a trace")  # of training alone
        return trace(tiny_whisper(), task="automatic-speech-recognition-with-past")


def whisper_export() -> Path:
    """Its export with the processor, made once a run, to be read only."""

    def make(folder: Path) -> None:
        export_onnx(traced_whisper(), folder / "whisper", tokenizer=processor(), verify=False)

    return made_once("speech", make) / "whisper"


def processor() -> WhisperProcessor:
    """Its processor: a second of sound is 40 frames of 8 bands, and letters are tokens."""
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=400, chunk_length=SECONDS)
    vocabulary = {**{letter: index for index, letter in enumerate(LETTERS)}, **SPECIAL}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return WhisperProcessor(extractor, tokenizer)


def sound(seed: int = 0, seconds: float = 0.8, rate: int = RATE) -> NDArray[np.float32]:
    """Return some tones and noise, `[samples]`."""
    random = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * random.uniform(100, 3000) * times + random.uniform(0, 6)) for _ in range(3)]
    return (0.2 * np.sum(tones, axis=0) + 0.05 * random.standard_normal(len(times))).astype(np.float32)


def wav(samples: NDArray[Any], rate: int = RATE) -> bytes:
    """Return a WAV file of 16 bits; `[samples]`, or `[samples, channels]`."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(samples.shape[1] if samples.ndim == 2 else 1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return file.getvalue()


def features(samples: NDArray[Any]) -> torch.Tensor:
    """Return what the encoder reads of a recording, `[1, 8, 40]`."""
    found: torch.Tensor = processor().feature_extractor(samples, sampling_rate=RATE, return_tensors="pt").input_features
    return found
