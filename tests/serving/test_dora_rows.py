"""A service whose rows have the base, plain adapters, activated ones and DoRA: each answers as it does alone."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
from made_once import made_once
from prefix_interleavings import SIZES, Interleavings, made_mixed, mixed
from served_adapters import complete, expected
from starlette.testclient import TestClient
from tiny_models import tiny_model

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.service.app import create_app
from gralora_fx.serving import load

LORA, DORA, SMALL_DORA = "a0-0", "a0-1", "a2-1"
PROMPTS = ("Hello there", "a", "The capital of France is")


def make_export(folder: Path) -> None:
    made_mixed(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(made_once("adapters-of-every-method", make_export), tmp_path, dirs_exist_ok=True)
    return tmp_path


def oracle(directory: Path | None) -> Any:
    """PEFT's model with an adapter, or the base."""
    model = tiny_model("llama", **SIZES)
    return model if directory is None else peft.PeftModel.from_pretrained(model, directory).eval()


def test_answers_are_those_of_each_prompt_alone(folder: Path) -> None:
    """A short one of what `python -m benchmarks dora-rows` runs a thousand times."""
    found = Interleavings(*mixed(folder), seed=5)
    for _ in range(30):
        found.run()
    found.check(answers=60)


def test_a_directory_of_pefts_is_converted_when_a_request_names_it(folder: Path) -> None:
    names = (None, LORA, DORA, SMALL_DORA)
    answers = {(name, prompt): expected(oracle(name and folder / name), prompt) for name in names for prompt in PROMPTS}
    assert len({answers[name, PROMPTS[2]] for name in names}) == len(names)
    settings = ServiceSettings(folder / "onnx", adapter_root=folder, max_adapters=2)
    with TestClient(create_app(settings)) as client, ThreadPoolExecutor(4) as pool:
        asked = [*answers, *answers]
        found = pool.map(lambda one: complete(client, one[0] or "onnx", one[1]), asked)
        assert list(found) == [answers[one] for one in asked]


def test_memory_of_a_step_has_a_factor_of_each_output_more(folder: Path) -> None:
    """The engine's bound counts it, as other tensors of an adapter."""
    model = load(folder / "onnx")
    for name in (LORA, DORA):
        model.load_adapter(name, folder / "adapters" / f"{name}.onnx_adapter")
    inputs = model.adapters.inputs()
    outputs = sum(site.out_features for site in inputs.scaled)
    assert len(inputs.scaled) == len(inputs.sites)
    for name in (LORA, DORA):
        tensors = model.adapters[name].tensors
        scales = [value for key, value in tensors.items() if key.endswith("gralora_scale")]
        assert sum(value.size for value in scales) == outputs
        assert any(value.any() for value in scales) == (name == DORA)
    assert model.adapters[LORA].size == model.adapters[DORA].size
