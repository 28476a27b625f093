"""Blocks: the repeated layers of a source model are modules of its rewritten model, and compute what the graph does."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from tiny_models import text_batch
from torch import Tensor, fx, nn
from traces import fresh, fresh_trace

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.errors import RewriteError, TraceError

BLOCKS = {
    "llama": ["model.layers.0", "model.layers.1"],
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    "albert": ["albert.encoder.albert_layer_groups.0"],  # a single layer that is called twice
    "vit": ["vit.layers.0", "vit.layers.1"],
}


def rewritten(name: str, config: Any = None) -> GraloraModel:
    given = GraloraConfig(r=4, target_modules="all-linear", init_weights=False) if config is None else config
    return rewrite(fresh_trace(name), given)


class Layer(nn.Module):
    """A layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.fc(x)))


def own_net(depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(Layer() for _ in range(depth))), nn.Linear(8, 2))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found_and_own_their_parameters_under_the_source_models_names(name: str) -> None:
    model, traced = fresh(name)
    assert list(traced.blocks) == BLOCKS[name]
    ours = rewrite(traced, GraloraConfig(r=4, target_modules="all-linear"))
    for path, block in ours.blocks.items():
        assert isinstance(block, fx.GraphModule)
        assert block is ours.get_submodule(f"graph_module.{path}")
        own = dict(block.named_parameters())
        assert own
        source = dict(model.get_submodule(path).named_parameters())
        assert all(own[parameter] is source[parameter] for parameter in own)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_runs_is_bit_for_bit_the_flat_graph(name: str) -> None:
    model = rewritten(name)
    inputs = model.traced.graph_inputs
    for mode in (False, True):
        model.train(mode)
        torch.manual_seed(1)
        expected = model.graph_module(**inputs)
        torch.manual_seed(1)
        actual = model(**inputs)
        assert torch.equal(actual[0], expected[0])


def test_a_hook_on_a_block_runs_in_every_state_and_sees_what_the_block_computes() -> None:
    model = rewritten("bert")
    batch, seen = text_batch(), list[Tensor]()
    handle = model.blocks["bert.encoder.layer.1"].register_forward_hook(lambda *call: seen.append(call[2]))
    model(**batch)
    with model.disable_adapter():
        model(**batch)
    model.merge_adapter()
    model(**batch)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    assert torch.allclose(seen[0], seen[2], atol=1e-4)
    handle.remove()
    model(**batch)
    assert len(seen) == 3


def test_a_backward_hook_on_a_block_sees_the_gradient_of_its_output() -> None:
    model = rewrite(trace(own_net().train(), (torch.randn(2, 8),)), LoraConfig(r=2, target_modules=["fc"]))
    gradients = []
    model.blocks["1.1"].register_full_backward_hook(lambda *call: gradients.append(call[2][0]))
    output = model(torch.randn(2, 8))
    output.sum().backward()
    assert len(gradients) == 1
    assert gradients[0].shape == (2, 8)


def test_an_edit_of_the_flat_graph_reaches_what_runs() -> None:
    model = rewrite(trace(own_net().eval(), (torch.randn(2, 8),)), LoraConfig(r=2, target_modules=["fc"]))
    x = torch.randn(2, 8)
    before = model(x)
    graph_module = model.graph_module
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.tanh.default:
            node.target = torch.ops.aten.sin.default
    graph_module.recompile()
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), graph_module(x))


def test_a_block_called_by_itself_computes_as_in_the_model() -> None:
    model = rewrite(trace(own_net().eval(), (torch.randn(2, 8),)), LoraConfig(r=2, target_modules=["fc"]))
    calls: list[Any] = []
    model.blocks["1.2"].register_forward_hook(lambda *call: calls.append(call[1:]))
    model(torch.randn(2, 8))
    inputs, output = calls[0]
    assert torch.equal(model.blocks["1.2"](*inputs), output)
    assert "tanh" in str(model.blocks["1.2"].graph)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_blocks_of_its_own(copied: Any) -> None:
    model = rewritten("llama")
    other = copied(model)
    assert list(other.blocks) == list(model.blocks)
    inputs = model.traced.graph_inputs
    with torch.no_grad():
        next(iter(other.blocks.values())).get_parameter("self_attn.q_proj.weight").zero_()
        assert not torch.equal(other(**inputs)[0], model(**inputs)[0])
    other.graph_module.recompile()


def test_own_modules_have_blocks_too_and_a_path_or_a_pattern_names_others() -> None:
    x = torch.randn(2, 8)
    assert trace(own_net(), (x,)).blocks == ("1.0", "1.1", "1.2")
    assert trace(own_net(), (x,), blocks=["1.*"]).blocks == ("1.0", "1.1", "1.2")
    assert trace(own_net(), (x,), blocks=["1"]).blocks == ("1",)
    assert trace(own_net(), (x,), blocks=[]).blocks == ()
    assert trace(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (x,)).blocks == ()  # single layers


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["1.9"], "no module of the model matches '1.9'; nearest: 1"),
        (["1", "1.0"], "1.0 is within 1, which is a block too; name one of them"),
        ("1.*", r"blocks must be a list of paths or patterns, but got '1\.\*'; give \['1\.\*'\]"),
        (["1.0.drop"], "1.0.drop cannot be a block: the graph reads no tensor of it; leave it out"),
    ],
)
def test_blocks_that_cannot_be_are_refused_by_name(blocks: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(own_net(), (torch.randn(2, 8),), blocks=blocks)


class Pairs(nn.Module):
    """A list of lists, whose members alone are called; or a model that calls two layers in turns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layers = [Layer() for _ in range(4)]
        self.kind = kind
        if kind == "lists":
            self.layers = nn.ModuleList(nn.ModuleList(layers[2 * i : 2 * i + 2]) for i in range(2))
        else:
            self.layers = nn.ModuleList(layers[:2])

    def forward(self, x: Tensor) -> Tensor:
        layers = [layer for pair in self.layers for layer in pair] if self.kind == "lists" else list(self.layers)
        for layer in layers * (2 if self.kind == "turns" else 1):
            x = layer(x) * 2
        return x


@pytest.mark.parametrize(
    ("kind", "blocks", "calls"),
    [
        ("lists", ("layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"), 4),
        ("turns", ("layers.0", "layers.1"), 4),
    ],
)
def test_every_call_of_a_block_is_one_of_a_module(kind: str, blocks: tuple[str, ...], calls: int) -> None:
    traced = trace(Pairs(kind).train(), (torch.randn(2, 8),))
    assert traced.blocks == blocks
    model = rewrite(traced, LoraConfig(r=2, target_modules=["fc"], lora_dropout=0.3, init_lora_weights=False))
    expected = step(model, {"x": torch.ones(2, 8)})
    model.gradient_checkpointing_enable()
    assert model._state.current.running.code.count("checkpoint(") == calls
    actual = step(model, {"x": torch.ones(2, 8)})
    assert torch.equal(actual[0], expected[0])
    for key, gradient in expected[1].items():
        assert torch.allclose(actual[1][key], gradient, rtol=1e-5), (
            key
        )  # of a layer that is called twice, in another order


def test_a_model_without_repeated_layers_says_how_to_name_them() -> None:
    model = rewrite(trace(nn.Sequential(nn.Linear(8, 8)), (torch.randn(2, 8),)), LoraConfig(r=2, target_modules=["0"]))
    assert model.blocks == {}
    with pytest.raises(RewriteError, match=r"the trace found none.*trace\(model, blocks="):
        model.gradient_checkpointing_enable()


class Normed(nn.Module):
    """Layers with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_block_that_updates_buffers_is_not_computed_twice() -> None:
    models = [
        rewrite(
            trace(copy.deepcopy(source).train(), (torch.ones(4, 8),)), LoraConfig(r=2, target_modules=r"layers\.\d\.0")
        )
        for source in [Normed()] * 2
    ]
    models[1].gradient_checkpointing_enable()
    torch.manual_seed(4)
    x = torch.randn(4, 8)
    for model in models:
        model(x).square().sum().backward()
    buffers = [dict(model.named_buffers()) for model in models]
    assert buffers[0]
    assert all(torch.equal(buffers[1][name], buffer) for name, buffer in buffers[0].items())


def test_selective_checkpointing_takes_a_function() -> None:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    model, inputs = rewritten("llama").train(), fresh_trace("llama").graph_inputs
    expected = step(model, inputs)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    model.gradient_checkpointing_enable({"context_fn": functools.partial(create_selective_checkpoint_contexts, kept)})
    actual = step(model, inputs)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(actual[1][key], expected[1][key]) for key in expected[1])


def test_a_lent_graph_is_copied_and_pickled_with_its_own_weights() -> None:
    model = rewrite(trace(own_net().eval(), (torch.randn(2, 8),)), GraloraConfig(r=4, target_modules=["fc"]))
    with torch.no_grad():
        model.factors("1.0.fc").B.fill_(0.1)
    x = torch.randn(2, 8)
    model.merge_adapter()
    merged = model.graph_module
    expected = merged(x)
    model.unmerge_adapter()
    assert torch.equal(copy.deepcopy(merged)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(merged))(x), expected)
    assert not torch.equal(model.graph_module(x), expected)


def test_what_blocks_cannot_do_is_refused_by_name() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = rewrite(trace(own_net().eval(), (torch.randn(2, 8),)), LoraConfig(r=2, target_modules=["fc"]))
    block = model.blocks["1.0"]
    with pytest.raises(RewriteError, match=r"edit model\.graph_module"):
        block.graph = fx.Graph()
    apply_activation_checkpointing(model, check_fn=lambda module: module is block)
    with pytest.raises(RewriteError, match=r"the block 1\.0 .*CheckpointWrapper.*gradient_checkpointing_enable"):
        model.train()


METHODS = {
    "gralora": GraloraConfig(r=4, gralora_k=2, target_modules="all-linear", gralora_dropout=0.3, init_weights=False),
    "hybrid": GraloraConfig(r=4, hybrid_r=2, target_modules="all-linear", init_weights=False),
    "lora": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False),
    "dora": DoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "biases": LoraConfig(r=4, target_modules="all-linear", bias="all", init_lora_weights=False),
}


def step(model: nn.Module, inputs: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """Output, gradients, and how many numbers autograd kept for them."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    model.zero_grad()
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs)[0]
    output.square().sum().backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "bert", "albert"])
def test_checkpointing_changes_no_bit_of_outputs_and_gradients_and_keeps_less(name: str, method: str) -> None:
    model, inputs = rewritten(name, METHODS[method]).train(), fresh_trace(name).graph_inputs
    output, gradients, kept = step(model, inputs)
    sizes = []
    for options, every in (({}, 1), ({}, 2), ({"use_reentrant": True}, 1)):
        model.gradient_checkpointing_enable(options, every=every)
        assert model.is_gradient_checkpointing
        again, others, fewer = step(model, inputs)
        assert torch.equal(again, output)
        assert others.keys() == gradients.keys()
        assert all(torch.equal(others[key], gradients[key]) for key in gradients)
        sizes.append(fewer)
    assert sizes[0] < 0.5 * kept
    assert sizes[0] < sizes[1] < kept
    model.eval()
    assert "checkpoint" not in model._state.current.running.code
    model.train().gradient_checkpointing_disable()
    assert step(model, inputs)[2] == kept


def test_checkpoints_survive_switches_of_adapters_and_modes() -> None:
    model = rewritten("llama").train()
    model.gradient_checkpointing_enable()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    assert model._state.current.running.code.count("checkpoint(") == 2
    with model.disable_adapter():
        assert model._state.current.running.code.count("checkpoint(") == 2
    model.eval().train()
    assert model._state.current.running.code.count("checkpoint(") == 2
    assert copy.deepcopy(model).is_gradient_checkpointing


def test_blocks_inputs_can_be_offloaded() -> None:
    model, inputs = rewritten("llama").train(), fresh_trace("llama").graph_inputs
    expected = step(model, inputs)
    model.activation_checkpointing_enable(offload=True)
    actual = step(model, inputs)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(actual[1][key], expected[1][key]) for key in expected[1])


@pytest.mark.parametrize(
    ("options", "every", "message"),
    [
        ({"use_rentrant": False}, 1, "no option use_rentrant; torch's are .*use_reentrant"),
        ({}, 0, "every must be a whole number of blocks of at least 1, but got 0"),
        ({}, True, "every must be a whole number of blocks of at least 1, but got True"),
    ],
)
def test_bad_options_of_checkpointing_are_refused(options: Any, every: int, message: str) -> None:
    model = rewritten("llama")
    with pytest.raises(RewriteError, match=message):
        model.gradient_checkpointing_enable(options, every=every)
    assert not model.is_gradient_checkpointing


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_a_base_that_checkpoints_keeps_doing_so(recwarn: pytest.WarningsRecorder) -> None:
    source, _ = fresh("llama", num_hidden_layers=3)
    source.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)
    traced = trace(source)
    assert not [warning for warning in recwarn if "checkpointing is not part" in str(warning.message)]
    model = rewrite(traced, LoraConfig(r=2, target_modules=["q_proj"])).train()
    assert model.is_gradient_checkpointing
    assert model._state.state.checkpointing == (2, (("use_reentrant", True),), False)
    assert model._state.current.running.code.count("checkpoint(") == 2  # of layers 0 and 2


def are_close(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Return whether gradients are equal but for the order in which a compiler adds up those of one input."""
    return all((gradients[key] - value).abs().max() <= 1e-4 * value.abs().max() for key, value in expected.items())


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("task", ["text-generation", "text-generation-with-past"])
def test_it_compiles_whole_and_once_for_every_size(task: str, checkpoints: bool) -> None:
    """A trace with a cache compiles in the form without, which is made while it compiles."""
    config = GraloraConfig(r=4, target_modules="all-linear", init_weights=False)
    model = rewrite(fresh_trace("llama", task=task), config).train()
    if checkpoints:
        model.gradient_checkpointing_enable()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    graphs = []
    for batch, length in (
        (11, 5),
        (7, 13),
        (13, 10),
    ):  # none of them a size of the trace, which torch would take for one
        ids = torch.randint(0, 90, (batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if task == "text-generation-with-past":
            inputs["labels"] = ids
        expected, actual = step(model, inputs), step(compiled, inputs)
        assert torch.equal(actual[0], expected[0])
        assert are_close({key.removeprefix("_orig_mod."): value for key, value in actual[1].items()}, expected[1])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1]


def test_random_numbers_are_drawn_in_the_order_of_the_flat_graph() -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Dropout(0.5), *(nn.Sequential(Layer(), nn.Dropout(0.3), Layer()) for _ in range(2)))
    traced = trace(source.train(), (torch.randn(4, 8),))
    assert traced.blocks
    model = rewrite(traced, GraloraConfig(r=4, target_modules=["fc"], gralora_dropout=0.2, init_weights=False))
    x = torch.randn(4, 8)
    torch.manual_seed(3)
    expected = model.graph_module(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), expected)
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    assert torch.equal(model(x), expected)


def test_checkpoints_that_change_while_adapters_are_disabled_stay_changed() -> None:
    model = rewritten("llama").train()
    with model.disable_adapter():
        model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert model._state.current.running.code.count("checkpoint(") == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # in torch itself
def test_blocks_compile_once_for_all_layers_that_compute_the_same() -> None:
    model = rewrite(fresh_trace("llama", num_hidden_layers=3), METHODS["gralora"].changed(gralora_dropout=0.0)).train()
    inputs = fresh_trace("llama").graph_inputs
    expected = step(model, inputs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.blocks.values():
        block.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    for _ in range(2):
        actual = step(model, inputs)
        assert torch.equal(actual[0], expected[0])
        assert are_close(actual[1], expected[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of the first block's input without a gradient
    model.eval()
    with model.disable_adapter(), torch.no_grad():
        assert model(**inputs)[0].isfinite().all()
