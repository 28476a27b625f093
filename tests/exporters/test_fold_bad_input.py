"""Inputs that a fold refuses, leaving nothing behind, and the memory that it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fold_cases import CACHED, Case, adapted, assert_same_weights, copied, digests, edited_adapter, gralora
from tiny_models import tiny_model
from traces import fresh_trace

from gralora_fx.core.adapters.adapter_files import adapter_digest, read_adapter
from gralora_fx.core.adapters.saved_form import tensors_digest
from gralora_fx.errors import CheckpointError, ExportError, MergeError
from gralora_fx.exporters import fold_onnx
from gralora_fx.format.manifest import read_manifest

# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return a small export and an adapter; tests copy what they change."""
    return Case(tmp_path_factory.mktemp("small"), fresh_trace("llama", task=CACHED), gralora(["q_proj", "down_proj"]))


def test_layers_that_the_export_lacks_are_all_named(small: Case, tmp_path: Path) -> None:
    case = copied(small, tmp_path)

    def move(found: dict[str, torch.Tensor]) -> None:
        for key in list(found):
            if "layers.0" in key:
                found[key.replace("layers.0", "layers.9")] = found.pop(key)

    edited_adapter(case, move)
    with pytest.raises(MergeError) as caught:
        case.fold()
    assert "model.layers.9.self_attn.q_proj: the export has no such layer" in str(caught.value)
    assert "model.layers.9.mlp.down_proj: the export has no such layer" in str(caught.value)
    assert not case.out.exists()


def test_widths_of_another_base_are_told(small: Case, tmp_path: Path) -> None:
    wider = fresh_trace("llama", task=CACHED, hidden_size=64)
    adapted(wider, gralora(["q_proj"])).save_pretrained(tmp_path / "wider")
    with pytest.raises(
        MergeError, match=r"adapter is for 64 inputs and 32 outputs, but .* has 32 and 32; give an adapter"
    ):
        fold_onnx(small.base, tmp_path / "wider", tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.popitem(), "missing base_model.model.model.layers"),
        (lambda t: t.update({next(iter(t)): torch.full_like(t[next(iter(t))], float("nan"))}), "are not finite"),
        (lambda t: t.update({next(iter(t)): t[next(iter(t))][..., :1].contiguous()}), "which is not r="),
        (lambda t: t.clear(), "no tensor of a GraLoRA adapter"),
    ],
)
def test_a_damaged_adapter(edit: Any, message: str, small: Case, tmp_path: Path) -> None:
    case = copied(small, tmp_path)
    edited_adapter(case, edit)
    with pytest.raises(CheckpointError, match=message):
        case.fold()
    assert not case.out.exists()


def test_a_result_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    traced = fresh_trace("llama", task=CACHED)
    case = Case(tmp_path, traced, gralora(["down_proj"], alpha=1e9), precision="fp16")
    with pytest.raises(
        MergeError, match=r"folded weight of .*down_proj is not finite in float16; .* nothing was written"
    ):
        case.fold()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_earlier_adapter_of_another_base(small: Case, tmp_path: Path) -> None:
    case = copied(small, tmp_path)

    def name_base(base: str) -> None:
        config = json.loads((case.adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        (case.adapter / "adapter_config.json").write_text(json.dumps(config))

    for name, model_type in (("one", "llama"), ("other", "mistral")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
    name_base(str(tmp_path / "one"))
    case.fold()
    name_base(str(tmp_path / "other"))
    with pytest.raises(
        MergeError,
        match=r"an adapter of .*other, but the export has the adapter 'default' of .*one, another base: model_type",
    ):
        fold_onnx(case.out, case.adapter, tmp_path / "second")
    with pytest.warns(UserWarning, match="another base"):
        fold_onnx(case.out, case.adapter, tmp_path / "second", force=True)


def test_an_earlier_adapter_whose_base_has_another_name(small: Case, tmp_path: Path) -> None:
    """Two names alone do not show that they are of two models, as `gpt2` and `openai-community/gpt2` are not."""
    case = copied(small, tmp_path)
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    manifest_file = case.out / "gralora_export.json"
    for name in ("gpt2", "hub/other"):
        (case.adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        if name == "gpt2":
            case.fold()
            manifest = json.loads(manifest_file.read_text())
            manifest["adapters"]["default"]["sha256"] = "0" * 64
            manifest_file.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"adapter of hub/other, but .* 'default' of gpt2, which may be another base"):
        fold_onnx(case.out, case.adapter, tmp_path / "second")


def test_an_output_that_may_not_be_written(small: Case, tmp_path: Path) -> None:
    case = copied(small, tmp_path)
    before = digests(case.base)
    for output in (case.base, case.base / "within", tmp_path):
        with pytest.raises(ExportError):
            fold_onnx(case.base, case.adapter, output)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(ExportError, match=r"is not empty and holds no gralora_export\.json"):
        fold_onnx(case.base, case.adapter, tmp_path / "notes")
    assert digests(case.base) == before
    case.fold()
    case.fold()  # over an earlier one of the same base
    manifest = json.loads((case.out / "gralora_export.json").read_text())
    manifest["task"] = "another"
    (case.out / "gralora_export.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="holds an export for the task another"):
        case.fold()
    case.fold(overwrite=True)


def test_damaged_exports(small: Case, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is an adapter, not an export; give the directory of an export"):
        fold_onnx(small.adapter, small.adapter, tmp_path / "out")
    case = copied(small, tmp_path)
    data = case.base / "model.onnx_data"
    content = data.read_bytes()
    data.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ExportError, match=r"model.onnx_data has another SHA-256 than the manifest says"):
        case.fold()
    data.write_bytes(content[:-5000])
    with pytest.raises(ExportError, match=r"model.onnx_data has [\d,]+ bytes instead of"):
        case.fold()
    (case.base / "gralora_export.json").unlink()
    with pytest.raises(ExportError, match=r"it is damaged, so copy or export it again"):
        case.fold()
    data.unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    for link in (os.link, os.symlink):
        link(tmp_path / "elsewhere", data)
        with pytest.raises(ExportError, match="is a link; copy the file itself"):
            case.fold()
        data.unlink()
    (case.base / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="is not an ONNX model"):
        case.fold()
    assert not case.out.exists()


def test_an_older_manifest_is_searched_by_name(small: Case, tmp_path: Path) -> None:
    case = copied(small, tmp_path)
    manifest = json.loads((case.base / "gralora_export.json").read_text())
    del manifest["weights"]
    (case.base / "gralora_export.json").write_text(json.dumps(manifest))
    report = case.fold()
    assert {site.how for site in report.sites} == {"by name"}
    assert read_manifest(case.out).weights is None
    small.fold(overwrite=True)
    assert_same_weights(case.out, small.out, 0)


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_digest_of_an_adapter_is_that_of_what_we_would_save(dtype: torch.dtype, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_model("llama"), config).to(dtype).save_pretrained(tmp_path)
    read, found = read_adapter(tmp_path)
    expected = tensors_digest({key: tensor.float() for key, tensor in found.items()}, read)
    assert adapter_digest(tmp_path / "adapter_model.safetensors", found, read) == expected


def test_folding_needs_neither_a_model_nor_an_exporter(small: Case, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom gralora_fx.exporters import fold_onnx\n"
        f"fold_onnx({str(small.base)!r}, {str(small.adapter)!r}, {str(tmp_path / 'out')!r})\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in ('onnxscript', 'transformers', 'peft') or "
        "n.startswith(('torch.onnx', 'gralora_fx.core.tracing.trace', 'gralora_fx.core.model'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
