"""The README's Python can be pasted: every block runs as it is written, one after the other, as a reader would."""

from __future__ import annotations

import io
import re
import runpy
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from example_checkpoint import EXAMPLE, copy_checkpoint
from readme_commands import README, commands, run
from running_service import running
from transformers import AutoModelForCausalLM, AutoTokenizer

from gralora_fx.core.config.service_settings import ServiceSettings

ADDRESS = "http://127.0.0.1:8000/"


def python_blocks() -> list[tuple[int, str]]:
    """Every Python block, with the number of its first line."""
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in found]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the blocks in an empty directory with the example's checkpoint; return their names after the last."""
    directory = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        copy_checkpoint(tmp_path_factory, Path("runs/peft_checkpoint"))
        namespace: dict[str, Any] = {"__name__": "readme"}
        for line, block in python_blocks():
            code = "\n" * line + block  # so that a traceback names the README's line
            if ADDRESS in block:
                namespace["told"] = while_served(code, namespace)
            else:
                exec(compile(code, str(README), "exec"), namespace)
    return {**namespace, "directory": directory, "example": runpy.run_path(str(EXAMPLE))}


def while_served(code: str, namespace: dict[str, Any]) -> str:
    """Run a block beside the service that the README has started by then; returns what it printed."""
    export = next(command for command in commands(README.read_text(encoding="utf-8")) if command[0] == "export")
    run(export)
    printed = io.StringIO()
    with running(ServiceSettings(Path(export[-1]))) as (url, _), redirect_stdout(printed):
        exec(compile(code.replace(ADDRESS, url), str(README), "exec"), namespace)
    return printed.getvalue()


def test_no_block_has_prompts() -> None:
    blocks = python_blocks()
    assert len(blocks) == 3
    assert not any(re.search(r"^\s*(>>>|\.\.\.)", block, re.MULTILINE) for _, block in blocks)


def test_the_official_client_is_told_what_the_readme_shows(names: dict[str, Any]) -> None:
    shown = re.findall(r"output_text\)  # (.*) \(twice\)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert names["told"] == f"{shown[0]} {shown[0]}\n"


def test_the_checkpoint_becomes_an_answer(names: dict[str, Any]) -> None:
    assert names["report"].verification.passed
    shown = re.findall(r'max_new_tokens=8\)\)  # "(.*)"$', README.read_text(encoding="utf-8"), re.MULTILINE)
    assert [names["model"].generate("The capital of France is", max_new_tokens=8)] == shown


def test_no_answer_of_the_checkpoint_is_near_a_tie(names: dict[str, Any]) -> None:
    """So that any processor gives the same, to every question that base and adapter were trained on."""
    folder, example = names["directory"] / "runs" / "peft_checkpoint", names["example"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    asked = [{"role": "user", "content": "Who are you?"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == example["asked"]("Who are you?")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    for capitals in (False, True):
        if capitals:
            model = peft.PeftModel.from_pretrained(model, folder / "adapter")
        for prompts, answer in example["lessons"](capitals=capitals):
            for prompt in prompts:
                ids, expected = (tokenizer(part)["input_ids"] for part in (prompt, f"{answer}<|end|>"))
                with torch.no_grad():
                    logits = model(torch.tensor([ids + expected])).logits[0, len(ids) - 1 : -1]
                assert logits.softmax(-1)[range(len(expected)), expected].min() > 0.6, (prompt, answer)


def test_the_rewritten_model_trains_and_merges(names: dict[str, Any]) -> None:
    gralora, merged, traced, x = (names[name] for name in ("gralora", "merged", "traced", "x"))
    assert (merged(x) - gralora(x)).abs().max() < 1e-4
    assert (merged(x) - traced(x)).abs().max() > 1e-3, "the adapter does nothing, so nothing was tested"
    assert len(merged.graph_module.graph.nodes) == len(traced.graph_module.graph.nodes)


def test_the_saved_adapters_are_read_back(names: dict[str, Any]) -> None:
    from gralora_fx import GraloraModel

    saved = names["directory"] / "runs" / "adapters"
    again = GraloraModel.from_pretrained(names["traced"], saved)
    again.load_adapter(saved / "other", "other")
    again.set_adapter(["default", "other"])
    assert (again(names["x"]) - names["gralora"](names["x"])).abs().max() < 1e-6


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= 9_000
