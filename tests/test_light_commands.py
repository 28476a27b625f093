"""Commands that change files import neither torch nor transformers: their work takes milliseconds, imports seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from outer_method import Outer, OuterConfig
from peft_oracle import peft_model, saved_by_peft
from safetensors.torch import load_file
from tiny_models import tiny_model
from traces import fresh_trace

from gralora_fx import GraloraModel, rewrite
from gralora_fx.core.methods import METHODS, register
from gralora_fx.exporters import checkpoint_merge, export_onnx, fold_onnx, merge_checkpoint, to_lora
from gralora_fx.serving import load

HEAVY = ("torch", "transformers")
_PROGRAM = f"""
import json, sys
from gralora_fx.cli import main
found = []
for sys.argv[1:] in json.loads(sys.argv[1]):
    try:
        main()
    except SystemExit as end:
        found.append([end.code or 0, [name for name in {HEAVY} if name in sys.modules]])
print(json.dumps(found))
"""
ADAPTERS: dict[str, dict[str, Any]] = {
    "gralora": {"r": 4, "gralora_k": 2, "alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "hybrid": {"r": 4, "hybrid_r": 2, "target_modules": ["q_proj", "v_proj"]},
    "lora": {"method": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
}


def run(*commands: Sequence[object]) -> list[tuple[int, list[str]]]:
    """Return the status of each command in one process, and which heavy packages are imported after it."""
    program = [sys.executable, "-c", _PROGRAM, json.dumps([[str(word) for word in words] for words in commands])]
    result = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.stdout, result.stderr
    return [(status, heavy) for status, heavy in json.loads(result.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base in bfloat16, adapters of it, and two exports of it."""
    folder: Path = tmp_path_factory.mktemp("light")
    for name, fields in ADAPTERS.items():
        saved_by_peft("llama", folder / name, **fields)
    model = tiny_model("llama")
    traced = fresh_trace("llama")
    export_onnx(traced, folder / "onnx", verify=False)
    config = {**ADAPTERS["gralora"], "target_modules": "all-linear"}
    saved_by_peft("llama", folder / "all", **config)
    export_onnx(GraloraModel.from_pretrained(traced, folder / "all"), folder / "data", adapters="data", verify=False)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    return folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_files_are_changed_without_torch(name: str, made: Path, tmp_path: Path) -> None:
    adapter = ("--adapter", made / name)
    rank = ("--rank", 2) if name == "lora" else ()
    assert (
        run(
            ("merge", "--model", made / "base", *adapter, "--output", tmp_path / "merged"),
            ("fold", "--onnx", made / "onnx", *adapter, "--output", tmp_path / "folded"),
            ("export-adapter", "--onnx", made / "data", *adapter, "--name", name),
            ("to-lora", *adapter, *rank, "--output", tmp_path / "lora"),
        )
        == [(0, [])] * 4
    )


def test_help_and_bad_input_import_nothing_heavy(made: Path, tmp_path: Path) -> None:
    commands = ["inspect", "export", "export-adapter", "fold", "verify", "to-lora", "merge", "serve"]
    assert run(*((command, "--help") for command in commands)) == [(0, [])] * len(commands)
    adapter = ("--adapter", made / "gralora")
    bad: list[Sequence[object]] = [
        ("to-lora", "--adapter", tmp_path / "absent", "--output", tmp_path / "new"),
        ("to-lora", *adapter, "--rank", 0, "--output", tmp_path / "new"),
        ("merge", "--model", tmp_path / "absent", *adapter, "--output", tmp_path / "new"),
        ("merge", "--model", made / "base", *adapter, "--output", made / "base"),
        ("fold", "--onnx", tmp_path / "absent", *adapter, "--output", tmp_path / "new"),
        ("export-adapter", "--onnx", made / "onnx", *adapter),
    ]
    assert run(*bad) == [(1, [])] * len(bad)


def test_a_package_that_is_missing_is_one_line_with_the_remedy(made: Path, tmp_path: Path) -> None:
    without_torch = (
        "import sys; from importlib.machinery import PathFinder; from gralora_fx.cli import main\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *more: None if name.split('.')[0] == 'torch' else find(name, *more)\n"
        "main()"
    )
    export = ["export", "--model", str(made / "base"), "--output", str(tmp_path / "onnx")]
    result = subprocess.run([sys.executable, "-c", without_torch, *export], capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    remedy = "pip install gralora-fx (in a clone: pip install -e .) installs all that it needs"
    assert result.stderr.splitlines()[-1] == (f"error: gralora-fx export needs torch, which is not installed; {remedy}")
    assert not (tmp_path / "onnx").exists()


def test_onnxruntime_reports_nothing(made: Path, tmp_path: Path) -> None:
    """Its official builds write a device id below the home, and send what they know of models."""
    code = f"import gralora_fx, onnxruntime\nonnxruntime.InferenceSession({str(made / 'onnx' / 'model.onnx')!r})"
    unset = ("ORT_DISABLE_TELEMETRY", "CI", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")  # each of which prevents it too
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "fields", "alone"),
    [
        ("llama", ADAPTERS["gralora"], True),
        ("llama", {**ADAPTERS["lora"], "target_modules": "all-linear"}, True),
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"]}, True),  # `Conv1D`, square ones too
        ("gpt2", {"r": 4, "target_modules": ["attn.c_proj"]}, True),
        ("bert", {"r": 4, "target_modules": ["query", "value"]}, True),  # square ones with a bias
        ("opt", {"r": 4, "target_modules": ["q_proj", "fc1"]}, True),
        ("qwen3", {"r": 4, "target_modules": ["k_proj", "o_proj"]}, True),
        ("t5", {"r": 4, "target_modules": ["q", "wo"]}, True),
        ("bert", {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]}, False),
        ("bert", {"r": 4, "target_modules": ["pooler.dense"]}, False),
        ("gpt2", {"r": 4, "target_modules": ["lm_head"], "gralora_k": 1}, False),  # tied to the embedding
        ("albert", {"r": 4, "target_modules": ["query"]}, False),  # one layer, called again and again
    ],
)
def test_what_the_files_show_is_what_the_model_says(
    name: str, fields: dict[str, Any], alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that asks no model writes, byte for byte, what one that asks writes."""
    tiny_model(name).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model(tiny_model(name), **fields).save_pretrained(str(tmp_path / "adapter"))
    asked: list[object] = []
    ask = checkpoint_merge.names_of
    monkeypatch.setattr(checkpoint_merge, "names_of", lambda *given: asked.append(given) or ask(*given))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "one")
    assert bool(asked) is not alone
    monkeypatch.setattr(checkpoint_merge, "names_in_files", lambda *_: None)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")
    files = [sorted((tmp_path / place).iterdir()) for place in ("one", "other")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True))


def test_two_names_of_one_stored_weight_ask_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second name of a tied weight may be stored too: with equal values, it is for the model to say."""
    from safetensors.torch import save_file

    tiny_model("llama").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    one, other = (f"model.layers.{index}.self_attn.q_proj.weight" for index in (0, 1))
    tensors[other] = tensors[one].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    saved_by_peft("llama", tmp_path / "adapter", **ADAPTERS["gralora"])
    asked: list[object] = []
    ask = checkpoint_merge.names_of
    monkeypatch.setattr(checkpoint_merge, "names_of", lambda *given: asked.append(given) or ask(*given))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert asked


def test_a_method_of_tensors_alone_changes_files_too(tmp_path: Path) -> None:
    """A registered method whose formulas call torch's functions is given torch's tensors."""
    method = register(Outer())
    try:
        traced = fresh_trace("llama")
        model = rewrite(traced, OuterConfig(target_modules={"q_proj"}, scale=0.5))
        for factors in model.adapter("default").factors.values():
            torch.nn.init.normal_(factors.u)
        model.save_pretrained(tmp_path / "adapter")
        tiny_model("llama").save_pretrained(tmp_path / "base")
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        path = "model.layers.1.self_attn.q_proj"
        merged, base = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
        expected = base[f"{path}.weight"] + model.delta_weight(path)
        assert torch.allclose(merged[f"{path}.weight"], expected, atol=1e-6)
        to_lora(tmp_path / "adapter", tmp_path / "lora")
        pair = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        A, B = (pair[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(B @ A, model.delta_weight(path), atol=1e-6)
        export_onnx(traced, tmp_path / "onnx", verify=False)
        fold_onnx(tmp_path / "onnx", tmp_path / "adapter", tmp_path / "folded")
        ids = torch.randint(3, 90, (2, 5))
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        assert torch.allclose(load(tmp_path / "folded")(input_ids=ids).logits, logits, atol=1e-4)
    finally:
        METHODS.remove(method)
