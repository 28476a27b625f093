"""Exports in half precision: what stays float32 is what the model computes so, and the rest is rounded once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from damaged_exports import shift_weight
from genai_client import genai_tokens
from tiny_images import IMAGE_MODELS
from tiny_models import tiny_model
from tiny_speech import tiny_whisper
from torch import Tensor, fx, nn
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite, trace
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.translation.export_graphs import CastGraph
from gralora_fx.format.cache_slots import KINDS
from gralora_fx.serving import load

CACHED = "text-generation-with-past"
ALL_LINEAR = GraloraConfig(r=8, gralora_k=2, hybrid_r=2, alpha=8, target_modules="all-linear", init_weights=False)


def adapted(name: str, task: str | None = CACHED, **sizes: int) -> GraloraModel:
    return rewrite(fresh_trace(name, task=task, **sizes), ALL_LINEAR)


def dtypes(graph: fx.Graph) -> list[torch.dtype]:
    """Dtypes of what the operators of a graph give, without casts."""
    seen = []
    for node in graph.nodes:
        is_cast = str(node.target).startswith(("aten._to_copy", "aten.to.", "aten.type_as"))
        if node.op == "call_function" and not is_cast and isinstance(value := node.meta.get("val"), Tensor):
            if value.is_floating_point():
                seen.append(value.dtype)
    return seen


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_what_stays_float32_is_what_the_half_precision_model_computes_so(name: str) -> None:
    changed = CastGraph("fp16", (KINDS["key"],) * 4)(fresh_trace(name, task=CACHED).graph_module.graph).graph
    assert changed is not None
    half = fresh_trace(name, task=CACHED, dtype=torch.float16).graph_module.graph
    ours, models = dtypes(changed), dtypes(half)
    assert len(ours) == len(models)
    # cosines and sines are rounded where they meet the rest, the model rounds them a few views before
    differing = [index for index, (mine, theirs) in enumerate(zip(ours, models, strict=True)) if mine != theirs]
    assert all(ours[index] == torch.float32 for index in differing)
    assert len(differing) <= 8


@pytest.mark.parametrize(("name", "task"), [("llama", CACHED), ("gemma3", CACHED), ("bert", None), ("t5", None)])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_exports_hold(name: str, task: str | None, precision: Any, tmp_path: Path) -> None:
    sizes = {"num_layers": 1} if name == "t5" else {}
    report = export_onnx(adapted(name, task, **sizes), tmp_path / "onnx", precision=precision)
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.tolerance == 1e-2
    verification = json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())["verification"]
    assert (verification["weights"], verification["arithmetic"]) == (
        precision,
        "fp16" if precision == "fp16" else "fp32",
    )


def test_the_cache_has_the_precision_and_the_logits_are_float32(tmp_path: Path) -> None:
    export_onnx(adapted("llama"), tmp_path / "onnx", precision="fp16", verify=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    kinds = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
    assert {kind for name, kind in kinds.items() if name.startswith(("past", "present"))} == {"tensor(float16)"}
    assert kinds["logits"] == "tensor(float)"


def test_an_adapter_is_folded_in_float32_and_rounded_once(tmp_path: Path) -> None:
    model = adapted("llama")
    export_onnx(model, tmp_path / "onnx", precision="fp16", verify=False)
    stored = ir.load(tmp_path / "onnx" / "model.onnx").graph.initializers
    weights = {site.path: site.weight.detach().half().T.numpy() for site in merge(model).sites}
    del weights["lm_head"]
    pad_prompts = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}  # in one product
    for layer in ("model.layers.0", "model.layers.1"):
        for part, names in pad_prompts.items():
            columns = [weights.pop(f"{layer}.{part}.{name}") for name in names]
            weights[f"{layer}.{part}.{'+'.join(names)}"] = np.concatenate(columns, axis=1)
    for path, expected in weights.items():
        weight = stored[f"{path}.weight"].const_value
        assert weight is not None
        assert np.array_equal(weight.numpy(), expected)


def test_half_precision_weights_take_half_the_space(tmp_path: Path) -> None:
    sizes = {}
    for precision in ("fp32", "fp16", "bf16"):
        report = export_onnx(adapted("gpt2"), tmp_path / precision, precision=precision, verify=False)  # type: ignore[arg-type]
        sizes[precision] = report.files["model.onnx_data"]
    assert sizes["fp16"] == sizes["bf16"]
    assert sizes["fp16"] <= 0.51 * sizes["fp32"]


@pytest.mark.parametrize(("dtype", "precision"), [("float16", "fp16"), ("bfloat16", "fp32"), ("bfloat16", "fp16")])
def test_a_model_of_half_precision_exports_in_its_own_or_another(dtype: str, precision: Any, tmp_path: Path) -> None:
    model = rewrite(fresh_trace("llama", task=CACHED, dtype=getattr(torch, dtype)), ALL_LINEAR)
    report = export_onnx(model, tmp_path / "onnx", precision=precision)
    assert report.verification is not None
    assert report.verification.passed


@pytest.mark.parametrize(("dtype", "options"), [("float16", {}), ("bfloat16", {"quantize": "int8"})])
@pytest.mark.parametrize(
    ("make", "task"),
    [(IMAGE_MODELS["vit"], None), (tiny_whisper, "automatic-speech-recognition-with-past")],
    ids=["images", "speech"],
)
def test_a_model_of_half_precision_takes_inputs_of_its_own(
    make: Callable[[], Any], task: str | None, dtype: str, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    report = export_onnx(trace(make().to(getattr(torch, dtype)), task=task), tmp_path / "onnx", **options)
    assert report.verification is not None
    assert report.verification.passed
    assert report.quality is not None or not options or task is not None


def test_verification_sees_wrong_weights_of_half_precision(tmp_path: Path) -> None:
    export_onnx(adapted("llama"), tmp_path / "onnx", precision="bf16", verify=False)
    assert verify_onnx(tmp_path / "onnx", adapted("llama")).passed
    with pytest.raises(
        ServingError, match="CPUExecutionProvider cannot compute it: give providers that can, or export in"
    ):
        load(tmp_path / "onnx")
    shift_weight(tmp_path / "onnx", "weight")
    assert not verify_onnx(tmp_path / "onnx", adapted("llama")).passed


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.up(x)
        hidden = scores.masked_fill(scores > 10, torch.finfo(torch.float32).min)
        return torch.softmax(hidden, dim=-1)


def test_constants_stay_within_the_range_of_the_precision(tmp_path: Path) -> None:
    x = torch.full((2, 8), 100.0)  # every score of some rows is hidden: no result may be missing
    module = Masked()
    with torch.no_grad():
        module.up.weight.fill_(1.0)
    report = export_onnx(trace(module, (x,)), tmp_path / "onnx", precision="fp16")
    assert report.verification is not None
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(result, 1 / 8, atol=1e-3)


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"layers.0.mlp.up_proj.weight holds 1e\+06, which float16 cannot; take"):
        export_onnx(trace(model, task=CACHED), tmp_path / "onnx", precision="fp16")
    assert list(tmp_path.iterdir()) == []


class RoundedBiases(torch.nn.Module):
    """Biases in bfloat16 within a model of float32, as Falcon's ALiBi."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slopes = torch.tensor([0.3, 0.7], device=x.device).bfloat16()
        biases = slopes[:, None] * torch.arange(300, 308, device=x.device)
        return self.linear(x) + biases.to(x.dtype).sum(0)


def test_what_is_computed_in_bfloat16_is_computed_and_rounded_in_float32(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    module = RoundedBiases().eval()
    report = export_onnx(trace(module, (x,)), tmp_path / "onnx")
    assert report.verification is not None
    assert report.verification.passed
    exact = module.linear(x) + torch.arange(300, 308)
    assert not torch.allclose(load(tmp_path / "onnx")(x=x)[0], exact, atol=1e-2)


def test_weights_of_several_precisions_are_refused() -> None:
    with pytest.raises(ExportError, match="holds float32, float64 weights; cast it to one of"):
        CastGraph("fp16")(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())).graph)


class HalfInside(nn.Module):
    """A float32 model around layers in half precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 4)
        self.inside = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)).to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        return self.after(hidden + self.inside(hidden.to(self.dtype)).to(hidden.dtype))  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"quantize": "int8"}, {"adapters": "data"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_half_precision_are_cast_where_they_stand(
    dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    model = HalfInside(dtype).eval()
    adapted = rewrite(trace(model, (torch.randn(2, 5, 8),)), ALL_LINEAR.changed(r=4)).eval()
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    export_onnx(adapted, tmp_path / "onnx", **options)
    x = torch.randn(3, 7, 8)
    chosen = {"adapter": "default"} if "adapters" in options else {}
    actual, expected = torch.as_tensor(load(tmp_path / "onnx")(x=x, **chosen)[0]), adapted(x)
    assert float(((actual - expected).norm() / expected.norm()).detach()) < 2e-2


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"quantize": "int4"}, {"quantize": "int8"}])
def test_every_runtime_generates_from_it(options: dict[str, Any], tmp_path: Path) -> None:
    export_onnx(adapted("llama"), tmp_path / "onnx", verify=False, **options)
    model = load(tmp_path / "onnx")
    prompt, expected = [5, 17, 42], []
    cache = {
        name: np.zeros([1, 2, 0, 8], np.float16 if "precision" in options else np.float32)
        for name in model.input_names
        if name.startswith("past_key_values.")
    }
    for _ in range(4):  # the same graph without a cache, in plain ONNX Runtime
        ids = np.array([prompt + expected])
        positions = np.arange(ids.shape[1])[None]
        outputs = model(input_ids=ids, attention_mask=np.ones_like(ids), position_ids=positions, **cache)
        expected.append(int(outputs["logits"][0, -1].argmax()))
    assert model.generate(prompt, max_new_tokens=4) == expected
    assert genai_tokens(tmp_path / "onnx", prompt, 4) == expected
