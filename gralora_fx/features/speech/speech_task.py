"""The speech recognition task, and the options of `gralora-fx generate` for a recording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from gralora_fx.base.compat.packages import require_extra
from gralora_fx.base.sources.model_files import usable_path
from gralora_fx.core.config.option import Option
from gralora_fx.errors import ConfigError, option
from gralora_fx.format.tasks import Task

MAIN_INPUTS = ("input_values", "input_features")
TASKS = (
    Task(
        "automatic-speech-recognition",
        "AutoModelForSpeechSeq2Seq",
        ("ForSpeechSeq2Seq",),
        inputs=("input_features", "input_values"),
        cache="encoder-decoder",
        adapters=("SEQ_2_SEQ_LM",),
        example="{'array': samples, 'sampling_rate': 16000}",
        example_options={"audio": "FILE.wav"},
    ),
)


@dataclass(frozen=True)
class RecordingOptions:
    """A recording to transcribe."""

    # path of the recording
    audio: Annotated[
        str | None, Option("Transcribe this recording, a WAV file, with a speech model.", metavar="FILE")
    ] = None
    # the spoken language; None to detect it
    language: Annotated[
        str | None,
        Option(
            f"Expect this language in {option(audio=...)}, such as en or English.",
            metavar="NAME",
            left_out="the language that the model detects",
        ),
    ] = None

    TASK: ClassVar = "automatic-speech-recognition-with-past"
    IS_BESIDE: ClassVar = False

    def content(self) -> bytes:
        """Read the file, before anything slow is imported."""
        path = str(self.audio)
        try:
            data = usable_path(path, ConfigError).read_bytes()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); give the path of an audio file") from error
        if not data.startswith((b"RIFF", b"RF64")):  # as WAV does
            require_extra("audio", f"{path}, which is not WAV,", ConfigError)
        return data

    def inputs(self, model: Any, content: bytes) -> dict[str, Any]:
        """Return the recording and its language as arguments of `generate`."""
        from gralora_fx.features.speech.recordings import read_audio

        audio = read_audio(content, model.encoder_inputs.speech.most_seconds)
        return {"prompts": {"array": audio.samples, "sampling_rate": audio.rate}, "language": self.language}
