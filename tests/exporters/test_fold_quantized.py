"""An adapter folded into quantized weights: refused, or quantized again, with the share of the update that is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from damaged_exports import forget_marks
from fold_cases import CACHED, PROJECTIONS, Case, gralora, tensors
from safetensors.torch import load_file
from tiny_models import tiny_model
from traces import fresh_trace

from gralora_fx import trace
from gralora_fx.errors import ExportError, MergeError
from gralora_fx.exporters import export_onnx, fold_onnx
from gralora_fx.exporters.fold.requantize import stored_values
from gralora_fx.exporters.formats import BLOCK_BITS, Blocks
from gralora_fx.exporters.kinds.conversion import Conversion
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.quantize.plan import QuantizationPlan
from gralora_fx.exporters.rules.products.initializers import product_weights
from gralora_fx.exporters.rules.products.quantized_products import MARK
from gralora_fx.serving import load


@pytest.mark.parametrize("quantize", ["int4", "int8", "int8-dynamic"])
def test_quantized_weights_are_refused_unless_asked_for(quantize: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, fresh_trace("llama", task=CACHED), gralora(["q_proj", "down_proj"]), quantize=quantize)
    message = r"_proj and 3 other layers are quantized.* fold before quantizing .*requantize=True, best"
    with pytest.raises(MergeError, match=message):
        case.fold()
    assert not case.out.exists()


def test_columns_without_marks_are_exported_again_to_be_folded_into(tmp_path: Path) -> None:
    case = Case(tmp_path, fresh_trace("llama", task=CACHED), gralora(["q_proj"]), quantize="int8-dynamic")
    forget_marks(case.base, MARK)
    message = r"q_proj.*cannot be folded into: it is not marked .* again with quantize='int8-dynamic'"
    with pytest.raises(MergeError, match=message):
        case.fold(requantize=True)
    assert not case.out.exists()
    weights = [w for w in product_weights(ir.load(case.base / "model.onnx").graph) if w.storage == "columns"]
    assert weights
    with pytest.raises(ExportError, match="cannot be read: it is not marked"):  # its factors are not known
        stored_values(weights[0])


@pytest.fixture(autouse=True)
def one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let int4 have blocks of one width, rounded to the nearest, which a fold rounds as an export does."""

    def chosen(conversion: Conversion, _: Any) -> QuantizationPlan | None:
        form = None if conversion.plan is None else conversion.plan.default
        is_searched = isinstance(form, Blocks) and form.rounding == "searched"
        return QuantizationPlan(dataclasses.replace(form, rounding="nearest")) if is_searched else conversion.plan  # type: ignore[type-var]

    monkeypatch.setattr("gralora_fx.exporters.quantize.choice.choose_formats", chosen)


def without_zero_points(monkeypatch: pytest.MonkeyPatch, kind: str, block_size: int = 32) -> None:
    """Let exports have blocks as an earlier version wrote them."""
    monkeypatch.setattr(ExportOptions, "format", Blocks(BLOCK_BITS[kind], block_size, zero_points=False))


@pytest.mark.parametrize(
    ("quantize", "precision"),
    [("int4", "fp32"), ("int8", "fp32"), ("int8-dynamic", "fp32"), ("int4", "fp16"), ("int8", "fp16")],
)
def test_requantized_from_the_base_it_is_a_fresh_quantized_export(
    quantize: Any, precision: Any, tmp_path: Path
) -> None:
    check_requantized_from_the_base(quantize, precision, tmp_path)


@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_blocks_without_zero_points_stay_without(
    quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_zero_points(monkeypatch, quantize)
    case = check_requantized_from_the_base(quantize, "fp32", tmp_path)
    assert not [name for name in tensors(case.out) if name.endswith("_zero_points")]


def check_requantized_from_the_base(quantize: Any, precision: Any, tmp_path: Path) -> Case:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    traced = trace(model, task=CACHED)
    case = Case(tmp_path, traced, gralora(PROJECTIONS), quantize=quantize, precision=precision)
    report = case.fold(requantize=True, base=tmp_path / "model")
    ours, theirs = tensors(case.out), tensors(case.export_fresh())
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():  # a value between two steps may go either way
        assert np.allclose(ours[name], values, rtol=1e-3) or np.mean(ours[name] != values) <= 0.01, name
    assert report.survival is not None
    assert 0.9 < report.survival < 1.1
    assert all(site.survival is not None and 0.5 < site.survival < 1.5 for site in report.sites)
    load(case.out, check=True)
    return case


def test_a_base_whose_files_have_other_names_than_the_model(tmp_path: Path) -> None:
    """Transformers renames a ViT's tensors when it loads and saves them."""
    tiny_model("vit").save_pretrained(tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors")
    path = "vit.layers.0.attention.q_proj"
    assert f"{path}.weight" not in names, "transformers no longer renames them, so this test has lost its subject"
    case = Case(tmp_path, fresh_trace("vit"), gralora(["q_proj"]), quantize="int8")
    report = case.fold(requantize=True, base=tmp_path / "model")
    assert path in {site.path for site in report.sites}


@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_the_runtime_computes_with_the_zero_points_of_the_result(quantize: Any, tmp_path: Path) -> None:
    """A layer whose values are all of one sign, so that zero points count most; its third block is partial."""
    torch.manual_seed(0)
    module = torch.nn.Linear(72, 24, bias=False).eval()
    with torch.no_grad():
        module.weight.copy_(module.weight.abs() + 1)
    traced = trace(torch.nn.Sequential(module), (torch.randn(2, 72),))
    case = Case(tmp_path, traced, gralora(["0"], alpha=200), quantize=quantize, accuracy_level=1)
    case.fold(requantize=True, force=True)
    expected = case.model(torch.eye(72))
    folded, before = (torch.as_tensor(load(path)(input=torch.eye(72))[0]) for path in (case.out, case.base))
    step = (expected.abs().max() / (15 if quantize == "int4" else 255)).item()
    assert (folded - expected).abs().max().item() <= 1.1 * step  # rounded in the export, and once more
    assert (before - expected).abs().max().item() > 2 * step


def share_zero_points(first: ir.Node, second: ir.Node) -> None:
    second.replace_input_with(3, first.inputs[3])


def float_zero_points(first: ir.Node, second: ir.Node) -> None:
    scales, zero_points = first.inputs[2:4]
    assert scales is not None
    assert zero_points is not None
    zero_points.const_value, zero_points.dtype = ir.tensor(np.zeros(32, np.float32)), ir.DataType.FLOAT


def add_a_group_index(first: ir.Node, second: ir.Node) -> None:
    tensor = ir.tensor(np.zeros(32, np.int32), name="groups")
    groups = ir.Value(name="groups", const_value=tensor, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([32]))
    assert first.graph is not None
    first.graph.register_initializer(groups)  # type: ignore[union-attr]
    first.resize_inputs(5)
    first.replace_input_with(4, groups)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (share_zero_points, "its zero points are not its own alone"),
        (float_zero_points, "its zero points are not packed integers"),
        (add_a_group_index, "its blocks have a group index"),
    ],
)
def test_blocks_that_cannot_be_quantized_again_are_refused(
    change: Callable[[ir.Node, ir.Node], None], problem: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, fresh_trace("llama", task=CACHED), gralora(["o_proj"]), quantize="int4")
    (case.base / "gralora_export.json").unlink()  # whose digest of the graph is another then
    model = ir.load(case.base / "model.onnx")
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    first, second = (node for node in products if "o_proj" in str(node.inputs[1].name))  # type: ignore[union-attr]
    change(first, second)
    ir.save(model, case.base / "model.onnx")
    with pytest.raises(MergeError, match=f"o_proj.weight_Q4 cannot be folded into: {problem}"):
        case.fold(requantize=True)
    assert not case.out.exists()


@pytest.mark.parametrize("quantize", ["int4", "int8-dynamic"])
def test_an_update_that_rounding_takes_away_is_refused_unless_forced(quantize: Any, tmp_path: Path) -> None:
    """Dequantized weights are on the grid, to which they return after a small update."""
    traced = fresh_trace("llama", task=CACHED)
    case = Case(tmp_path, traced, gralora(["q_proj", "down_proj"], alpha=0.004), quantize=quantize)
    with pytest.raises(
        MergeError, match=r"rounding leaves -?\d+ % of the update, and half or less of it at 4 of 4 layers"
    ):
        case.fold(requantize=True)
    assert not case.out.exists()
    report = case.fold(requantize=True, force=True)
    assert report.survival is not None
    assert report.survival < 0.5
    assert "% of the update" in report.details


@pytest.mark.parametrize("zero_points", [True, False])
def test_layers_without_an_update_keep_their_blocks_bit_for_bit(
    zero_points: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not zero_points:
        without_zero_points(monkeypatch, "int4", 16)
    traced = fresh_trace("llama", task=CACHED)
    case = Case(tmp_path, traced, gralora(["k_proj"], gralora_k=2, alpha=200), quantize="int4", block_size=16)
    case.fold(requantize=True, force=True)
    before, after = tensors(case.base), tensors(case.out)
    name = "model.onnx:model.layers.0.self_attn.q_proj+k_proj+v_proj.weight"
    for ending in ("_Q4", "_scales", *(["_zero_points"] if zero_points else [])):
        changed = (before[name + ending] != after[name + ending]).reshape(64, -1).any(axis=1)
        assert not changed[:32].any()
        assert changed[32:48].any()
        assert not changed[48:].any()


def test_the_share_that_survives_is_the_projection_on_the_update(tmp_path: Path) -> None:
    model = tiny_model("llama")
    case = Case(tmp_path, trace(model, task=CACHED), gralora(["o_proj"], alpha=40), quantize="int8")
    report = case.fold(requantize=True, force=True)
    site = report.sites[0]
    float_case = tmp_path / "float"
    export_onnx(trace(model, task=CACHED), float_case, verify=False)
    fold_onnx(float_case, case.adapter, tmp_path / "float_folded")
    name = "model.onnx:model.layers.0.self_attn.o_proj.weight"
    update = tensors(tmp_path / "float_folded")[name] - tensors(float_case)[name]  # [in, out]

    def dequantized(directory: Path) -> np.ndarray:
        found = tensors(directory)
        values, scales, zero_points = (found[name + ending] for ending in ("_Q8", "_scales", "_zero_points"))
        zeros = zero_points.reshape(scales.shape)[..., None].astype(np.float32)
        return ((values - zeros) * scales[..., None]).reshape(32, 32).T

    change = dequantized(case.out) - dequantized(case.base)
    assert site.survival == pytest.approx(float((change * update).sum() / (update * update).sum()), rel=1e-3)
