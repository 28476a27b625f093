"""`gralora-fx generate` writes a recording down as `generate` does, and says what does not go with one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import run
from tiny_models import WIDE
from tiny_speech import sound, wav, whisper_export
from tiny_tokenizers import tiny_tokenizer
from traces import fresh

from gralora_fx.exporters import export_onnx
from gralora_fx.features.speech.recordings import read_audio
from gralora_fx.serving import load

pytestmark = pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a T5, a Whisper and a recording."""
    folder = tmp_path_factory.mktemp("pairs")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    traced = fresh("t5", task="text2text-generation-with-past", num_layers=1, **special, **WIDE["t5"])[1]
    export_onnx(traced, folder / "t5", tokenizer=tiny_tokenizer(), verify=False)
    shutil.copytree(whisper_export(), folder / "whisper")
    (folder / "a.wav").write_bytes(wav(sound()))
    return folder


def test_a_recording_is_written_down(pairs: Path) -> None:
    model, audio = load(pairs / "whisper"), read_audio((pairs / "a.wav").read_bytes(), 1).samples
    given = ("generate", "--onnx", pairs / "whisper", "--audio", pairs / "a.wav", "--max-new-tokens", "8")
    printed = run(*given)
    assert printed.stdout == model.generate(audio, max_new_tokens=8) + "\n"
    printed = run(*given, "--language", "de")
    assert printed.stdout == model.generate(audio, max_new_tokens=8, language="de") + "\n"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t5", ("--audio", "{folder}/a.wav"), "give --prompt TEXT and leave --audio out"),
        ("t5", ("--prompt", "a", "--language", "de"), "--language has no effect without --audio"),
        ("whisper", ("--prompt", "a"), "give --audio FILE and leave --prompt out"),
        ("whisper", (), "there is nothing to answer; give --audio FILE"),
        ("whisper", ("--audio", "{folder}/a.wav", "--chat"), "give --audio FILE and leave --chat out"),
        ("whisper", ("--audio", "{folder}/none.wav"), "none.wav cannot be read (No such file or directory)"),
        ("whisper", ("--audio", "{folder}"), "cannot be read (Is a directory)"),
        ("whisper", ("--audio", "{folder}/t5/config.json"), "the audio file is not WAV"),
        ("whisper", ("--audio", "{folder}/a.wav", "--language", "fr"), "no language 'fr'; there is de, en"),
    ],
)
def test_what_is_not_taken_is_one_line(pairs: Path, name: str, options: tuple[str, ...], message: str) -> None:
    printed = run("generate", "--onnx", pairs / name, *(option.format(folder=pairs) for option in options))
    assert printed.status == 1
    *stages, error = printed.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error or ("is not WAV" in message and "is not audio that can be read" in error)
    assert all(line.startswith(("import", "open", "read")) for line in stages)
    assert printed.stdout == ""
