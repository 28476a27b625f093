"""Exports opened and served in a process that has neither torch nor transformers, as the runtime alone has neither."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from client_environments import ROOT, runtime
from damaged_exports import forget_digests
from sentence_encoders import save_encoder
from served_exports import decoders

from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

_ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
_FORBID = "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
# What a process prints for a decoder and an encoder: a line for each question, in Python
_ASK = """
import json, sys
from gralora_fx.serving import load

decoder, encoder = sys.argv[1:]
model = load(decoder)
chat = [{"role": "user", "content": "Hello"}]
print(json.dumps([
    model.generate(["abc", chat], adapter=["wide", None], max_new_tokens=5),
    model.generate([5, 6, 7], adapter="small", max_new_tokens=5),
    model.generate([5, 6], do_sample=True, seed=1, top_p=0.9, repetition_penalty=1.2, max_new_tokens=5, logprobs=2)[0],
    list(model.generate("a", regex="[a-c]{2,4}", stream=True, max_new_tokens=5)),
    model(input_ids=[[5, 6, 7]], adapter="wide").logits[0, -1].round(3).tolist(),
]))
model = load(decoder, ["AzureExecutionProvider", "CPUExecutionProvider"])
print(json.dumps(model.generate(["abc", "de"], adapter="wide", max_new_tokens=5)))
model = load(encoder)
inputs = model.tokenizer(["abc", "d"], padding=True, return_tensors="np")
print(json.dumps({name: array.shape for name, array in model(**inputs).items()}))
"""
# and by services and the command line, which import neither torch nor transformers where they are there
_SERVE = """
import json, sys
from pathlib import Path
from starlette.testclient import TestClient
from gralora_fx.cli import main
from gralora_fx.serving import ServiceSettings, create_app

decoder, encoder = sys.argv[1:]

def asked(path, route, **body):
    with TestClient(create_app(ServiceSettings(Path(path)))) as client:
        return client.post(route, json=body).raise_for_status().json()

chat = [{"role": "user", "content": "Hello"}]
answer = asked(decoder, "/v1/chat/completions", model="wide", messages=chat, max_tokens=4, temperature=0)
print(json.dumps(answer["choices"][0]["message"]["content"]))
answer = asked(encoder, "/v1/embeddings", model="onnx", input=["abc", "d"])
print(json.dumps(len(answer["data"])))
options = ["--prompt", "abc", "--adapter", "wide", "--max-new-tokens", "5"]
sys.argv = ["gralora-fx", "generate", "--onnx", decoder, *options]
try:
    main()
except SystemExit as end:
    assert not end.code
heavy = [name for name in ('torch', 'transformers') if sys.modules.get(name)]
assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders(tmp_path_factory.mktemp("light"), "data")[0]["data"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    source = str(save_encoder("bert", folder, "mean"))
    export_onnx(load_traced(source, None, None), folder / "onnx", tokenizer=source, verify=False)
    return folder / "onnx"


def printed(python: Path | str, code: str, paths: tuple[Path, Path], environment: dict[str, str]) -> list[str]:
    """Return the lines that a process prints, which has not imported torch in the end."""
    command = [str(python), "-c", code, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=paths[0])
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def without_torch(decoder: Path, encoder: Path) -> list[str]:
    """Run a process that cannot import torch; return what it prints."""
    return printed(sys.executable, _FORBID + _ASK + _SERVE, (decoder, encoder), _ENVIRONMENT)


@pytest.mark.quick
def test_answers_are_those_beside_torch(decoder: Path, without_torch: list[str]) -> None:
    found = json.loads(without_torch[0])
    model = load(decoder)
    chat = [{"role": "user", "content": "Hello"}]
    assert found[0] == model.generate(["abc", chat], adapter=["wide", None], max_new_tokens=5)
    assert found[1] == model.generate([5, 6, 7], adapter="small", max_new_tokens=5)
    options = {"do_sample": True, "seed": 1, "top_p": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 5}
    assert found[2] == model.generate([5, 6], **options)
    assert "".join(found[3]) == model.generate("a", regex="[a-c]{2,4}", max_new_tokens=5)
    assert found[4] == model(input_ids=[[5, 6, 7]], adapter="wide").logits[0, -1].round(3).tolist()
    expected = load(decoder).generate(["abc", "de"], adapter="wide", max_new_tokens=5)
    assert json.loads(without_torch[1]) == expected


def test_encoders_are_run_and_served_without_torch(without_torch: list[str]) -> None:
    shapes = json.loads(without_torch[2])
    assert [shape[0] for shape in shapes.values()] == [2] * len(shapes)
    assert json.loads(without_torch[4]) == 2


def test_torch_is_not_imported_where_it_is_there(decoder: Path, encoder: Path, without_torch: list[str]) -> None:
    assert printed(sys.executable, _SERVE, (decoder, encoder), _ENVIRONMENT) == without_torch[3:]


def test_what_the_runtime_alone_needs_is_what_is_installed(
    decoder: Path, encoder: Path, without_torch: list[str]
) -> None:
    python = runtime()
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    assert printed(python, _ASK + _SERVE, (decoder, encoder), environment) == without_torch
    size = sum(file.stat().st_size for file in python.parents[1].rglob("*") if file.is_file())
    assert size < 400e6


def test_what_transformers_reads_is_said_to_need_it(decoder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(decoder, tmp_path / "onnx")
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "WhisperTokenizer"}))
    forget_digests(path)
    program = f"{_FORBID}from gralora_fx.serving import load\nload(sys.argv[1]).generate('a')"
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert "is read by transformers, which is not installed: pip install gralora-fx" in result.stderr.splitlines()[-1]
