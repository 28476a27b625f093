"""`merge`: folded weights in exactly the base's graph, and a source that is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import peft_model, perturb_saved_modules, saved_by_peft
from tiny_models import TINY, tiny_model
from torch import Tensor
from traces import fresh_trace, inputs_of, relative_error, run, traced

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite, trace
from gralora_fx.core.methods.forms import delta_weight
from gralora_fx.core.methods.gralora import Factors
from gralora_fx.core.methods.method import Update
from gralora_fx.errors import MergeError, RewriteError


def adapted(name: str, **fields: Any) -> GraloraModel:
    torch.manual_seed(1)
    defaults = {"r": 8, "hybrid_r": 4, "alpha": 12, "target_modules": "all-linear", "init_weights": False}
    return rewrite(traced(name), GraloraConfig(**{**defaults, **fields}))


@pytest.mark.parametrize("name", TINY)
def test_merged_equals_unmerged_in_exactly_the_bases_graph(name: str) -> None:
    model = adapted(name)
    inputs = inputs_of(name)
    weights = {key: p.detach().clone() for key, p in traced(name).tree.parameters.items()}
    expected, before = run(model, inputs), str(model.graph_module.graph)
    merged = merge(model)
    assert relative_error(run(merged, inputs), expected) < 1e-5
    assert str(merged.graph_module.graph) == str(traced(name).graph_module.graph)
    assert len(merged.sites) == len(traced(name).sites)
    assert all(torch.equal(weights[key], p) for key, p in traced(name).tree.parameters.items())
    assert str(model.graph_module.graph) == before
    assert torch.equal(run(model, inputs), expected)
    assert relative_error(run(traced(name), inputs), expected) > 1e-3


@pytest.mark.quick
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_merged_weights_are_pefts(name: str, tmp_path: Any) -> None:
    theirs = saved_by_peft(name, tmp_path, target_modules="all-linear", r=8, hybrid_r=4, alpha=24)
    merged = merge(GraloraModel.from_pretrained(traced(name), tmp_path))
    expected = dict(theirs.merge_and_unload().named_parameters())
    changed = 0
    for key, parameter in merged.tree.parameters.items():
        if key in expected:
            assert torch.allclose(parameter, expected[key], atol=1e-6), key
            changed += not torch.equal(parameter, traced(name).tree.parameters[key])
    assert changed == len(merged.sites) - (name != "bert")  # the tied or left-out head


def test_only_folded_weights_are_new() -> None:
    model = adapted("bert", target_modules=["query"])
    merged = merge(model)
    new = [name for name, p in merged.tree.parameters.items() if p is not model.traced.tree.parameters[name]]
    assert new == [f"bert.encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1)]
    in_graph = dict(merged.graph_module.named_parameters())
    assert all(in_graph[name] is merged.tree.parameters[name] for name in new)
    assert next(site.weight for site in merged.sites if f"{site.path}.weight" == new[0]) is in_graph[new[0]]


def test_a_trained_head_and_biases_are_merged_too() -> None:
    model = adapted("bert", target_modules=["query"], modules_to_save=["classifier"], bias="gralora_only")
    with torch.no_grad():
        for owned in model.adapter("default").copies.values():
            for parameter in owned.values():
                parameter.add_(0.5)
    inputs = inputs_of("bert")
    merged = merge(model)
    assert relative_error(run(merged, inputs), run(model, inputs)) < 1e-5
    assert str(merged.graph_module.graph) == str(traced("bert").graph_module.graph)


def test_named_adapters_are_merged_whether_active_or_not() -> None:
    model = adapted("bert", target_modules=["query"])
    model.add_adapter("other", GraloraConfig(r=4, target_modules=["query", "key"], init_weights=False))
    inputs = inputs_of("bert")
    merged = merge(model, ["other"])
    model.set_adapter("other")
    assert relative_error(run(merged, inputs), run(model, inputs)) < 1e-5
    both = merge(model, ["default", "other"])
    model.set_adapter(["default", "other"])
    assert relative_error(run(both, inputs), run(model, inputs)) < 1e-5


def test_merging_a_model_whose_adapter_stands_merged() -> None:
    model = adapted("bert")
    inputs = inputs_of("bert")
    expected = run(model, inputs)
    model.merge_adapter()
    assert relative_error(run(merge(model), inputs), expected) < 1e-5


@pytest.mark.parametrize("mode", [True, False])
def test_the_result_stands_in_the_models_mode(mode: bool) -> None:
    model = adapted("bert").train(mode)
    assert merge(model).training is mode


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_adapter_is_named_and_nothing_changes(value: float) -> None:
    model = adapted("bert", target_modules=["query", "key"])
    path = "bert.encoder.layer.1.attention.self.key"
    with torch.no_grad():
        model.adapter("default").factors[path].A[0, 0, 0] = value
    before: dict[str, Tensor] = {key: p.detach().clone() for key, p in model.traced.tree.parameters.items()}
    text = str(model.graph_module.graph)
    with pytest.raises(MergeError, match=f"the merged weight of {path} is not finite; the adapter is damaged"):
        merge(model)
    assert all(torch.equal(before[key], p) for key, p in model.traced.tree.parameters.items())
    assert str(model.graph_module.graph) == text
    assert not torch.isfinite(merge(model, safe=False).tree.parameters[f"{path}.weight"]).all()


def test_a_tied_weight_is_refused() -> None:
    source = tiny_model("opt", vocab_size=102)
    model = rewrite(trace(source), GraloraConfig(r=8, target_modules=["lm_head", "q_proj"], init_weights=False))
    before = source.lm_head.weight.detach().clone()
    for call in (lambda: merge(model), model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"the weight of lm_head \(tied with .*\) is shared.*untie"):
            call()
    assert torch.equal(source.lm_head.weight, before)
    assert model.merged_adapters == []


TIED = {
    "opt": {"vocab_size": 102},
    "llama": {"tie_word_embeddings": True, "vocab_size": 102},
    "gpt2": {"vocab_size": 102},
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_weight_is_untied_on_request(name: str) -> None:
    source = tiny_model(name, **TIED[name])
    model = rewrite(trace(source), GraloraConfig(r=8, target_modules=["lm_head"], init_weights=False))
    inputs, base_text = inputs_of(name), str(model.traced.graph_module.graph)
    with model.disable_adapter():
        plain = run(model, inputs)
    adapted, before = run(model, inputs), source.lm_head.weight.detach().clone()
    result = merge(model, untie=True)
    assert 0 <= len(result.graph_module.graph.nodes) - len(model.traced.graph_module.graph.nodes) <= 1
    assert relative_error(run(result, inputs), adapted) < 1e-5
    site = next(site for site in result.sites if site.path == "lm_head")
    assert site.tied_with == ()
    model.merge_adapter(untie=True)
    assert relative_error(run(model, inputs), adapted) < 1e-5
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), plain)
    assert model.merged_adapters == ["default"]
    model.unmerge_adapter()
    assert torch.equal(run(model, inputs), adapted)
    unloaded = model.merge_and_unload(untie=True)
    assert str(model.graph_module.graph) == base_text
    assert relative_error(run(unloaded, inputs), adapted) < 1e-5
    assert torch.equal(source.lm_head.weight, before)
    assert source.lm_head.weight is source.get_input_embeddings().weight


class SharedTable(torch.nn.Module):
    """One parameter that is looked up in and multiplied by: one node reads it for both."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(10, 8))

    def forward(self, ids: Tensor) -> Tensor:
        rows = torch.nn.functional.embedding(ids, self.table)
        return torch.nn.functional.linear(rows.relu(), self.table)


def test_one_parameter_of_two_uses_is_untied_by_a_node_of_its_own() -> None:
    source, inputs = SharedTable(), {"ids": torch.tensor([[1, 2, 9]])}
    model = rewrite(trace(source, inputs), GraloraConfig(r=2, target_modules=["table"], init_weights=False))
    base_text, adapted = str(model.traced.graph_module.graph), run(model, inputs)
    with pytest.raises(MergeError, match=r"read by embedding outside a linear call.*merge with untie=True"):
        merge(model)
    result = merge(model, untie=True)
    assert len(result.graph_module.graph.nodes) == len(model.traced.graph_module.graph.nodes) + 1
    assert relative_error(run(result, inputs), adapted) < 1e-5
    assert [(site.path, site.tied_with) for site in result.sites] == [("separated.table.weight", ())]
    model.merge_adapter(untie=True)
    assert relative_error(run(model, inputs), adapted) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(run(model, inputs), adapted)
    unloaded = model.unload()
    assert str(unloaded.graph_module.graph) == base_text
    assert not [name for name, _ in unloaded.graph_module.named_parameters() if name != "table"]


def test_nothing_to_merge() -> None:
    model = adapted("bert")
    with pytest.raises(RewriteError, match="no adapter 'absent'; there are default"):
        merge(model, ["absent"])
    with model.disable_adapter(), pytest.raises(MergeError, match="no adapter is active, so there is nothing to merge"):
        merge(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_rounded_once(dtype: torch.dtype) -> None:
    source = tiny_model("bert").to(dtype)
    torch.manual_seed(1)
    model = rewrite(trace(source), GraloraConfig(r=8, target_modules=["query"], init_weights=False))
    merged = merge(model)
    for path, factors in model.adapter("default").factors.items():
        base = model.traced.tree.parameters[f"{path}.weight"].float()
        doubles = Factors(*(None if t is None else t.detach().double() for t in factors))
        exact = base.double() + delta_weight(Update(doubles, model.configs["default"].scale))
        result = merged.tree.parameters[f"{path}.weight"]
        assert result.dtype == dtype
        # the nearest value of the dtype, but for ties that fp32 accumulation may decide otherwise
        assert (result.double() - exact).abs().max() <= 0.501 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "module", "sizes"),
    [
        ("gpt2", "lm_head", {}),
        ("gpt2", "wte", {}),
        ("llama", "lm_head", {"tie_word_embeddings": True}),
        ("llama", "embed_tokens", {"tie_word_embeddings": True}),
        ("bert", "classifier", {}),
    ],
)
def test_a_trained_copy_of_a_tied_module_stays_its_own(name: str, module: str, sizes: dict[str, Any]) -> None:
    targets = {"gpt2": ["c_attn"], "llama": ["q_proj"], "bert": ["query"]}[name]
    config = GraloraConfig(r=4, target_modules=targets, modules_to_save=[module], init_weights=False)
    model = rewrite(fresh_trace(name, **sizes), config)
    with torch.no_grad():
        for owned in model.adapter("default").copies.values():
            for parameter in owned.values():
                parameter += 0.3 * torch.randn(parameter.shape)
    inputs = inputs_of(name)
    expected = run(model, inputs)
    assert relative_error(run(merge(model), inputs), expected) < 1e-5
    model.merge_adapter()
    assert relative_error(run(model, inputs), expected) < 1e-5


def test_both_modules_of_a_tied_weight_train_copies_of_their_own(tmp_path: Path) -> None:
    """As in PEFT, which copies each module by itself."""
    fields = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    wrapped = peft_model(tiny_model("llama", tie_word_embeddings=True), method="LORA", **fields)
    perturb_saved_modules(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    inputs = inputs_of("llama")
    expected = run(wrapped, inputs)
    model = GraloraModel.from_pretrained(fresh_trace("llama", tie_word_embeddings=True), tmp_path)
    assert model.get_nb_trainable_parameters()[0] == wrapped.get_nb_trainable_parameters()[0]
    for result in (model, merge(model)):
        assert relative_error(run(result, inputs), expected) < 1e-5


def test_folding_a_tied_copy_into_the_base_itself_is_refused() -> None:
    config = GraloraConfig(r=4, target_modules=["c_attn"], modules_to_save=["lm_head"])
    model = rewrite(fresh_trace("gpt2"), config)
    with pytest.raises(MergeError, match=r"lm_head.weight of lm_head is tied with transformer.wte.weight"):
        model.merge_and_unload()


def test_a_weight_read_outside_a_linear_call_is_refused() -> None:
    class Reads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.fc.weight.sum()

    model = rewrite(trace(Reads(), (torch.randn(2, 8),)), GraloraConfig(r=4, target_modules=["fc"]))
    with pytest.raises(MergeError, match=r"fc \(read by sum_1 outside a linear call\) is shared"):
        merge(model)


def test_only_rewritten_models_merge() -> None:
    with pytest.raises(MergeError, match="cannot merge a TracedModel"):
        merge(traced("bert"))  # type: ignore[arg-type]
