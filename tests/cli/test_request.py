"""Requests for an export are checked before anything slow is imported, in words of the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gralora_fx.base.sources import model_directories
from gralora_fx.cli import main
from gralora_fx.cli.export import check_request
from gralora_fx.exporters.options import ExportOptions

# arguments beside --model and --output, and what the only line of the error has
CASES: list[tuple[tuple[str, ...], str]] = [
    (("--adapters", "data"), "--adapters data needs a model with an adapter"),
    (("--adapters", "inputs", "--quantize", "int4"), "give --adapter, or --adapters merged"),
    (("--adapters", "batched", "--precision", "fp16"), "--adapters data needs a model with an adapter"),
    (("--adapters", "batch"), "--adapters batch is not available; take 'merged' or 'data' or 'inputs'"),
    (("--quantize", "int8-dynamic", "--precision", "fp16"), "does not go with --precision fp16; take --precision fp32"),
    (
        ("--quantize", "int8-dynamic", "--accuracy-level", "1"),
        "--accuracy-level 1 has no effect with --quantize int8-dyn",
    ),
    (("--quantize", "int8", "--block-size", "24"), "--block-size 24 is not a block size"),
    (("--quantize", "int8", "--accuracy-level", "7"), "--accuracy-level 7 is not an accuracy level"),
    (("--precision", "fp8"), "--precision fp8 is not available"),
    (("--quantize", "int8", "--texts", "{texts}", "--precision", "bf16"), "--texts does not go with --precision bf16"),
    (("--quantize", "int8", "--texts", "{texts}", "--no-verify"), "--texts contradicts --no-verify"),
    (("--adapter-name", "news"), "--adapter-name news has no effect without --adapter"),
    (("--adapter", "{gralora}", "--adapter-name", "a b"), "'a b' is not a name for an adapter"),
    (("--adapter", "{gralora}", "--adapter-name", "a.b"), "'a.b' cannot name an adapter"),
    (("--adapter", "{gralora}", "--task", "text-classification"), "give --task text-generation, or another adapter"),
    (
        ("--adapter", "{base}"),
        "no adapter_config.json in {base}, which is a model; give the directory of a saved adapter",
    ),
    (
        ("--image-size", "32x32", "--task", "fill-mask"),
        "--image-size is for image-classification, and the task is fill-m",
    ),
    (
        ("--task", "fill-mask", "--output", "{earlier}"),
        "holds an export for the task text-generation, not fill-mask; give --o",
    ),
    (
        ("--output", "{earlier}"),
        "{earlier} holds an export of another base, {another}: model_type gpt2 and llama; give --overwrite to replace",
    ),
    (("--adapter", "{within}", "--output", "{earlier}", "--overwrite"), "lies within the output"),
    (("--model", "{earlier}"), "is an export, not a model; give the directory of the model that it was made from"),
    (("--model", "{gralora}"), "no config.json in {gralora}, which is an adapter; give the directory of a saved model"),
    (("--model", "/no/such/model"), "no model can be loaded from /no/such/model"),
]
PYTHON = re.compile(r"[a-z]=(True|False|'|\d|\.\.\.)|\w\(\)|[a-z]_onnx")


def made(folder: Path) -> dict[str, Path]:
    """Directories that look right."""

    def put(name: str, file: str, **fields: Any) -> Path:
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_text(json.dumps(fields))
        return folder / name

    gralora = {"peft_type": "GRALORA", "r": 2, "target_modules": ["q"]}
    another = put("another", "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    base = {
        "task": "text-generation",
        "schema_version": 1,
        "precision": "fp32",
        "sites": [],
        "base": {"name": str(another), "revision": None},
    }
    (folder / "texts").write_text("a text\n")
    places = {
        "base": put("base", "config.json", model_type="llama", architectures=["LlamaForCausalLM"]),
        "pair": put("pair", "config.json", is_encoder_decoder=True, architectures=["T5ForConditionalGeneration"]),
        "gralora": put("gralora", "adapter_config.json", **gralora, task_type="CAUSAL_LM"),
        "seq2seq": put("seq2seq", "adapter_config.json", **gralora, task_type="SEQ_2_SEQ_LM"),
        "untold": put("untold", "adapter_config.json", **gralora),
        "lora": put("lora", "adapter_config.json", peft_type="LORA", r=2, target_modules=["q"]),
        "earlier": put("earlier", "gralora_export.json", **base),
        "texts": folder / "texts",
        "another": another,
    }
    (places["earlier"] / "config.json").write_text("{}")
    return {**places, "within": put("earlier/adapters/x", "adapter_config.json", **gralora)}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[int, str]], str, dict[str, Path]]:
    """Return the status and stderr of each case, all run in one process, and which slow libraries that imported."""
    folder = tmp_path_factory.mktemp("request")
    places = made(folder)
    lines = []
    for arguments, _ in CASES:
        given = [argument.format(**places) for argument in arguments]
        defaults = {"--model": str(places["base"]), "--output": str(folder / "output")}
        lines.append(["export", *(word for pair in defaults.items() if pair[0] not in given for word in pair), *given])
    code = (
        "import contextlib, io, json, sys\nfrom gralora_fx.cli import main\n"
        f"for arguments in json.loads({json.dumps(lines)!r}):\n"
        "    sys.argv, err = ['gralora-fx', *arguments], io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stderr(err):\n            main()\n"
        "    except SystemExit as end:\n        print(json.dumps([end.code, err.getvalue()]))\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *results, imported = map(json.loads, done.stdout.splitlines())
    assert not (folder / "output").exists()
    return results, imported, places


@pytest.mark.parametrize("index", range(len(CASES)), ids=[" ".join(arguments) for arguments, _ in CASES])
def test_a_request_that_cannot_be_met_is_one_line(errors: Any, index: int) -> None:
    status, text = errors[0][index]
    assert status == 1
    assert len(text.splitlines()) == 1, text
    assert CASES[index][1].format(**errors[2]) in text
    assert not PYTHON.search(text), text


def test_nothing_slow_was_imported(errors: Any) -> None:
    assert errors[1] == []


def test_the_configuration_of_an_adapter_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that a hub id is read is a look-up."""
    places = made(tmp_path)
    (tmp_path / "named").mkdir()
    fields = {"peft_type": "GRALORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(places["base"])}
    (tmp_path / "named" / "adapter_config.json").write_text(json.dumps(fields))
    read: list[str] = []

    def resolved(directory: str, *args: Any, **kwargs: Any) -> Path:
        read.append(directory)
        return Path(directory)

    monkeypatch.setattr(model_directories, "resolve_directory", resolved)
    none: dict[str, Any] = {"model": None, "adapter_name": None, "task": None}
    adapter = str(tmp_path / "named")
    base = check_request(ExportOptions(), tmp_path / "output", adapter=adapter, **none)
    assert base == str(places["base"])
    assert read == [adapter]


def test_a_base_that_only_the_adapter_names_is_said_to_be_named_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["q"], "base_model_name_or_path": "/gone/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    given = ["gralora-fx", "export", "--adapter", str(tmp_path), "--output", str(tmp_path / "onnx")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        main()
    named = f"it is the base that {tmp_path} names, so give where it is as --model"
    assert f"no model can be loaded from /gone/base (there is no such directory); {named}" in capsys.readouterr().err
