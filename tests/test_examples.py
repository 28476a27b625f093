"""The examples run as they are."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from gralora_fx.demo import news_writer

pytestmark = pytest.mark.usefixtures("own_garbage")

EXAMPLES = Path(__file__).parent.parent / "examples"

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_models(folder: Path) -> None:
    """Save a tiny decoder and a tiny classifier, with a tokenizer of the news."""
    tokenizer, _, _ = news_writer.read_texts(seed=0)
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    for name, model in (
        ("decoder", LlamaForCausalLM(LlamaConfig(**sizes))),
        ("classifier", BertModel(BertConfig(**sizes))),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run_example(name: str, *arguments: object) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"](list(map(str, arguments)))


def metrics_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses_of(output: Path) -> list[float]:
    return [entry["loss"] for entry in metrics_of(output) if "loss" in entry]


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "4 of 14 sites adapted" in output
    assert "merged and unmerged differ by" in output


def test_peft_to_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["peft_to_onnx.py", "--output", str(tmp_path / "onnx")])
    runpy.run_path(str(EXAMPLES / "peft_to_onnx.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert re.search(r"^passed: \d+ inputs compared with PyTorch, .*tokens", output, re.MULTILINE)
    assert float(re.findall(r"ONNX Runtime and PyTorch differ by (\S+)$", output, re.MULTILINE)[0]) < 1e-3
    assert "\nwithout the adapter: The capital of France is a city.\n" in output
    assert output.endswith("\nwith it:             The capital of France is Paris.\n")


def test_several_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["several_adapters.py", "--picture", str(tmp_path / "model.html")])
    runpy.run_path(str(EXAMPLES / "several_adapters.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "formal, brief, mixed" in output
    assert "<svg" in (tmp_path / "model.html").read_text()


def test_two_adapters_one_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["two_adapters_one_base.py", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "two_adapters_one_base.py"), run_name="__main__")
    output = capsys.readouterr().out
    differences = re.findall(r"(formal|brief): ONNX Runtime and PEFT differ by (\S+) of the largest logit", output)
    assert [name for name, _ in differences] == ["formal", "brief", "formal"]
    assert all(float(difference) < 1e-4 for _, difference in differences)
    assert "loaded: brief, formal" in output


def test_read_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("read_digits.py", "--output", tmp_path, "--images", 64, "--steps", 120, "--questions", 10)
    output = capsys.readouterr().out
    first, *_, last = map(float, re.findall(r"^step \d+: loss (\S+)$", output, re.MULTILINE))
    assert last < first
    assert "exported, and verified with images: True" in output
    before, after = map(int, re.findall(r"^(?:before|after): (\d+) of 10 digits read over HTTP$", output, re.MULTILINE))
    assert before < after


def test_hybrid_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    news = news_writer.load_news(0)
    few = news._replace(train=news.train[:32], test=news.test[:16])
    monkeypatch.setattr(news_writer, "load_news", lambda _: few)
    monkeypatch.setattr(news_writer, "HELD_OUT", 8)
    arguments = ["hybrid_decoder.py", "--output", str(tmp_path), "--steps", "4", "--adapter-steps", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / "hybrid_decoder.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert output.count("attention: 1 layers fused, 0 not; verified: True") == 2
    before, after = re.findall(r"sports: (\S+) bits per character, (\S+) with the adapter", output)[0]
    assert float(after) < float(before)
    assert re.search(r"^base: England.*^sports: England", output, re.MULTILINE | re.DOTALL)


def test_gradient_entanglement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_models(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "decoder")
    model.model.layers[1].mlp.up_proj.weight.data[5] *= 1e3  # so that the channel 5 of the layer after it is loud
    model.save_pretrained(tmp_path / "decoder")
    arguments = ["--model", str(tmp_path / "decoder"), "--output", str(tmp_path / "out"), "--ranks", "8", "--rank", "8"]
    monkeypatch.setattr(sys, "argv", ["gradient_entanglement.py", *arguments, "--steps", "4", "--seeds", "1"])
    runpy.run_path(str(EXAMPLES / "gradient_entanglement.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj: 1 of 64 channels are loud" in output
    grown = json.loads((tmp_path / "out" / "entanglement.json").read_text())["grown"]["8"]
    assert grown["1"] > 0.5
    assert grown["1"] > grown["2"] > grown["4"] > grown["8"]  # a k-th of the columns shares a block with the channel
    assert "<svg" in (tmp_path / "out" / "entanglement.svg").read_text()


CLASSIFIER = ("--texts", 32)
DECODER = ("--pieces", 8, "--length", 16)
TWO_EPOCHS = """
import runpy, sys
import torch
torch.set_num_threads(1)
examples, folder = sys.argv[1:]
for name, more in (("classifier", CLASSIFIER), ("decoder", DECODER)):  # which ends the group of processes
    arguments = ["--model", f"{folder}/{name}", "--output", f"{folder}/two-{name}", "--epochs", 2, *more]
    runpy.run_path(f"{examples}/train_{name}.py")["main"](list(map(str, arguments)))
"""


def test_examples_of_training_resume_and_run_on_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_models(tmp_path)
    script = tmp_path / "two_epochs.py"
    script.write_text(f"CLASSIFIER, DECODER = {CLASSIFIER}, {DECODER}\n{TWO_EPOCHS}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    two = subprocess.run(
        [*command, str(EXAMPLES), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0, two.stderr[-4000:]

    def train(name: str, output: str, *more: object) -> Path:
        run_example(f"train_{name}.py", "--model", tmp_path / name, "--output", tmp_path / output, *more)
        return tmp_path / output

    two_decoder = tmp_path / "two-decoder"
    parts = train("decoder", "parts", *DECODER, "--epochs", 1)
    train("decoder", "parts", *DECODER, "--epochs", 2, "--resume")
    assert capsys.readouterr().out.count("The government said") == 2  # between epochs
    assert losses_of(parts) == pytest.approx(losses_of(two_decoder), rel=1e-5)
    assert (parts / "loss.png").stat().st_size > 1000
    tensors, of_two = (load_file(path / "adapter/adapter_model.safetensors") for path in (parts, two_decoder))
    assert all(torch.allclose(of_two[key], tensor, atol=1e-4) for key, tensor in tensors.items())

    parts = train("classifier", "classes", *CLASSIFIER, "--epochs", 1)
    train("classifier", "classes", *CLASSIFIER, "--epochs", 2, "--resume")
    assert [entry["step"] for entry in metrics_of(parts) if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in metrics_of(tmp_path / "two-classifier") if "loss" in entry] == [1, 2]
    for output in (parts, tmp_path / "two-classifier"):
        assert "eval_accuracy" in metrics_of(output)[-1]
        assert (output / "loss.png").stat().st_size > 1000
        assert "classifier.weight" in str(list(load_file(output / "adapter/adapter_model.safetensors")))


def test_the_classifier_is_compared_with_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_models(tmp_path)
    arguments = ["--model", tmp_path / "classifier", "--output", tmp_path / "out", "--texts", 16, "--epochs", 1]
    run_example("train_classifier.py", *arguments, "--compare", "--seeds", 0)
    found = re.findall(r"^(\S+): held-out accuracy (\S+) \+- \S+, seeds \[0\]$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in found] == ["peft", "gralora_fx.peft"]
    theirs, ours = (metrics_of(tmp_path / "out" / f"{name}-0") for name in ("peft", "gralora_fx.peft"))
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-3)  # both begin at the same model


def test_own_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("own_method.py", "--output", tmp_path)
    output = capsys.readouterr().out
    first, *_, last = map(float, re.findall(r"loss (\d\.\d+)", output))
    assert last < first / 2
    assert "saved and loaded: equal True" in output
    assert "exported, compared: True" in output
    differences = re.findall(r"differs? by (\S+)$", output, re.MULTILINE)
    assert len(differences) == 2
    assert all(float(difference) < 1e-4 for difference in differences)
