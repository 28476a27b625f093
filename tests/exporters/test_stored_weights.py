"""Faults in the files of an export that outputs hardly show: values, scales, settings, adapters under other names.

The table of docs/verification.md is what these tests measure.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from damaged_exports import forget_digests
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor, nn
from traces import fresh_trace

from gralora_fx import GraloraConfig, LoraConfig, TracedModel, merge, rewrite, trace
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.rules.products.initializers import ProductWeight, product_weights
from gralora_fx.format.manifest import read_manifest
from gralora_fx.serving import load

CACHED = "text-generation-with-past"
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "int8": {"quantize": "int8"},
    "int8-dynamic": {"quantize": "int8-dynamic"},
    "int4": {"quantize": "int4"},
}
# the size of a fault, from which on each form's check finds it in the tiny Llama here: the smallest of those tried
TRIED = {"one value": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2), "scales": (1.0001, 1.001, 1.005)}
FLOATS = {"fp32": (1e-5, 1.0001), "fp16": (1e-3, 1.001), "bf16": (1e-3, 1.005)}
QUANTIZED = {"int8": 1.0001, "int8-dynamic": 1.001, "int4": 1.005}


@pytest.fixture(scope="module")
def model() -> TracedModel:
    return fresh_trace("llama", task=CACHED, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_hidden_layers=2)


@pytest.fixture(scope="module")
def exports(model: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("exports")

    def of(form: str) -> Path:
        if not (root / form).exists():
            export_onnx(model, root / form, tokenizer=tiny_tokenizer(), verify=False, **FORMS[form])
        return root / form

    return of


def damaged(export: Path, copy: Path, damage: Callable[[list[ProductWeight]], None]) -> Path:
    """Return a copy of an export with other values in model.onnx, whose digests nobody knows."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(export, copy)
    graph = ir.load(copy / "model.onnx")
    damage(product_weights(graph.graph))
    ir.save(graph, copy / "model.onnx", external_data="other_data")
    forget_digests(copy)
    return copy


def layer(weights: list[ProductWeight], index: int = 0) -> ProductWeight:
    return next(weight for weight in weights if f"layers.{index}.mlp.down_proj" in weight.name)


def change(value: ir.Value, edit: Callable[[np.ndarray], Any]) -> None:
    assert value.const_value is not None
    old = value.const_value.numpy()
    new = np.asarray(edit(old.copy())).astype(old.dtype)
    value.const_value = ir.tensor(new, name=value.name, dtype=value.dtype)


def raised(size: float) -> Callable[[list[ProductWeight]], None]:
    """Add a share of the largest value to one value."""

    def edit(values: np.ndarray) -> np.ndarray:
        values[3, 5] += values.dtype.type(size * float(np.abs(values.astype(np.float32)).max()))
        return values

    return lambda weights: change(layer(weights).value, edit)


def scaled(size: float) -> Callable[[list[ProductWeight]], None]:
    def damage(weights: list[ProductWeight]) -> None:
        weight = layer(weights)
        change(weight.scales or weight.value, lambda values: values.astype(np.float32) * size)

    return damage


def exchanged(weights: list[ProductWeight]) -> None:
    first, second = layer(weights, 0), layer(weights, 1)
    for one, other in zip(first.parts, second.parts, strict=True):
        one.const_value, other.const_value = other.const_value, one.const_value


def one_integer(weights: list[ProductWeight]) -> None:
    def edit(integers: np.ndarray) -> np.ndarray:
        flat = integers.reshape(-1).astype(np.int32)
        step = 2 if layer(weights).bits == 8 else 1  # rounding up or down may leave one free
        flat[7] += step if flat[7] < 100 else -step
        return flat.reshape(integers.shape)

    change(layer(weights).value, edit)


def is_found(path: Path, model: TracedModel) -> bool:
    report = verify_onnx(path, model, "quick")
    assert report.passed != bool(report.differences) or not report.differences
    return bool(report.differences)


def smallest(kind: str, form: str, damage: Any, exports: Any, model: TracedModel, folder: Path) -> float:
    """Return the smallest tried size of a fault that is found; a larger one is found too."""
    found = [is_found(damaged(exports(form), folder / "onnx", damage(size)), model) for size in TRIED[kind]]
    assert found == sorted(found)
    return TRIED[kind][found.index(True)]


@pytest.mark.parametrize("form", FORMS)
def test_an_export_as_it_was_written_has_no_differences(exports: Any, model: TracedModel, form: str) -> None:
    report = verify_onnx(exports(form), model, "quick")
    assert (report.passed, report.differences) == (True, ())


@pytest.mark.parametrize("form", FLOATS)
def test_one_weight_and_a_factor_are_found_in_floats(
    exports: Any, model: TracedModel, tmp_path: Path, form: str
) -> None:
    one = smallest("one value", form, raised, exports, model, tmp_path)
    assert (one, smallest("scales", form, scaled, exports, model, tmp_path)) == FLOATS[form]


@pytest.mark.parametrize("form", QUANTIZED)
def test_one_integer_and_scales_are_found_in_quantized_weights(
    exports: Any, model: TracedModel, tmp_path: Path, form: str
) -> None:
    assert is_found(damaged(exports(form), tmp_path / "onnx", one_integer), model)
    assert smallest("scales", form, scaled, exports, model, tmp_path) == QUANTIZED[form]


@pytest.mark.parametrize("form", FORMS)
def test_two_layers_exchanged_are_named(exports: Any, model: TracedModel, tmp_path: Path, form: str) -> None:
    report = verify_onnx(damaged(exports(form), tmp_path / "onnx", exchanged), model, "quick")
    assert sorted(text.partition(".mlp")[0] for text in report.differences) == ["model.layers.0", "model.layers.1"]
    assert report.outcome.startswith("FAILED: 2 of the stored weights and settings differ, first: model.layers.")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "eos_token_id", 7),
        ("config.json", "num_attention_heads", 2),
        ("config.json", "id2label", {"0": "spam", "1": "ham"}),
        ("generation_config.json", "eos_token_id", 7),
        ("genai_config.json", "vocab_size", 7),
    ],
)
def test_another_setting_is_named(
    exports: Any, model: TracedModel, tmp_path: Path, file: str, key: str, value: Any
) -> None:
    shutil.copytree(exports("fp32"), tmp_path / "onnx")
    fields = json.loads((tmp_path / "onnx" / file).read_text())
    fields.get("model", fields)[key] = value
    (tmp_path / "onnx" / file).write_text(json.dumps(fields))
    forget_digests(tmp_path / "onnx")
    (found,) = verify_onnx(tmp_path / "onnx", model, "quick").differences
    assert found.startswith(f"{file}: ")
    assert f"{key} is {value!r}" in found


def test_a_token_map_is_found_by_its_digest(exports: Any, model: TracedModel, tmp_path: Path) -> None:
    shutil.copytree(exports("fp32"), tmp_path / "onnx")
    path = tmp_path / "onnx" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"z"', 1))
    with pytest.raises(ExportError, match=r"tokenizer\.json has "):
        verify_onnx(tmp_path / "onnx", model, "quick")


def test_an_adapters_files_under_anothers_name_are_refused(tmp_path: Path) -> None:
    config = GraloraConfig(r=4, target_modules=["q_proj"], init_weights=False)
    adapted = rewrite(fresh_trace("llama"), config, adapter_name="one")
    adapted.add_adapter("two", config)
    adapted.set_adapter("one")
    export_onnx(adapted, tmp_path / "onnx", adapters="data", verify=False)
    adapted.set_adapter("two")
    export_onnx(adapted, tmp_path / "other", adapters="data", verify=False)
    load(tmp_path / "onnx", check=True)
    for ending in (".onnx_adapter", ".json"):
        shutil.copyfile(tmp_path / f"other/adapters/two{ending}", tmp_path / f"onnx/adapters/one{ending}")
    with pytest.raises(ServingError, match=r"adapters/one\.onnx_adapter is the adapter 'two'"):
        load(tmp_path / "onnx", check=True)


class Small(nn.Module):
    """Probabilities, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factor = nn.Linear(64, 16), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).softmax(-1) * self.factor


def test_outputs_far_below_one_are_compared_by_their_own_size(tmp_path: Path) -> None:
    traced = trace(Small(1e-8), (torch.randn(2, 64),))
    with pytest.raises(ExportError, match=r"results differ"):  # float16 ends above them
        export_onnx(traced, tmp_path / "onnx", precision="fp16")
    report = export_onnx(traced, tmp_path / "onnx", quantize="int8")
    assert report.verification is not None
    assert report.verification.max_abs_error < 1e-13
    assert report.quality is not None
    assert report.quality.outputs[0].mean_cosine == pytest.approx(1, abs=1e-4)


class Chain(nn.Module):
    """Linear layers of some widths."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


@pytest.mark.parametrize(("widths", "bits"), [((30, 1, 300), None), ((4, 1024, 64), 4), ((2, 3001), None)])
def test_narrow_layers_in_four_bits_hold(widths: tuple[int, ...], bits: int | None, tmp_path: Path) -> None:
    traced = trace(Chain(*widths), (torch.randn(4, widths[0]),))
    report = export_onnx(traced, tmp_path / "onnx", quantize="int4", bits=bits).verification
    assert report is not None
    assert report.passed


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4"])
@pytest.mark.parametrize("how", ["level", "entry"])
def test_a_session_that_folds_no_constants_is_right(kind: Any, how: str, tmp_path: Path) -> None:
    module = Chain(64, 96, 32)
    x = torch.randn(5, 64)
    export_onnx(trace(module, (x,)), tmp_path / "onnx", quantize=kind, accuracy_level=None if "-" in kind else 4)
    options = onnxruntime.SessionOptions()
    if how == "level":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    usual, other = (load(tmp_path / "onnx", session_options=each)(x=x.numpy())[0] for each in (None, options))
    assert np.abs(usual - other).max() <= 0.02 * np.abs(usual).max()  # rows are rounded in some, where they are not
    quantization = read_manifest(tmp_path / "onnx").quantization
    assert quantization is not None
    assert quantization.needs_folding == (kind == "int4")
    assert ("sessions that fold constants" in str(quantization)) == (kind == "int4")


class _ReadOutside(nn.Module):
    """A layer whose weight is also read outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.one_hot(ids, 32).float()
        return self.l(x) + x @ self.l.weight


class _Embedding(nn.Module):
    """An embedding beside or tied with a head."""

    def __init__(self, *, tied: bool, **options: Any) -> None:
        super().__init__()
        self.e, self.l, self.h = nn.Embedding(32, 32, **options), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        if tied:
            self.h.weight = self.e.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.h(self.l(self.e(ids)))


SHARED: dict[str, Callable[[], nn.Module]] = {
    "read outside its layer": _ReadOutside,
    "tied with an embedding": lambda: _Embedding(tied=True),
    "changed by calls": lambda: _Embedding(tied=False, max_norm=1.0),
}
OF_ALL: tuple[dict[str, str], ...] = ({}, {"quantize": "int8"})
OF_TIED = ("tied with an embedding", {"adapters": "data", "quantize": "int4"})


@pytest.mark.parametrize(("kind", "options"), [*itertools.product(SHARED, OF_ALL), OF_TIED], ids=str)
def test_a_weight_with_several_readers_is_the_models(kind: str, options: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    gralora = rewrite(
        trace(SHARED[kind]().eval(), (torch.randint(0, 32, (2, 5)),)), LoraConfig(r=4, target_modules="all-linear")
    )
    for parameter in gralora.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    merged = gralora if options.get("adapters") == "data" else merge(gralora, untie=True)
    report = export_onnx(merged, tmp_path / "export", **options)
    assert report.verification is not None
    assert report.verification.passed
