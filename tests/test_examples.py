"""The examples run as they are."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gralora_fx.demo import news_writer

EXAMPLES = Path(__file__).parent.parent / "examples"


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


def test_hybrid_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    news = news_writer.load_news(0)
    few = dataclasses.replace(news, train=news.train[:32], test=news.test[:16])
    monkeypatch.setattr(news_writer, "load_news", lambda _: few)
    monkeypatch.setattr(news_writer, "_HELD_OUT", 8)
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
    tokenizer, _, _ = news_writer.read_texts(seed=0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.model.layers[1].mlp.up_proj.weight.data[5] *= 1e3  # so that the channel 5 of the layer after it is loud
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--ranks", "8", "--rank", "8"]
    monkeypatch.setattr(sys, "argv", ["gradient_entanglement.py", *arguments, "--steps", "4", "--seeds", "1"])
    runpy.run_path(str(EXAMPLES / "gradient_entanglement.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj: 1 of 64 channels are loud" in output
    grown = json.loads((tmp_path / "out" / "entanglement.json").read_text())["grown"]["8"]
    assert grown["1"] > 0.5
    assert grown["1"] > grown["2"] > grown["4"] > grown["8"]  # a k-th of the columns shares a block with the channel
    assert "<svg" in (tmp_path / "out" / "entanglement.svg").read_text()
