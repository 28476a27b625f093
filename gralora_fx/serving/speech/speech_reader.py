"""Recordings as what the encoder of a speech model reads, by the feature extractor beside the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, first_line, shown
from gralora_fx.loading.tokenizers import PREPROCESSOR, load_feature_extractor
from gralora_fx.progress.stages import quiet
from gralora_fx.runtime.input_arrays import as_array
from gralora_fx.serving.speech.audio_files import Audio, check_length

SAMPLES, RATE = "array", "sampling_rate"  # fields of a recording, as the datasets package names them


class SpeechReader:
    """The feature extractor of an export.

    Attributes:
        rate: Samples a second of the recordings that it takes.
        most_seconds: How long they may be.
    """

    def __init__(self, directory: Path, inputs: Mapping[str, Any]) -> None:
        """Load it.

        Args:
            directory: The export directory.
            inputs: What the encoder takes, by name, as its session describes it.

        Raises:
            ServingError: There is none, or it cannot be loaded.
        """
        extractor = load_feature_extractor(directory, ServingError)
        if extractor is None:
            raise ServingError(
                f"{directory} holds no {PREPROCESSOR}, which says how audio becomes what the model reads; export with "
                "tokenizer=..., the model's processor, or give input_features"
            )
        if type(getattr(extractor, "sampling_rate", None)) is not int:
            raise ServingError(
                f"{PREPROCESSOR} of {directory} names no sampling_rate; export with the model's own processor"
            )
        self._extractor, self.rate = extractor, extractor.sampling_rate
        self._inputs = inputs
        self._more = {"return_attention_mask": True} if "attention_mask" in inputs else {}
        samples = getattr(extractor, "n_samples", None)
        self.most_seconds = math.inf if samples is None else samples / self.rate

    def features(self, audio: Audio) -> dict[str, NDArray[Any]]:
        """What the encoder reads of a recording.

        Args:
            audio: The recording.

        Raises:
            TooLargeError: It is longer than `most_seconds`.
            ServingError: The extractor is not the model's.
        """
        check_length(audio.seconds, self.most_seconds)
        samples = audio.at(self.rate)
        try:
            with quiet():
                found = self._extractor(samples, sampling_rate=self.rate, return_tensors="np", **self._more)
        except Exception as error:  # transformers raises types of its own
            raise ServingError(f"the feature extractor does not take the audio ({first_line(error)})") from error
        names = [name for name in self._inputs if name in found]
        return {name: as_array(name, found[name], self._inputs[name]) for name in names}


def is_recording(value: Any) -> bool:
    """Whether a value is a recording: samples of one channel, or a dict of them with their rate."""
    if isinstance(value, Mapping):
        return SAMPLES in value and RATE in value
    array = np.asarray(value) if isinstance(value, (list, tuple)) and value and _is_float(value[0]) else value
    kind = str(getattr(array, "dtype", "")).rpartition(".")[2]
    return getattr(array, "ndim", None) == 1 and kind.startswith(("float", "bfloat"))


def recording(value: Any, rate: int) -> Audio:
    """A recording as it is given in Python.

    Args:
        value: Samples of one channel, or a dict of them with their rate.
        rate: The rate of samples without one.

    Raises:
        ServingError: It is not a recording.
    """
    if isinstance(value, Mapping):
        value, rate = value[SAMPLES], value[RATE]
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)):
        raise ServingError(f"{RATE} must be a whole number of samples a second, but got {shown(rate)}")
    try:
        array = np.asarray(value.detach().float().cpu() if hasattr(value, "detach") else value)
        samples = array.astype(np.float32)
    except Exception as error:  # array-likes raise what they like
        raise ServingError(f"the audio is not an array of samples ({first_line(error)})") from error
    if samples.ndim != 1:
        raise ServingError(f"the audio has shape {list(samples.shape)}; give the samples of one channel, of one axis")
    if array.dtype.kind not in "f":
        raise ServingError(f"the audio's samples are {array.dtype}; give floats from -1 to 1")
    return Audio(samples, int(rate))


def _is_float(value: Any) -> bool:
    return isinstance(value, (float, np.floating))
