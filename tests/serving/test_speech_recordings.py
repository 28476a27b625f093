"""Audio files as samples: formats, channels, rates, and what is not audio."""

from __future__ import annotations

import io
import struct
import sys
import wave
from typing import Any

import numpy as np
import pytest
import scipy.signal
from scipy.io import wavfile
from tiny_speech import sound, wav

from gralora_fx.errors import ServingError
from gralora_fx.features.speech.recordings import Audio, read_audio
from gralora_fx.run.engine.limits import TooLargeError

RATE = 16_000


def written(samples: np.ndarray[Any, Any], rate: int = RATE) -> bytes:
    file = io.BytesIO()
    wavfile.write(file, rate, samples)
    return file.getvalue()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kind", "error"),
    [("u1", 2 / 127), ("i2", 2 / 32767), ("i4", 1e-7), ("f4", 1e-7), ("f8", 1e-7)],
)
def test_samples_are_those_that_scipy_wrote(kind: str, error: float) -> None:
    samples = sound()
    scale = {"u1": 127, "i2": 32767, "i4": 2**31 - 1}.get(kind, 1)
    data = (samples.astype(np.float64) * scale + (128 if kind == "u1" else 0)).astype(kind)
    audio = read_audio(written(data), 30)
    assert audio.rate == RATE
    assert audio.samples.dtype == np.float32
    assert np.abs(audio.samples - samples).max() <= error


def test_24_bits_are_read() -> None:
    samples = sound()
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(3)
        writer.setframerate(RATE)
        whole = (samples * (2**23 - 1)).round().astype("<i4")
        writer.writeframes(whole.view(np.uint8).reshape(-1, 4)[:, :3].tobytes())
    assert np.abs(read_audio(file.getvalue(), 30).samples - samples).max() <= 2e-7


def test_channels_are_averaged() -> None:
    left, right = sound(1), sound(2)
    audio = read_audio(written(np.stack([left, right], axis=1)), 30)
    assert np.allclose(audio.samples, (left + right) / 2, atol=1e-6)


def test_chunks_beside_the_samples_an_extensible_format_and_a_streams_open_end_are_read() -> None:
    samples = sound()
    plain = wav(samples)
    note = b"LIST" + struct.pack("<I", 5) + b"notes\0"
    extensible = struct.pack("<HHIIHHHHIH14s", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4, 1, bytes(14))
    form = b"fmt " + struct.pack("<I", len(extensible)) + extensible
    content = b"data" + b"\xff\xff\xff\xff" + plain[44:]
    for parts in ((plain[12:36], note, plain[36:]), (form, plain[36:]), (plain[12:36], content)):
        data = b"RIFF\xff\xff\xff\xffWAVE" + b"".join(parts)
        assert np.array_equal(read_audio(data, 30).samples, read_audio(plain, 30).samples)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_099, 44_100, 48_000, 96_000])
def test_resampling_keeps_what_the_new_rate_can_hold(rate: int) -> None:
    samples = sound(rate=rate)
    found = Audio(samples, rate).at(RATE)
    common = int(np.gcd(rate, RATE))
    expected = scipy.signal.resample_poly(samples.astype(np.float64), RATE // common, rate // common)
    assert len(found) == len(expected)
    inner = slice(400, -400)  # at its ends each filter makes up what is not there
    power = np.square(expected[inner]).mean()
    assert np.square(found[inner] - expected[inner]).mean() <= 2e-3 * power


def test_a_tone_is_itself_at_another_rate_and_one_that_is_too_high_is_gone() -> None:
    times = np.arange(44_100) / 44_100
    low, high = (np.sin(2 * np.pi * pitch * times).astype(np.float32) for pitch in (440, 12_000))
    found = Audio(low, 44_100).at(RATE)
    assert np.abs(found - np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE))[1000:-1000].max() <= 1e-3
    assert np.abs(Audio(high, 44_100).at(RATE))[1000:-1000].max() <= 1e-3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the audio file is empty"),
        (b"ID3\x03 and so on", "the audio file is not WAV .*FLAC, Ogg and MP3 too|is not audio that can be read"),
        (b'{"no": "audio"}', "the audio file is not WAV|is not audio that can be read"),
        (wav(sound())[:30], "WAV file is cut off"),
        (wav(np.zeros(0)), "the audio has no samples"),
        (written(np.array([0.5, np.nan], np.float32)), "not finite numbers"),
        (written(sound(), 200), "sampling rate is 200 Hz"),
        (wav(sound())[:20] + b"\x99" + wav(sound())[21:], "WAV of a coding other than PCM|not audio that can be read"),
        (wav(sound())[:22] + b"\0\0" + wav(sound())[24:], "WAV of a coding other than PCM|not audio that can be read"),
    ],
)
def test_what_is_not_audio_is_said(data: bytes, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        read_audio(data, 1e6)


def test_audio_of_another_length_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(TooLargeError, match=r"the audio is 2\.0 seconds long, and the model reads 1\.5 at a time"):
        read_audio(wav(sound(seconds=2)), 1.5)


@pytest.mark.parametrize("form", ["FLAC", "OGG", "MP3", "AIFF"])
def test_other_formats_are_read_by_soundfile(form: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    file, samples = io.BytesIO(), sound()
    soundfile.write(file, np.stack([samples, samples], 1), RATE, format=form)
    audio = read_audio(file.getvalue(), 1.5)
    assert audio.rate == RATE
    error = np.square(audio.samples[: len(samples)] - samples[: len(audio.samples)]).mean()
    assert error <= 0.3 * np.square(samples).mean()  # MP3 begins with a delay, and loses some
    with pytest.raises(TooLargeError, match=r"the model reads 0\.5 at a time"):
        read_audio(file.getvalue(), 0.5)


def test_a_wav_file_of_another_coding_is_read_by_soundfile() -> None:
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, sound(), RATE, format="WAV", subtype="ULAW")
    assert np.abs(read_audio(file.getvalue(), 30).samples - sound()).max() <= 0.05


def test_without_soundfile_other_formats_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ServingError, match=r"not WAV \(it begins with b'fLaC'\); .*pip install 'gralora-fx\[audio\]'"):
        read_audio(b"fLaC and more", 30)
    assert read_audio(wav(sound()), 30).seconds == 0.8
