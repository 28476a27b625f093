"""Every command that the README shows runs as it stands there, for adapters of every method."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from example_checkpoint import copy_checkpoint
from readme_commands import README, answers, commands, inputs, run
from transformers import AutoModelForCausalLM

TEXT = README.read_text(encoding="utf-8")
COMMANDS, ANSWERS = commands(TEXT), answers(TEXT)
CHATTER = re.compile(r"FutureWarning|DeprecationWarning|UserWarning|\[transformers\]|Loading weights|it/s\]|Traceback")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base, and adapters of it that peft saved: GraLoRA's from the example, a hybrid one, LoRA and rsLoRA."""
    folder: Path = tmp_path_factory.mktemp("made") / "adapters"
    copy_checkpoint(tmp_path_factory, folder)
    (folder / "adapter").rename(folder / "GraLoRA")
    settings: dict[str, peft.PeftConfig] = {
        "hybrid": peft.GraloraConfig(r=8, hybrid_r=4, target_modules=["q_proj", "v_proj"], init_weights=False),
        "LoRA": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        "rsLoRA": peft.LoraConfig(r=4, use_rslora=True, target_modules="all-linear", init_lora_weights=False),
    }
    for name, config in settings.items():
        torch.manual_seed(1)
        config.task_type = "CAUSAL_LM"
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        peft.get_peft_model(base, config).save_pretrained(folder / name)
    return folder


def serve(command: list[str]) -> str:
    """Start a service on a port of its own, and end it once it runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gralora_fx.cli", *command, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines: list[str] = []
    assert process.stderr is not None
    try:
        for line in process.stderr:
            lines.append(line)
            if "running on http://" in line:
                break
        else:
            pytest.fail("".join(lines))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    return command[0]


def test_the_readme_has_commands() -> None:
    """So that a README whose blocks take another form is not passed over."""
    assert {"inspect", "export"} <= {command[0] for command in COMMANDS}


@pytest.mark.parametrize("methods", [["GraLoRA"], ["LoRA"], ["hybrid", "rsLoRA"]], ids=" and ".join)
def test_every_command_runs(
    methods: list[str],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With one method after the other in the same directory, as a user who tries a second adapter.

    GraLoRA's is the adapter that the README's own checkpoint has, so its answers are those that the README shows.
    """
    monkeypatch.chdir(tmp_path)
    given: set[Path] = set()
    told: list[str] = []
    for method in methods:
        for command in COMMANDS:
            if command[0] == "demo":  # tests/test_demo.py
                continue
            for name, kind in inputs(command):
                path = Path(name)
                assert not path.is_absolute(), name
                if path in given or not path.exists():
                    given.add(path)
                    shutil.rmtree(path, ignore_errors=True)
                    shutil.copytree(made / (method if kind == "adapter" else kind), path)
            (serve if command[0] == "serve" else run)(command)
            printed = capfd.readouterr()
            assert not CHATTER.search(printed.err + printed.out), printed.err
            if command[0] == "generate" and method == "GraLoRA":
                told.append(printed.out.strip())
        assert told == (ANSWERS if method == "GraLoRA" else [])
        if "--html" in (words := [word for command in COMMANDS for word in command]):
            assert "<svg" in Path(words[words.index("--html") + 1]).read_text(encoding="utf-8")


def test_commands_are_read_from_blocks() -> None:
    page = """
```bash
pip install x
A=one/two   # a comment
gralora-fx export --model $BASE \\
    --adapter "${A}" --output out  # more
gralora-fx generate --onnx out --prompt "so it"  # goes on
python x.py && gralora-fx no
```
```python
gralora-fx not this
```
```
$ gralora-fx serve out --adapter name=$A &
```
"""
    found = commands(page)
    assert found == [
        ["export", "--model", "base", "--adapter", "one/two", "--output", "out"],
        ["generate", "--onnx", "out", "--prompt", "so it"],
        ["serve", "out", "--adapter", "name=one/two"],
    ]
    assert [list(inputs(command)) for command in found] == [
        [("base", "base"), ("one/two", "adapter")],
        [],
        [("one/two", "adapter")],
    ]
    assert answers(page) == ["goes on"]
