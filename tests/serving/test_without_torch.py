"""Exports opened and served in a process that has neither torch nor transformers, as the runtime alone has neither."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from client_environments import runtime
from damaged_exports import forget_digests
from sentence_encoders import save_encoder
from served_exports import decoders

from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

_FORBID = "import json, sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
_ASK = """
from starlette.testclient import TestClient
from gralora_fx.serving import ServiceSettings, create_app
from pathlib import Path

def asked(path, route, **body):
    with TestClient(create_app(ServiceSettings(Path(path)))) as client:
        return client.post(route, json=body).raise_for_status().json()
"""
_PROGRAMS = {
    "rows": """
from gralora_fx.serving import load
model = load(sys.argv[1])
chat = [{"role": "user", "content": "Hello"}]
print(json.dumps([
    model.generate(["abc", chat], adapter=["wide", None], max_new_tokens=5),
    model.generate([5, 6, 7], adapter="small", max_new_tokens=5),
    model.generate([5, 6], do_sample=True, seed=1, top_p=0.9, repetition_penalty=1.2, max_new_tokens=5, logprobs=2)[0],
    list(model.generate("a", regex="[a-c]{2,4}", stream=True, max_new_tokens=5)),
    model(input_ids=[[5, 6, 7]], adapter="wide").logits[0, -1].round(3).tolist(),
]))
""",
    "one by one": """
from gralora_fx.serving import load
model = load(sys.argv[1], ["AzureExecutionProvider", "CPUExecutionProvider"])
print(json.dumps([model.generate(["abc", "de"], adapter="wide", max_new_tokens=5)]))
""",
    "encoder": """
from gralora_fx.serving import load
model = load(sys.argv[1])
inputs = model.tokenizer(["abc", "d"], padding=True, return_tensors="np")
print(json.dumps([{name: array.shape for name, array in model(**inputs).items()}]))
""",
    "served decoder": _ASK
    + """
chat = [{"role": "user", "content": "Hello"}]
answer = asked(sys.argv[1], "/v1/chat/completions", model="wide", messages=chat, max_tokens=4, temperature=0)
print(json.dumps([answer["choices"][0]["message"]["content"]]))
""",
    "served encoder": _ASK
    + """
answer = asked(sys.argv[1], "/v1/embeddings", model="onnx", input=["abc", "d"])
print(json.dumps([len(answer["data"])]))
""",
    "command": """
from gralora_fx.cli import main
options = ["--prompt", "abc", "--adapter", "wide", "--max-new-tokens", "5"]
sys.argv = ["gralora-fx", "generate", "--onnx", sys.argv[1], *options]
try:
    main()
except SystemExit as end:
    assert not end.code
""",
}
_END = "\nheavy = [name for name in ('torch', 'transformers') if sys.modules.get(name)]\nassert not heavy, heavy\n"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders(tmp_path_factory.mktemp("light"), "data")[0]["data"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    source = str(save_encoder("bert", folder, "mean"))
    export_onnx(load_traced(source, None, None), folder / "onnx", tokenizer=source, verify=False)
    return folder / "onnx"


def printed(name: str, path: Path, *, forbids: bool) -> str:
    """What a program prints, in a process that has no torch, or that has not imported it in the end."""
    program = (_FORBID if forbids else "import json, sys\n") + _PROGRAMS[name] + _END
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.quick
def test_answers_are_those_beside_torch(decoder: Path) -> None:
    found = json.loads(printed("rows", decoder, forbids=True))
    model = load(decoder)
    chat = [{"role": "user", "content": "Hello"}]
    assert found[0] == model.generate(["abc", chat], adapter=["wide", None], max_new_tokens=5)
    assert found[1] == model.generate([5, 6, 7], adapter="small", max_new_tokens=5)
    options = {"do_sample": True, "seed": 1, "top_p": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 5}
    assert found[2] == model.generate([5, 6], **options)
    assert "".join(found[3]) == model.generate("a", regex="[a-c]{2,4}", max_new_tokens=5)
    assert found[4] == model(input_ids=[[5, 6, 7]], adapter="wide").logits[0, -1].round(3).tolist()
    (texts,) = json.loads(printed("one by one", decoder, forbids=True))
    assert texts == load(decoder).generate(["abc", "de"], adapter="wide", max_new_tokens=5)


@pytest.mark.parametrize("name", ["served decoder", "command"])
def test_decoders_are_served_without_torch(name: str, decoder: Path) -> None:
    found = printed(name, decoder, forbids=True)
    assert found == printed(name, decoder, forbids=False)


def test_encoders_are_run_and_served_without_torch(encoder: Path) -> None:
    (shapes,) = json.loads(printed("encoder", encoder, forbids=True))
    assert [shape[0] for shape in shapes.values()] == [2] * len(shapes)
    assert json.loads(printed("served encoder", encoder, forbids=True)) == [2]
    assert json.loads(printed("served encoder", encoder, forbids=False)) == [2]


def test_what_the_runtime_alone_needs_is_what_is_installed(decoder: Path, encoder: Path) -> None:
    python = runtime()
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    for name, path in (("rows", decoder), ("command", decoder), ("served decoder", decoder), ("encoder", encoder)):
        command = [str(python), "-c", f"import json, sys\n{_PROGRAMS[name]}{_END}", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path)
        assert result.returncode == 0, result.stderr
        assert result.stdout == printed(name, path, forbids=True)
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
