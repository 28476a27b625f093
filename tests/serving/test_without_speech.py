"""Without the folder of speech, what needs it is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from pruned_tree import copy_without, run_on
from tiny_speech import features, processor, sound, tiny_whisper

from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

TASK = "automatic-speech-recognition-with-past"
PROGRAM = """
import sys
from pathlib import Path

from tiny_speech import features, sound, tiny_whisper
from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import GraloraError
from gralora_fx.service.app import create_app
from gralora_fx.serving import load

def refused(work):
    try:
        work()
    except GraloraError as error:
        print(error)


TASK = "automatic-speech-recognition-with-past"
model = load(sys.argv[1])
read = features(sound()).numpy()
print(model(input_features=read, decoder_input_ids=[[1, 2]])[0].shape)
refused(lambda: trace(tiny_whisper(), task=TASK))
refused(lambda: trace(tiny_whisper()))
refused(lambda: model.generate(sound()))
refused(lambda: create_app(ServiceSettings(Path(sys.argv[1]))))
"""


@pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning")  # of training alone
def test_a_model_of_speech_is_refused_by_name_and_called_by_its_inputs(tmp_path: Path) -> None:
    export_onnx(trace(tiny_whisper(), task=TASK), tmp_path / "onnx", tokenizer=processor(), verify=False)
    printed = run_on(copy_without(tmp_path / "tree", "speech"), PROGRAM, tmp_path / "onnx").splitlines()
    shape, task, inputs, prompt, service = printed
    expected = load(tmp_path / "onnx")(input_features=features(sound()).numpy(), decoder_input_ids=[[1, 2]])[0].shape
    assert shape == str(expected)
    assert task.startswith(f"unknown task {TASK!r}; take one of feature-extraction,")
    assert inputs == (
        "WhisperForConditionalGeneration takes input_features, for which no example is known; give example_inputs"
    )
    assert service == f"{tmp_path / 'onnx'} was exported for {TASK}, which is not served yet"
    assert prompt == (
        f"{tmp_path / 'onnx'} was exported for the task {TASK}, and no feature that is installed reads prompts for it "
        "(its encoder takes input_features); install gralora-fx with all of its features"
    )
