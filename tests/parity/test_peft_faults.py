"""Faults of PEFT's GraLoRA that this package does not have; the day that peft is fixed, these tests say so.

Each test holds ours first and PEFT's fault last, so that a fixed peft skips no more than its own half.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import HIDDEN, base_model, base_trace, model_inputs
from cases import HYBRID, SMALL
from compare import load_in_peft, merged_parameters
from peft.tuners.gralora.layer import GraloraLayer
from peft_oracle import adapted_paths, peft_model, saved_by_peft
from safetensors.torch import save_file
from tiny_models import text_batch, tiny_model
from torch import Tensor, nn
from traces import fresh_trace, main_output, relative_error, run

from gralora_fx import GraloraConfig, GraloraModel, merge, plan, rewrite, trace
from gralora_fx.core.adapters.adapter_files import WEIGHTS_NAME
from gralora_fx.errors import ConfigError, MergeError, TargetError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def peft_still(is_faulty: bool, what: str) -> None:
    """Assert a fault of PEFT, or skip with the news that it is gone."""
    if not is_faulty:
        pytest.skip(f"peft {peft.__version__} no longer {what}: ours holds, and this fault can leave the list")


def fails(call: Callable[[], object], *errors: type[Exception]) -> bool:
    """Return whether a call raises one of the errors."""
    try:
        call()
    except errors:
        return True
    return False


class Layers(nn.Module):
    """Two linear layers for inputs of any number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.second = nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


BOTH = {"target_modules": ["first", "second"], **HYBRID}


def both_sides(x: Tensor, tmp_path: Path, model: nn.Module | None = None) -> tuple[GraloraModel, peft.PeftModel]:
    """One adapter of two linear layers in our model, traced with inputs like `x`, and in PEFT's."""
    model = model or Layers()
    theirs = peft_model(copy.deepcopy(model), **BOTH)
    theirs.save_pretrained(str(tmp_path))
    return GraloraModel.from_pretrained(trace(model, (x,)), tmp_path), theirs


def by_merged_weights(theirs: peft.PeftModel, x: Tensor) -> Tensor:
    """Compute by PEFT's deltas, whatever its forward makes of them."""
    with torch.no_grad():
        return torch.func.functional_call(Layers().to(x.dtype), merged_parameters(theirs), (x,))


# -- forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(HIDDEN,), (2, 3, 5, HIDDEN), (2, 1, 3, 4, HIDDEN)], ids=["1d", "4d", "5d"])
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    ours, theirs = both_sides(x, tmp_path)
    assert relative_error(run(ours, {"x": x}), by_merged_weights(theirs, x)) < 1e-5
    peft_still(fails(lambda: theirs(x), ValueError, RuntimeError), f"fails on inputs of {len(shape)} dimensions")


@pytest.mark.parametrize("shape", [(0, HIDDEN), (0, 5, HIDDEN)], ids=["2d", "3d"])
def test_inputs_without_a_row(shape: tuple[int, ...], tmp_path: Path) -> None:
    ours, theirs = both_sides(torch.randn(3, *shape[1:]), tmp_path)
    empty = torch.zeros(shape)
    assert run(ours, {"x": empty}).shape == (*shape[:-1], 8)
    peft_still(fails(lambda: theirs(empty), ValueError, RuntimeError), "fails on inputs without a row")


def test_autocast_gives_the_data_type_of_the_base_layer(tmp_path: Path) -> None:
    x = torch.randn(3, 5, HIDDEN)
    ours, theirs = both_sides(x, tmp_path)
    lora = peft.get_peft_model(Layers(), peft.LoraConfig(r=4, target_modules=["first", "second"]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        right, actual, wrong = lora(x), ours(x), theirs(x)
    assert right.dtype == torch.bfloat16
    assert actual.dtype == right.dtype
    assert relative_error(actual.float(), by_merged_weights(theirs, x)) < 3e-2
    peft_still(wrong.dtype != right.dtype, "gives float32 under autocast, where its LoRA gives bfloat16")


def test_training_leaves_the_output_of_the_base_layer_alone(tmp_path: Path) -> None:
    """PEFT adds into the tensor that hooks of the base layer were given; here only a run without gradients does."""
    x = torch.randn(3, HIDDEN)
    ours, theirs = both_sides(x, tmp_path)
    expected = Layers().first(x)
    node = next(site for site in ours.sites if site.path == "first").calls[0]
    recorder = Recorder(ours.graph_module, node)
    recorder.run(x)
    assert torch.equal(recorder.seen, expected)
    seen: list[Tensor] = []
    theirs.base_model.model.first.base_layer.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
    theirs(x)
    peft_still(not torch.equal(seen[0], expected), "changes the output of the base layer in place")


class Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps one node's result, as it is at the end."""

    def __init__(self, graph_module: torch.fx.GraphModule, node: str) -> None:
        super().__init__(graph_module)
        self.node = node
        self.seen = torch.empty(0)

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.name == self.node:
            self.seen = value
        return value


def test_the_output_projection_of_multihead_attention_is_adapted(tmp_path: Path) -> None:
    """`nn.MultiheadAttention` reads the weight of `out_proj` and never calls it, so PEFT's adapter has no effect."""
    fields = {"target_modules": ["out_proj"], **SMALL}
    theirs = peft_model(base_model("multihead"), **fields)
    theirs.save_pretrained(str(tmp_path))
    ours = GraloraModel.from_pretrained(base_trace("multihead"), tmp_path)
    inputs = model_inputs("multihead")
    without, unmerged = run(base_model("multihead"), inputs), run(theirs, inputs)
    expected = run(theirs.merge_and_unload(), inputs)
    assert relative_error(without, expected) > 1e-3
    assert relative_error(run(ours, inputs), expected) < 1e-5
    peft_still(torch.equal(unmerged, without), "leaves out the adapter of MultiheadAttention's out_proj")


def test_a_row_of_the_batch_has_the_adapter_that_it_asks_for(tmp_path: Path) -> None:
    theirs = saved_by_peft("bert", tmp_path, target_modules=["query"], **SMALL)
    ours = GraloraModel.from_pretrained(base_trace("bert"), tmp_path)
    inputs = text_batch(3, 6)
    names = ["default", "__base__", "default"]
    expected = run(theirs, inputs)
    with torch.no_grad():
        rows = main_output(ours(**inputs, adapter_names=names))
        assert torch.allclose(rows[[0, 2]], expected[[0, 2]], atol=1e-5)
        with theirs.disable_adapter():
            assert torch.allclose(rows[1], run(theirs, inputs)[1], atol=1e-5)

    def ignores() -> bool:
        with torch.no_grad():
            return torch.equal(main_output(theirs(**inputs, adapter_names=names)), expected)

    peft_still(not fails(ignores, ValueError, TypeError) and ignores(), "ignores adapter_names")


# -- which modules ------------------------------------------------------------------------------------------------


def test_a_failed_injection_leaves_the_model_whole() -> None:
    fields = {"target_modules": ["query", "classifier"], "r": 8, "gralora_k": 4}  # 2 labels are not 4 blocks
    base = fresh_trace("bert")
    before = str(base.graph_module.graph)
    with pytest.raises(TargetError, match="classifier"):
        rewrite(base, GraloraConfig(**fields))
    assert str(base.graph_module.graph) == before
    assert torch.equal(run(base, text_batch()), run(tiny_model("bert"), text_batch()))
    theirs = tiny_model("bert")
    assert fails(lambda: peft_model(theirs, **fields), ValueError)
    peft_still(
        any(isinstance(module, GraloraLayer) for module in theirs.modules()),
        "leaves a model half wrapped when it cannot adapt it",
    )


def test_layers_to_transform_counts_beside_all_linear() -> None:
    fields = {"target_modules": "all-linear", "layers_to_transform": [1], **SMALL}
    adapted = {entry.site.path for entry in plan(base_trace("llama"), GraloraConfig(**fields)).selected}
    assert len(adapted) == 7
    assert all(path.startswith("model.layers.1.") for path in adapted)
    theirs = adapted_paths(peft_model(base_model("llama"), **fields))
    peft_still(len(theirs) == 14, "ignores layers_to_transform beside all-linear")


def test_layers_to_transform_beside_a_regular_expression_is_refused() -> None:
    fields = {"target_modules": r".*\.q_proj", "layers_to_transform": [1], **SMALL}
    with pytest.raises(ConfigError, match="a regular expression selects layers itself"):
        GraloraConfig(**fields)
    theirs = adapted_paths(peft_model(base_model("llama"), **fields))
    peft_still(len(theirs) == 2, "ignores layers_to_transform beside a regular expression")


# -- merging ------------------------------------------------------------------------------------------------------


def test_a_safe_merge_that_fails_midway_changes_nothing(tmp_path: Path) -> None:
    theirs = saved_by_peft("bert", tmp_path, target_modules=["query"], **SMALL)
    ours = GraloraModel.from_pretrained(fresh_trace("bert"), tmp_path)
    early, late = (f"bert.encoder.layer.{layer}.attention.self.query" for layer in (0, 1))
    before = {name: p.detach().clone() for name, p in ours.traced.tree.parameters.items()}
    graph = str(ours.graph_module.graph)
    with torch.no_grad():
        ours.adapter("default").factors[late].B[0, 0, 0] = float("nan")
        theirs.base_model.model.get_submodule(late).gralora_B["default"][0, 0, 0] = float("nan")
    with pytest.raises(MergeError, match="not finite"):
        ours.merge_adapter(safe_merge=True)
    assert str(ours.graph_module.graph) == graph
    assert all(torch.equal(before[name], p) for name, p in ours.traced.tree.parameters.items())
    assert fails(lambda: theirs.merge_adapter(safe_merge=True), ValueError)
    weight = theirs.base_model.model.get_submodule(early).base_layer.weight
    peft_still(not torch.equal(weight, before[f"{early}.weight"]), "leaves earlier layers merged")


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_unmerging_gives_every_bit_back(dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_model("bert", dtype)
    theirs = peft_model(base_model("bert", dtype), target_modules=["query", "value"], **SMALL)
    theirs.save_pretrained(str(tmp_path))
    source = base_model("bert", dtype)
    ours = GraloraModel.from_pretrained(trace(source), tmp_path)
    paths = sorted(adapted_paths(theirs))
    ours.merge_adapter()
    ours.unmerge_adapter()
    assert all(torch.equal(p, other) for p, other in zip(base.parameters(), source.parameters(), strict=True))
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    weights = [theirs.base_model.model.get_submodule(path).base_layer.weight for path in paths]
    drifted = [not torch.equal(w, base.get_submodule(p).weight) for w, p in zip(weights, paths, strict=True)]
    peft_still(any(drifted), f"drifts when it unmerges {dtype}")


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_merged_half_precision_weights_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT rounds the delta first where its adapter is half precision too."""
    config = peft.GraloraConfig(target_modules=["query", "value"], init_weights=False, **SMALL)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base_model("bert", dtype), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(str(tmp_path))
    folded = merge(GraloraModel.from_pretrained(base_trace("bert", dtype), tmp_path)).tree.parameters
    exact = merged_parameters(copy.deepcopy(theirs).double())
    unloaded = dict(theirs.merge_and_unload().named_parameters())
    keys = [key for key in exact if key.endswith(("query.weight", "value.weight"))]

    def other_than_rounded(weights: dict[str, Any]) -> float:
        wrong = [(weights[key].float() != exact[key].to(dtype).float()).float().mean() for key in keys]
        return float(sum(wrong)) / len(wrong)

    # float32 accumulation may decide a tie, or next to one, otherwise than float64
    assert other_than_rounded(dict(folded)) < 1e-3
    peft_still(other_than_rounded(unloaded) > 1e-2, f"rounds twice when it merges {dtype}")


def test_merging_a_tied_head_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 102}  # which k divides
    fields = {"target_modules": ["lm_head", "q_proj"], **SMALL}
    base = tiny_model("opt", **sizes)
    before = base.model.decoder.embed_tokens.weight.detach().clone()
    ours = rewrite(trace(base), GraloraConfig(**fields, init_weights=False))
    for call in (ours.merge_adapter, ours.merge_and_unload, lambda: merge(ours)):
        with pytest.raises(MergeError, match="lm_head"):
            call()
    assert torch.equal(base.model.decoder.embed_tokens.weight, before)
    theirs = peft_model(tiny_model("opt", **sizes), **fields).merge_and_unload()
    after = theirs.model.decoder.embed_tokens.weight
    peft_still(not torch.equal(after, before), "changes the embeddings when it merges a tied head")


# -- the paper's own files ----------------------------------------------------------------------------------------


def delta_of_the_paper(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """dW[block j of the outputs, block n of the inputs] = B_j[rows of n]^T A_n[:, columns of j]^T, block by block."""
    k, width, r = A.shape
    height, s = B.shape[2], r // k
    delta = torch.zeros(k * height, k * width)
    for j in range(k):
        for n in range(k):
            block = B[j][n * s : (n + 1) * s].T @ A[n][:, j * s : (j + 1) * s].T
            delta[j * height : (j + 1) * height, n * width : (n + 1) * width] = block
    return scale * delta


@pytest.mark.parametrize("hybrid_r", [0, 4])
def test_a_file_of_the_papers_code_has_the_papers_scale(hybrid_r: int, tmp_path: Path) -> None:
    """There `r` counts `hybrid_r` in, and the scale is `gralora_alpha / r`: 2, which PEFT reads as 64 / 8."""
    r, k, alpha, prefix = 8, 2, 16, "base_model.model.first"
    fields = {"peft_type": "GRALORA", "r": r, "hybrid_r": hybrid_r, "gralora_k": k, "gralora_alpha": alpha}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": ["first"]}))
    generator = torch.Generator().manual_seed(2)
    A = torch.randn(k, HIDDEN // k, r - hybrid_r, generator=generator)
    B = torch.randn(k, r - hybrid_r, HIDDEN // k, generator=generator)
    tensors = {f"{prefix}.gralora_A": A, f"{prefix}.gralora_B": B}
    expected = delta_of_the_paper(A, B, alpha / r)
    if hybrid_r:
        tensors[f"{prefix}.gralora_A_general.weight"] = torch.randn(hybrid_r, HIDDEN, generator=generator)
        tensors[f"{prefix}.gralora_B_general.weight"] = torch.randn(HIDDEN, hybrid_r, generator=generator)
        down, up = (tensors[f"{prefix}.gralora_{name}_general.weight"] for name in "AB")
        expected = expected + alpha / r * up @ down
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    base = Layers()
    with pytest.warns(UserWarning, match="format of the paper's own code"):
        ours = GraloraModel.from_pretrained(trace(base, (torch.randn(2, HIDDEN),)), tmp_path)
    update = merge(ours).tree.parameters["first.weight"] - base.first.weight
    assert relative_error(update, expected) < 1e-5

    def misreads() -> bool:
        layer = load_in_peft(Layers(), tmp_path).base_model.model.first
        return relative_error(layer.get_delta_weight("default"), expected) > 0.1

    # with a hybrid part the tensors do not even have the shapes that PEFT expects
    peft_still(fails(misreads, RuntimeError) or misreads(), "misreads a file of the paper's code")
