"""Speech: models that read sound and write down what was said."""

from gralora_fx.base.features import Feature

FEATURE = Feature(
    "speech",
    signs=frozenset({"automatic-speech-recognition-with-past"}),
    parts={
        "tasks": "speech_task:TASKS",
        "example inputs": "sound_examples:example_of",
        "encoder inputs": "speech_inputs:SpeechInputs",
        "generate options": "recording_options:RecordingOptions",
        "routes": "speech_routes:speech_routes",
    },
)
