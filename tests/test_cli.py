"""The command line on local models and adapters, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("bert", num_labels=3)
    model.bert.save_pretrained(folder / "base")
    model.save_pretrained(folder / "classifier")
    config = peft.GraloraConfig(
        r=8, target_modules=["query", "value"], task_type="SEQ_CLS", init_weights=False, inference_mode=False
    )
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


def run(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gralora_fx.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == expect, result.stdout + result.stderr
    return result


def test_export_then_verify(checkpoint: Path, tmp_path: Path) -> None:
    # the base has no head of its own: its size comes from the adapter's copy of it
    given = ("--model", checkpoint / "base", "--adapter", checkpoint / "adapter", "--output", tmp_path / "onnx")
    result = run("export", *given)
    assert "passed: 4 cases" in result.stdout
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    assert "passed: 4 cases" in run("verify", *given).stdout
    other = run("verify", "--model", checkpoint / "classifier", "--output", tmp_path / "onnx", expect=1)
    assert "FAILED" in other.stdout


def test_inspect_lists_sites_or_the_plan(checkpoint: Path) -> None:
    sites = run("inspect", "--model", checkpoint / "classifier").stdout
    assert "bert.encoder.layer.1.attention.self.query  linear  32 -> 32  calls=1" in sites
    planned = run("inspect", "--model", checkpoint / "classifier", "--adapter", checkpoint / "adapter").stdout
    assert "4 of 14 sites adapted" in planned


def test_inspect_draws(checkpoint: Path, tmp_path: Path) -> None:
    given = ("--model", checkpoint / "classifier", "--adapter", checkpoint / "adapter")
    result = run("inspect", *given, "--html", tmp_path / "out.html", "--svg", tmp_path / "out.svg")
    assert f"wrote {tmp_path / 'out.html'}" in result.stderr
    assert "4 of 14 sites adapted" in result.stdout
    page, svg = (tmp_path / "out.html").read_text(), (tmp_path / "out.svg").read_text()
    assert page.startswith("<!doctype html>")
    assert svg.startswith("<")
    assert "default: r=8 k=2" in page
    assert "error: cannot write" in run("inspect", *given, "--html", tmp_path, expect=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect",), "error: no model was named; give --model"),
        (("inspect", "--model", "/no/such/model"), "error: no model can be loaded from /no/such/model"),
        (("inspect", "--model", "{base}", "--task", "poetry"), "error: unknown task 'poetry'; take one of"),
        (("export", "--model", "{base}", "--output", "{base}"), "is not empty and holds no gralora_export.json"),
        (
            ("export", "--model", "{base}", "--output", "{new}", "--precision", "fp8"),
            "precision='fp8' is not available",
        ),
        (("verify", "--model", "{base}", "--output", "{new}"), "error: no gralora_export.json in"),
        (("inspect", "--model", "{base}", "--adapter", "{base}"), "error: no adapter_config.json in"),
    ],
)
def test_bad_input_ends_with_one_line(
    checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    filled = [argument.format(base=checkpoint / "base", new=tmp_path / "new") for argument in arguments]
    result = run(*filled, expect=1)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_wrong_option_shows_the_usage() -> None:
    assert "No such option" in run("export", "--modle", "x", expect=2).stderr


def test_export_streams_quantizes_and_is_verified_afterwards(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    named = ("--model", tmp_path / "base", "--task", "text-generation-with-past", "--output", tmp_path / "onnx")
    result = run("export", *named, "--stream", "--quantize", "int4", "--block-size", 16)
    assert "run gralora-fx verify" in result.stderr
    assert "passed" in run("verify", "--model", tmp_path / "base", "--output", tmp_path / "onnx").stdout
    result = run("export", *named, "--quantize", "int4", "--block-size", 24, expect=1)
    assert "error: block_size=24 is no block size" in result.stderr
