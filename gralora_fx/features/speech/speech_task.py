"""The task of a model of speech."""

from __future__ import annotations

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
