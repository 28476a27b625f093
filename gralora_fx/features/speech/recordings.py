"""Recordings: audio files as samples, and samples as encoder inputs of a speech model."""

from __future__ import annotations

import importlib
import io
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.compat.packages import installation
from gralora_fx.core.loading.tokenizers import PREPROCESSOR, load_feature_extractor
from gralora_fx.errors import ServingError, first_line, option, shown
from gralora_fx.run.engine.limits import TooLargeError
from gralora_fx.run.generate.prompts import RATE, SAMPLES
from gralora_fx.run.sessions.ort_values import as_array

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  # format tags of WAV
_SLOWEST, _FASTEST = 1_000, 768_000  # sampling rates, in Hz


@dataclass(frozen=True)
class Audio:
    """A single-channel recording."""

    samples: NDArray[np.float32]  # `[samples]`, float32 from -1 to 1
    rate: int  # samples per second

    def __post_init__(self) -> None:
        if not _SLOWEST <= self.rate <= _FASTEST:
            raise ServingError(f"the audio's sampling rate is {self.rate} Hz; give one of {_SLOWEST} to {_FASTEST} Hz")
        if not self.samples.size:
            raise ServingError("the audio has no samples; give at least one")
        if not np.isfinite(self.samples).all():
            raise ServingError("the audio holds samples that are not finite numbers; give numbers from -1 to 1")

    @property
    def seconds(self) -> float:
        """Its length in seconds."""
        return len(self.samples) / self.rate

    def at(self, rate: int) -> NDArray[np.float32]:
        """Return the samples resampled to another rate, band-limited."""
        if rate == self.rate:
            return self.samples
        common = int(np.gcd(rate, self.rate))
        taken, given = self.rate // common, rate // common  # every `taken` samples become `given`
        margin = self.rate // 20 + 1  # zeros, since the Fourier transform is periodic
        blocks = -(-(len(self.samples) + margin) // taken)
        spectrum = np.fft.rfft(self.samples.astype(np.float64), blocks * taken)
        size = blocks * given
        kept = np.zeros(size // 2 + 1, dtype=spectrum.dtype)
        shared = min(len(kept), len(spectrum))
        kept[:shared] = spectrum[:shared]
        length = -(-len(self.samples) * rate // self.rate)
        resampled: NDArray[np.float32] = (np.fft.irfft(kept, size)[:length] * (given / taken)).astype(np.float32)
        return resampled


def read_audio(data: bytes, most_seconds: float) -> Audio:
    """Read an audio file, averaging its channels."""
    if not data:
        raise ServingError("the audio file is empty; send one with samples")
    is_wav = data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE"
    audio = _wav(data, most_seconds) if is_wav else None
    return audio or _by_soundfile(data, most_seconds, is_wav=is_wav)


def check_length(seconds: float, most: float) -> None:
    """Check a recording's length."""
    if seconds > most:
        raise TooLargeError(
            f"the audio is {seconds:.1f} seconds long, and the model reads {most:g} at a time; send it in parts"
        )


def _wav(data: bytes, most_seconds: float) -> Audio | None:
    """Decode a WAV file; None for an unsupported coding."""
    form, content = None, None
    for name, chunk in _chunks(data):
        if name == b"fmt ":
            form = chunk
        elif name == b"data" and form is not None:
            content = chunk
            break
    if form is None or content is None or len(form) < 16:
        raise ServingError("the WAV file is cut off: it has no samples, or does not say what they are; send it again")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form[:16])
    if tag == _EXTENSIBLE and len(form) >= 26:
        (tag,) = struct.unpack("<H", form[24:26])
    decode = _DECODERS.get((tag, bits))
    if decode is None or not channels:
        return None
    width = channels * bits // 8
    frames = len(content) // width
    if rate:
        check_length(frames / rate, most_seconds)
    samples = decode(content[: frames * width]).reshape(frames, channels)
    return Audio(samples.mean(1, dtype=np.float64).astype(np.float32), rate)


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the chunks of a RIFF file; one of unknown size, as in a stream, extends to the end."""
    view, place = memoryview(data), 12
    while place + 8 <= len(view):
        name, size = struct.unpack("<4sI", view[place : place + 8])
        yield name, view[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _integers(kind: str, scale: float, middle: float = 0.0) -> Any:
    return lambda content: (np.frombuffer(content, kind).astype(np.float32) - middle) / scale


def _of_three_bytes(content: memoryview) -> NDArray[np.float32]:
    parts = np.frombuffer(content, np.uint8).reshape(-1, 3)
    padded = np.zeros((len(parts), 4), np.uint8)
    padded[:, 1:] = parts  # the highest bytes of 32 bits
    return padded.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)


_DECODERS: dict[tuple[int, int], Any] = {
    (_PCM, 8): _integers("u1", 128.0, 128.0),
    (_PCM, 16): _integers("<i2", 2.0**15),
    (_PCM, 24): _of_three_bytes,
    (_PCM, 32): _integers("<i4", 2.0**31),
    (_FLOAT, 32): _integers("<f4", 1.0),
    (_FLOAT, 64): _integers("<f8", 1.0),
}


def _by_soundfile(data: bytes, most_seconds: float, *, is_wav: bool) -> Audio:
    """Decode audio of another format with soundfile."""
    try:
        soundfile: Any = importlib.import_module("soundfile")  # from an extra
    except ImportError as error:
        what = "WAV of a coding other than PCM and floats" if is_wav else "not WAV"
        raise ServingError(
            f"the audio file is {what} (it begins with {shown(data[:4])}); send WAV of PCM, or let the service read "
            f"FLAC, Ogg and MP3 too: {installation('audio')}"
        ) from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            most = int(most_seconds * file.samplerate) + 1
            samples, rate = file.read(most, dtype="float32", always_2d=True), int(file.samplerate)
            length = max(len(samples), file.frames)
    except Exception as error:  # soundfile raises types of its own
        reason = first_line(error).rpartition(": ")[2]  # without soundfile's name of the file
        raise ServingError(f"the file is not audio that can be read ({reason}); send WAV of PCM") from error
    check_length(length / rate, most_seconds)
    return Audio(samples.mean(1, dtype=np.float64).astype(np.float32), rate)


class SpeechReader:
    """The feature extractor of an export, with its sample rate and maximum length of a recording."""

    def __init__(self, directory: Path, inputs: Mapping[str, Any]) -> None:
        extractor = load_feature_extractor(directory, ServingError)
        if extractor is None:
            raise ServingError(
                f"{directory} holds no {PREPROCESSOR}, which converts audio to the model's inputs; export with "
                f"{option(tokenizer=...)}, the model's processor, or give input_features"
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
        """Return the encoder's inputs for a recording."""
        check_length(audio.seconds, self.most_seconds)
        samples = audio.at(self.rate)
        try:
            values = self._extractor(samples, sampling_rate=self.rate, return_tensors="np", **self._more)
        except Exception as error:  # transformers raises types of its own
            raise ServingError(f"the feature extractor does not take the audio ({first_line(error)})") from error
        names = [name for name in self._inputs if name in values]
        return {name: as_array(name, values[name], self._inputs[name]) for name in names}


def recording(value: Any, rate: int) -> Audio:
    """Convert a recording given in Python."""
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
