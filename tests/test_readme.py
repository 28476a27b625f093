"""The README's Python can be pasted: every block runs as it is written, one after the other, as a reader would."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLE = Path(__file__).parents[1] / "examples" / "peft_to_onnx.py"


def python_blocks() -> list[tuple[int, str]]:
    """Every Python block, with the number of its first line."""
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in found]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the names of the blocks hold after the last one, run in an empty directory with the example's checkpoint."""
    directory = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        runpy.run_path(str(EXAMPLE))["make_checkpoint"](Path("runs/peft_checkpoint"))
        namespace: dict[str, Any] = {"__name__": "readme"}
        for line, block in python_blocks():
            code = compile("\n" * line + block, str(README), "exec")  # so that a traceback names the README's line
            exec(code, namespace)
    namespace["directory"] = directory
    return namespace


def test_no_block_has_prompts() -> None:
    blocks = python_blocks()
    assert len(blocks) == 2
    assert not any(re.search(r"^\s*(>>>|\.\.\.)", block, re.MULTILINE) for _, block in blocks)


def test_the_checkpoint_becomes_an_answer(names: dict[str, Any]) -> None:
    assert names["report"].verification.passed
    assert isinstance(names["answer"], str)
    assert names["logits"].ndim == 3


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
