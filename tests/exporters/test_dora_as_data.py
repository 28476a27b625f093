"""DoRA as data of an export: PEFT's on floats, the formula on rounded weights, plain adapters and the base beside."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from adapters_as_data import CACHED, KINDS, Exports, Kind, add, arrays, expected_of, fields_of, output_of
from genai_client import genai_tokens
from made_once import made_once
from prefix_interleavings import saved
from safetensors.numpy import load_file
from tiny_models import text_batch, tiny_model
from torch import nn
from traces import fresh_trace, relative_error

from gralora_fx import DoraConfig, GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_adapter, export_onnx, verify_onnx
from gralora_fx.exporters.adapter_export import report_of
from gralora_fx.exporters.verify.comparable import reference_model
from gralora_fx.format.adapter_inputs import BLOCKS, is_adapter_tensor
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.sessions.adapter_file import read_record, read_tensors
from gralora_fx.serving import OrtModel, load

DORA: dict[str, Any] = {"method": "DORA", "r": 4, "lora_alpha": 16}
LORA: dict[str, Any] = {"method": "LORA", "r": 4, "lora_alpha": 16}


def written(kind: Kind, folder: Path, **options: Any) -> tuple[peft.PeftModel, GraloraModel]:
    """PEFT's model with a DoRA adapter, and ours, exported to `onnx` with the adapter as `dora`."""
    wrapped = saved(kind.make(), folder / "dora", 1, target_modules=kind.targets, **DORA)
    model = GraloraModel.from_pretrained(kind.trace(kind.make()), folder / "dora", adapter_name="dora")
    logits = {"logits": "all"} if kind.task == CACHED else {}
    export_onnx(model, folder / "onnx", **{"verify": False, "adapters": "data", **logits, **options})
    return wrapped, model


def exported(kind: Kind, folder: Path, **options: Any) -> tuple[OrtModel, peft.PeftModel]:
    """Return the export of a model with PEFT's DoRA adapter `dora`, and PEFT's model."""
    wrapped, _ = written(kind, folder, **options)
    return load(folder / "onnx"), wrapped


# -- floats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param("perceptron", "data", marks=pytest.mark.quick),
        ("t5", "data"),
        ("llama", "data"),
        ("swin", "data"),
        ("gpt2", "data"),
        ("bert", "inputs"),
    ],
)
def test_it_is_pefts_beside_plain_adapters_and_the_base(exports: Exports, name: str, mode: Any, tmp_path: Path) -> None:
    """Layers with and without biases, of packed products, with weights `[in, out]`, and in an encoder and a decoder."""
    kind = KINDS[name]
    served, wrapped = exported(kind, tmp_path, adapters=mode)
    expected = expected_of(wrapped, kind)
    with wrapped.disable_adapter():
        assert relative_error(expected_of(wrapped, kind), expected) > 1e-3
    assert relative_error(output_of(served, kind, "dora"), expected) < 1e-5
    assert served.adapters["dora"].record.norms_of == "float32"

    lora = add(served, kind, tmp_path / "lora", "lora", **fields_of("lora-4", kind, 1))
    assert relative_error(output_of(served, kind, "lora"), expected_of(lora, kind)) < 1e-5
    inputs, base = arrays(kind.batch()), exports.base(name)
    inputs = inputs if kind.inputs else dict(zip(base.input_names, inputs.values(), strict=True))
    ours, theirs = served(**inputs), base(**inputs)
    assert all(np.array_equal(ours[output], theirs[output]) for output in base.output_names)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_export_without_it_has_nothing_of_it(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    both, _ = exported(kind, tmp_path)
    saved(kind.make(), tmp_path / "lora", 2, target_modules=kind.targets, **LORA)
    model = GraloraModel.from_pretrained(kind.trace(kind.make()), tmp_path / "lora", adapter_name="lora")
    logits = {"logits": "all"} if kind.task == CACHED else {}
    export_onnx(model, tmp_path / "plain", adapters="data", verify=False, **logits)
    assert "scale" not in (tmp_path / "plain" / "gralora_export.json").read_text().replace("logits_scale", "")
    session = onnxruntime.InferenceSession(tmp_path / "plain" / "model.onnx", _quiet())
    names = [value.name for value in session.get_overridable_initializers()]
    assert names
    assert not any(tensor.endswith("gralora_scale") for tensor in names)

    export_adapter(tmp_path / "lora", both.directory, "lora")
    plain = load(tmp_path / "plain")
    for adapter in ("lora", None):
        one, other = (output_of(served, kind, adapter) for served in (both, plain))
        assert torch.equal(one, other)


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def test_plain_onnxruntime_takes_the_file(tmp_path: Path) -> None:
    kind = KINDS["vit"]
    served, wrapped = exported(kind, tmp_path)
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(served.directory / "adapters" / "dora.onnx_adapter"))
    options.add_active_adapter(adapter)
    session = onnxruntime.InferenceSession(served.directory / "model.onnx", _quiet())
    (logits,) = session.run(["logits"], arrays(kind.batch()), options)
    assert relative_error(torch.from_numpy(logits), wrapped(**kind.batch()).logits.detach()) < 1e-5


def test_onnxruntime_genai_takes_the_file(folder: Path) -> None:
    """With a DoRA adapter, a plain one and none: the tokens of `generate`."""
    saved(tiny_model("llama", num_hidden_layers=1), folder / "plain", 3, target_modules=["o_proj"], **LORA)
    export_adapter(folder / "plain", folder / "onnx", "plain")
    served, found = load(folder / "onnx"), {}
    for adapter in ("default", "plain", None):
        found[adapter] = served.generate([5, 9, 12, 40, 3], max_new_tokens=12, adapter=adapter)
        assert genai_tokens(folder / "onnx", [5, 9, 12, 40, 3], 12, adapter) == found[adapter], adapter
    assert len({*map(tuple, found.values())}) == 3


def test_each_row_of_a_batch_has_its_own(exports: Exports, tmp_path: Path) -> None:
    kind = KINDS["bert"]
    served, _ = exported(kind, tmp_path)
    saved(kind.make(), tmp_path / "other", 5, target_modules=["value", "dense"], **{**DORA, "r": 2})
    export_adapter(tmp_path / "other", served.directory, "other")
    add(served, kind, tmp_path / "lora", "lora", **fields_of("lora-4", kind, 1))
    names = ["dora", None, "lora", "other", None, "dora"]
    inputs = arrays(text_batch(len(names), 9))
    together = served(**inputs, adapter=names).logits
    for row, name in enumerate(names):
        alone = served(**{key: value[row : row + 1] for key, value in inputs.items()}, adapter=name).logits
        assert np.allclose(together[row], alone[0], atol=1e-5), name
    base = exports.base("bert")(**inputs).logits
    assert all(np.array_equal(together[row], base[row]) for row, name in enumerate(names) if name is None)


def test_a_sum_is_that_of_the_changes_of_the_weights(tmp_path: Path) -> None:
    """Each adapter's change of a weight is added, whatever its method; `DoRA` beside LoRA is not a new DoRA."""
    kind = KINDS["bert"]
    served, wrapped = exported(kind, tmp_path)
    other = add(served, kind, tmp_path / "lora", "lora", **fields_of("lora-at-some", kind, 1))
    served.mix_adapters("sum", {"dora": 0.75, "lora": -0.5})
    model = kind.make()
    before = copy.deepcopy(model.state_dict())
    for weight, adapted in ((0.75, wrapped), (-0.5, other)):
        after = copy.deepcopy(adapted).merge_and_unload().state_dict()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value += (weight * (after[name] - before[name])).to(value.dtype)
    assert relative_error(output_of(served, kind, "sum"), expected_of(model, kind)) < 1e-5
    assert served.adapters["sum"].record.r == 0


# -- rounded weights ---------------------------------------------------------------------------------------------------

ROUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    "float16": ("llama", {"precision": "fp16"}),
    "bfloat16": ("bert", {"precision": "bf16"}),
    "int4, int8": ("llama", {"quantize": "int4", "block_size": 16}),
    "int8": ("gpt2", {"quantize": "int8", "block_size": 16}),
    "int8 ": ("bert", {"quantize": "int8-dynamic"}),
}


@pytest.mark.parametrize("stored", ROUNDED)
def test_over_rounded_weights_it_is_the_formula_on_these(exports: Exports, stored: str, tmp_path: Path) -> None:
    name, options = ROUNDED[stored]
    kind = KINDS[name]
    _, model = written(kind, tmp_path, **options)
    directory = tmp_path / "onnx"
    assert verify_onnx(directory, model, adapter_name="dora").passed
    path, manifest = directory / "adapters" / "dora.onnx_adapter", read_manifest(directory)
    record = read_record(path)
    assert set(str(record.norms_of).split(", ")) <= set(stored.strip().split(", "))
    assert "not from the base's own" in str(report_of(path, directory).summary)
    assert manifest.adapter_inputs is not None
    tensors = read_tensors(path, record, manifest.adapter_inputs, manifest.base_fingerprint, ExportError)
    trained = load_file(tmp_path / "dora" / "adapter_model.safetensors")
    rounded = reference_model(model.traced, manifest, directory)
    least = {"float16": 2e-3, "bfloat16": 2e-2}.get(stored, 1e-5)
    for site in rounded.sites:
        if (keys := [key for key in trained if f".{site.path}.lora_" in key]) == []:
            continue
        A, B, magnitude = (
            next(trained[key] for key in keys if part in key) for part in ("lora_A", "lora_B", "magnitude")
        )
        weight = site.weight.detach().numpy().astype(np.float64)
        own = weight.T if site.kind == "conv1d" else weight
        ratio = magnitude / np.linalg.norm(own + DORA["lora_alpha"] / DORA["r"] * B.astype(np.float64) @ A, axis=1)
        scale = tensors[f"{site.path}.gralora_scale"].astype(np.float64)
        assert np.abs(scale - (ratio - 1)).max() < least * max(1, np.abs(ratio - 1).max()), site.path
    if stored != "bfloat16":  # which the CPU does not run
        ours, theirs = (one(**arrays(kind.batch())) for one in (load(directory), exports.base(name, **options)))
        assert all(np.array_equal(ours[output], theirs[output]) for output in ours)


def test_the_file_is_the_same_from_a_model_and_from_a_directory(tmp_path: Path) -> None:
    served, _ = exported(KINDS["llama"], tmp_path, quantize="int8", block_size=16)
    export_adapter(tmp_path / "dora", served.directory, "again")
    one, other = (served.adapters[name].record for name in ("dora", "again"))
    assert (one.sha256, one.norms_of) == (other.sha256, other.norms_of) == (one.sha256, "int8")


# -- what is said and refused ------------------------------------------------------------------------------------------


def make_export(folder: Path) -> None:
    """Write an export of a tiny Llama that takes DoRA at some layers."""
    model = tiny_model("llama", num_hidden_layers=1)
    saved(model, folder / "dora", 1, target_modules=["q_proj", "v_proj"], **DORA)
    traced = fresh_trace("llama", task=CACHED, num_hidden_layers=1)
    adapted = GraloraModel.from_pretrained(traced, folder / "dora")
    adapted.add_adapter("lora", LoraConfig(target_modules=["o_proj"]))
    report = export_onnx(adapted, folder / "onnx", adapters="data")
    assert (
        "takes adapters at 3 layers (data): LoRA, or GraLoRA of any gralora_k as the LoRA that it equals; DoRA at 2 of"
        in (report.details)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(made_once("dora-as-data", make_export), tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_the_manifest_names_the_layers(folder: Path) -> None:
    inputs = read_manifest(folder / "onnx").adapter_inputs
    assert inputs is not None
    assert {site.path.rpartition(".")[2]: site.has_scale for site in inputs.sites} == {
        "q_proj": True,
        "v_proj": True,
        "o_proj": False,
    }
    sites = json.loads((folder / "onnx" / "gralora_export.json").read_text())["adapter_inputs"]["sites"]
    assert ["has_scale" in site for site in sites] == [site.has_scale for site in inputs.sites]
    record = read_record(folder / "onnx" / "adapters" / "default.onnx_adapter")
    assert {name.rpartition(".")[2] for name in record.shapes} == {
        "gralora_A_general",
        "gralora_B_general",
        "gralora_scale",
    }
    assert all(map(is_adapter_tensor, record.shapes))


def test_where_it_cannot_be_it_is_refused_by_name(folder: Path) -> None:
    saved(tiny_model("llama", num_hidden_layers=1), folder / "more", 2, target_modules=["q_proj", "o_proj"], **DORA)
    with pytest.raises(
        ExportError, match=r"1 layer: the export takes no adapter .* scales .*: .*o_proj; export .* dora=True"
    ):
        export_adapter(folder / "more", folder / "onnx", "more")
    plain = rewrite(fresh_trace("llama", task=CACHED, num_hidden_layers=1), LoraConfig(target_modules=["q_proj"]))
    export_onnx(plain, folder / "plain", adapters="data", verify=False)
    with pytest.raises(ExportError, match=r"is a DoRA adapter, which scales .* was exported with adapters that do not"):
        export_adapter(folder / "dora", folder / "plain", "dora")
    assert not (folder / "plain" / "adapters" / "dora.onnx_adapter").exists()


@pytest.mark.parametrize(
    ("name", "fields", "options"),
    [
        ("gpt2", LORA, {"quantize": "int8", "block_size": 16}),
        ("bert", {"method": "GRALORA", "r": 4, "gralora_k": 2, "alpha": 8, "modules_to_save": ["classifier"]}, {}),
    ],
)
def test_an_export_can_have_room_for_it_beforehand(
    exports: Exports, name: str, fields: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """An export made with a plain adapter and `dora=True` takes a DoRA adapter as one made with that adapter does."""
    kind = KINDS[name]
    targets = kind.targets if options else ["query", "value"]
    saved(kind.make(), tmp_path / "plain", 2, target_modules=targets, **fields)
    model = GraloraModel.from_pretrained(kind.trace(kind.make()), tmp_path / "plain", adapter_name="plain")
    logits = {"logits": "all"} if kind.task == CACHED else {}
    report = export_onnx(model, tmp_path / "room", adapters="data", dora=True, **logits, **options)
    wrapped = saved(kind.make(), tmp_path / "dora", 1, target_modules=targets, **DORA)
    taking = read_manifest(tmp_path / "room").adapter_inputs
    assert taking is not None
    assert f"DoRA at {len(taking.scaled)} of them" in report.details
    assert {site.path for site in taking.scaled} == {site.path for site in taking.sites if site.form == BLOCKS}
    export_adapter(tmp_path / "dora", tmp_path / "room", "dora")
    served = load(tmp_path / "room")
    if options:
        beside, _ = exported(kind, tmp_path / "beside", **options)
        assert torch.equal(output_of(served, kind, "dora"), output_of(beside, kind, "dora"))
    else:
        assert relative_error(output_of(served, kind, "dora"), expected_of(wrapped, kind)) < 1e-5
        assert torch.equal(output_of(served, kind, None), output_of(exports.base(name), kind, None))


def test_room_for_it_is_refused_where_no_adapter_comes_later() -> None:
    """Merged, or without an adapter that says which layers."""
    traced = trace(nn.Sequential(nn.Linear(8, 4)), (torch.randn(2, 8),))
    with pytest.raises(ExportError, match=r"dora=True has no effect with adapters='merged', which takes .*'data' too"):
        export_onnx(traced, "unused", dora=True)
    with pytest.raises(ExportError, match="adapters='data' needs a model with an adapter"):
        export_onnx(traced, "unused", adapters="data", dora=True)


def test_a_row_of_zeros_has_no_norm_and_is_named(tmp_path: Path) -> None:
    """PEFT's output is not a number there."""
    network = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        network[0].weight[2] = 0
    of_zeros = peft.get_peft_model(copy.deepcopy(network), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    of_zeros.save_pretrained(str(tmp_path / "zeros"))
    config = DoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    export_onnx(rewrite(trace(network, (torch.randn(2, 8),)), config), tmp_path / "onnx", adapters="data", verify=False)
    with pytest.raises(ExportError, match="1 layer: the new weight has a row of zeros, which has no norm: 0"):
        export_adapter(tmp_path / "zeros", tmp_path / "onnx", "zeros")
