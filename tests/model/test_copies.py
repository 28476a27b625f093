"""Models that are pickled, saved by `torch.save` or copied: the same bits, the same nodes, and a life of their own."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, fx, nn
from traces import inputs_of, main_output, traced

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, merge, rewrite, trace
from gralora_fx.base.features import features, parts
from gralora_fx.core import operators
from gralora_fx.core.operators.call import Call
from gralora_fx.errors import MergeError, RewriteError, TraceError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {"pickle": by_pickle, "torch": by_torch, "deepcopy": copy.deepcopy}


def mlp() -> tuple[TracedModel, dict[str, Any]]:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 8)).eval()
    return trace(source, (X,)), {"input": X}


def symbolic() -> tuple[TracedModel, dict[str, Any]]:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 8)).eval()
    graph_module = fx.symbolic_trace(source, concrete_args=None)
    return trace(graph_module, (X,)), {"input": X}


def llama() -> tuple[TracedModel, dict[str, Any]]:
    result = trace(tiny_model("llama"), task="text-generation-with-past")
    return result, {"input_ids": torch.tensor([[5, 7, 11, 13]])}


def of(name: str) -> Callable[[], tuple[TracedModel, dict[str, Any]]]:
    return lambda: (traced(name), inputs_of(name))


MODELS = {"mlp": mlp, "symbolic": symbolic, "llama": llama, "bert": of("bert"), "t5": of("t5")}


def adapted(name: str) -> tuple[GraloraModel, dict[str, Any]]:
    base, inputs = MODELS[name]()
    torch.manual_seed(1)
    config = GraloraConfig(r=4, target_modules="all-linear", init_weights=False, gralora_dropout=0.25)
    model = rewrite(base, config)
    model.add_adapter("waiting", GraloraConfig(r=2, target_modules="all-linear", init_weights=False))
    return model, {key if name != "symbolic" else "input": value for key, value in inputs.items()}


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return main_output(model(**copy.deepcopy(inputs)))


def nodes(model: Any) -> list[tuple[Any, ...]]:
    return [
        (node.op, node.name, node.target, str(node.args), str(node.kwargs), node.meta.get("custom"))
        for node in model.graph_module.graph.nodes
    ]


def check_alike(model: GraloraModel, other: GraloraModel, inputs: dict[str, Any], directory: Path) -> None:
    """Two models give the same bits now and after every change."""
    assert nodes(other) == nodes(model)
    assert repr(other) == repr(model)
    flags = [{name: p.requires_grad for name, p in each.named_parameters()} for each in (model, other)]
    assert flags[0] == flags[1]
    assert [site.path for site in other.sites] == [site.path for site in model.sites]
    results = []
    for each, folder in ((model, "a"), (other, "b")):
        outputs = [run(each, inputs)]
        each.train()
        outputs.append(run(each, inputs))
        each.eval()
        if each.merged_adapters:
            each.unmerge_adapter()
            outputs.append(run(each, inputs))
        each.set_adapter("waiting")
        outputs.append(run(each, inputs))
        each.merge_adapter()
        outputs.append(run(each, inputs))
        each.unmerge_adapter()
        each.add_adapter("new", GraloraConfig(r=2, target_modules="all-linear"))
        each.save_pretrained(directory / folder)
        outputs += [run(merge(each, name), inputs) for name in ("default", "waiting")]
        outputs.append(run(each.unload(), inputs))
        results.append(outputs)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    for file in sorted(path.relative_to(directory / "a") for path in (directory / "a").rglob("*.*")):
        if file.parts[0] != "new":
            assert (directory / "a" / file).read_bytes() == (directory / "b" / file).read_bytes()


CASES = [
    *((name, "pickle", "active") for name in MODELS),
    ("mlp", "torch", "merged"),
    ("mlp", "deepcopy", "merged"),
    ("bert", "deepcopy", "active"),
]


@pytest.mark.parametrize(("name", "way", "state"), CASES)
def test_a_rewritten_model_round_trips(name: str, way: str, state: str, tmp_path: Path) -> None:
    model, inputs = adapted(name)
    if state == "merged":
        model.merge_adapter()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    other = WAYS[way](model)
    assert list(other.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}
    check_alike(model, other, inputs, tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_a_traced_model_round_trips(way: str) -> None:
    model, inputs = adapted("bert")
    for base in (model.traced, merge(model)):
        other = WAYS[way](base)
        assert nodes(other) == nodes(base)
        assert torch.equal(run(other, inputs), run(base, inputs))
        assert [(s.path, s.calls, s.tied_with) for s in other.sites] == [
            (s.path, s.calls, s.tied_with) for s in base.sites
        ]
        again = rewrite(other, GraloraConfig(r=4, target_modules=["query"]))
        assert torch.equal(run(again, inputs), run(base, inputs))


@pytest.mark.parametrize("way", WAYS)
def test_tied_weights_stay_tied_and_copies_are_independent(way: str) -> None:
    model = rewrite(traced("gpt2"), GraloraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = WAYS[way](model)
    parameters = other.traced.tree.parameters
    assert parameters["lm_head.weight"] is parameters["transformer.wte.weight"]
    assert any(p is parameters["lm_head.weight"] for p in other.parameters())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def double(graph_module: fx.GraphModule) -> None:
    """Double the output, as a pass that pickle finds by its name."""
    output = next(iter(reversed(graph_module.graph.nodes)))
    with graph_module.graph.inserting_before(output):
        doubled = graph_module.graph.call_function(torch.mul, (output.all_input_nodes[0], 2))
    output.replace_input_with(output.all_input_nodes[0], doubled)


def test_passes_go_with_the_model_or_are_named() -> None:
    model, inputs = adapted("mlp")
    model.add_pass(double)
    assert torch.equal(run(by_pickle(model), inputs), run(model, inputs))
    model.add_pass(lambda graph_module: None)
    assert torch.equal(run(copy.deepcopy(model), inputs), run(model, inputs))
    with pytest.raises(RewriteError, match=r"the graph pass .*<lambda> cannot be pickled .* remove_pass\(\) first"):
        pickle.dumps(model)


def test_a_model_within_a_disabling_block_is_copied_as_it_is_after_it() -> None:
    model, inputs = adapted("mlp")
    with model.disable_adapter():
        other = by_pickle(model)
    assert other.active_adapters == ["default"]
    assert torch.equal(run(other, inputs), run(model, inputs))


def test_a_model_on_the_meta_device_round_trips() -> None:
    model, _ = adapted("mlp")
    other = by_pickle(model.to("meta"))
    assert {p.device.type for p in other.parameters()} == {"meta"}
    assert nodes(other) == nodes(model)


def test_what_cannot_be_written_is_named() -> None:
    model, _ = adapted("mlp")
    model.merge_adapter()
    with torch.no_grad():
        model.factors("0").A.mul_(2)
    with pytest.raises(MergeError, match="changed after default was merged"):
        pickle.dumps(model)

    def local(x: Tensor) -> Tensor:
        return x

    def call_local(graph_module: fx.GraphModule) -> None:
        output = next(iter(reversed(graph_module.graph.nodes)))
        with graph_module.graph.inserting_before(output):
            graph_module.graph.call_function(local, (output.all_input_nodes[0],))

    with pytest.raises(TraceError, match=r"calls .*local, which is defined within a function, so the graph cannot be"):
        pickle.dumps(model.traced.with_pass(call_local))


FRESH = """
import sys, torch
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(**inputs).logits, expected)
from gralora_fx.exporters import export_onnx
export_onnx(model, sys.argv[2], verify=True)
"""


def test_a_fresh_process_loads_runs_and_exports_it(tmp_path: Path) -> None:
    model, inputs = adapted("llama")
    with torch.no_grad():
        torch.save((model, inputs, model(**inputs).logits), tmp_path / "model.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model.pt"), str(tmp_path / "onnx")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "onnx" / "model.onnx").is_file()


def test_a_fresh_process_knows_every_operator() -> None:
    """By a file of the core, or by a feature that has the operator's name among its signs."""
    for module in pkgutil.iter_modules(operators.__path__):
        importlib.import_module(f"{operators.__name__}.{module.name}")
    signs = {feature.name: feature.signs for feature in features() if "operators" in feature.parts}
    parts("operators")
    core: set[str] = set()
    for kind in Call.__subclasses__():
        folder, _, name = kind.__module__.rpartition(".")
        if folder == operators.__name__:
            core.add(name)
        elif hasattr(kind, "target"):  # not those of ONNX nodes
            assert kind.target.name() in signs[folder.rpartition(".")[2]]
    assert core == set(operators.FILES)
    assert signs
