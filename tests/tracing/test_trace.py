"""`trace`: every kind of model, equal to the eager one at sizes it was not traced with."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import peft
import pytest
import torch
import transformers
from fresh_process import fresh_process
from tiny_models import TINY, text_batch, tiny_model
from torch import Tensor, fx, nn
from traces import TEXT_MODELS, inputs_of, main_output, real_positions, relative_error, run, source, traced
from transformers.exporters import utils as exporter_utils
from transformers.pytorch_utils import Conv1D

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.errors import TraceError
from gralora_fx.format.tasks import task_of_class


class Mlp(nn.Module):
    """Two linear layers around a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.dropout = nn.Dropout(0.5)
        self.down = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.down(self.dropout(torch.relu(self.up(x))))
        return y if scale is None else y * scale


class Mixed(nn.Module):
    """A linear layer of each kind: a module, a Conv1D, and a call on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 16)
        self.conv = Conv1D(8, 16)
        self.own = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.conv(torch.relu(self.fc(x))), self.own)


# -- transformers models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("batch", "length", "padding"), [(1, 1, "right"), (1, 6, "right"), (3, 9, "right"), (4, 5, "left")]
)
def test_other_sizes_and_padded_rows_equal_the_eager_model(name: str, batch: int, length: int, padding: str) -> None:
    inputs = inputs_of(name, batch, length, padding)
    expected = real_positions(run(source(name), inputs), inputs)
    assert relative_error(real_positions(run(traced(name), inputs), inputs), expected) < 1e-5


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_mask_that_is_not_given_is_all_ones(name: str) -> None:
    inputs = {key: value for key, value in inputs_of(name, 2, 6).items() if key != "attention_mask"}
    assert relative_error(run(traced(name), inputs), run(source(name), inputs)) < 1e-5


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_mask_is_an_input_that_matters(name: str) -> None:
    placeholders = [node.target for node in traced(name).graph_module.graph.nodes if node.op == "placeholder"]
    used = [node.target for node in traced(name).graph_module.graph.nodes if node.op == "placeholder" and node.users]
    assert placeholders == list(traced(name).input_names)
    assert "attention_mask" in used


@pytest.mark.quick
@pytest.mark.parametrize("length", [1, 2, 8])
def test_a_single_text_as_sample_leaves_batch_and_length_free(length: int) -> None:
    model = tiny_model("bert")
    single = {"input_ids": torch.arange(5, 5 + length)[None], "attention_mask": torch.ones(1, length, dtype=torch.long)}
    result = trace(model, single)
    for batch, other, padding in ((3, 9, "right"), (2, 5, "left"), (1, 1, "right")):
        inputs = text_batch(batch, other, padding)
        assert relative_error(run(result, inputs), run(model, inputs)) < 1e-5


def test_a_sample_without_a_mask_still_traces_one() -> None:
    model = tiny_model("llama")
    result = trace(model, {"input_ids": torch.arange(3, 9)[None]})
    assert result.input_names == ("input_ids", "attention_mask")
    inputs = text_batch(3, 7, "left")
    expected = real_positions(run(model, inputs), inputs)
    assert relative_error(real_positions(run(result, inputs), inputs), expected) < 1e-5


def test_positional_example_inputs_of_a_transformers_model() -> None:
    model = tiny_model("bert")
    batch = text_batch(2, 6)
    result = trace(model, (batch["input_ids"], batch["attention_mask"]))
    assert result.input_names == ("input_ids", "attention_mask")
    with torch.no_grad():
        by_position = result(batch["input_ids"], batch["attention_mask"]).logits
    assert torch.equal(by_position, run(result, batch))


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_of_the_models_own_class(name: str) -> None:
    inputs = inputs_of(name, 2, 4)
    with torch.no_grad():
        ours, theirs = traced(name)(**inputs), source(name)(**inputs)
    assert type(ours) is type(theirs)
    assert main_output(ours) is getattr(ours, "logits", main_output(ours))


@pytest.mark.parametrize("name", TINY)
def test_the_graph_shares_the_models_parameters(name: str) -> None:
    own = {id(parameter) for parameter in source(name).parameters()}
    in_graph = {id(parameter) for parameter in traced(name).graph_module.parameters()}
    assert in_graph <= own
    assert {key: id(p) for key, p in traced(name).tree.parameters.items()} == {
        key: id(p) for key, p in source(name).named_parameters(remove_duplicate=False)
    }


ONE_LAYER = {
    "bert": {"num_hidden_layers": 1},
    "llama": {"num_hidden_layers": 1},
    "vit": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1},
}


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "training": {path: module.training for path, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "forward": inspect.signature(model.forward),
        "config": copy.deepcopy(model.config.to_dict()),
    }


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "whisper", "vit"])
def test_the_source_model_is_as_it_was(name: str) -> None:
    model = tiny_model(name, **ONE_LAYER[name])
    next(iter(model.children())).train()  # a mixed mode, as a frozen part gives
    before = snapshot(model)
    trace(model)
    after = snapshot(model)
    assert after["parameters"].keys() == before["parameters"].keys()
    for key, (identity, requires_grad, value) in before["parameters"].items():
        assert after["parameters"][key][:2] == (identity, requires_grad)
        assert torch.equal(after["parameters"][key][2], value)
    assert all(torch.equal(after["buffers"][key], value) for key, value in before["buffers"].items())
    for part in ("attributes", "training", "forward", "config"):
        assert after[part] == before[part]


def test_a_failed_trace_leaves_the_source_model_too() -> None:
    model = tiny_model("bert", num_hidden_layers=1)
    next(iter(model.children())).train()
    model.classifier.forward = lambda x: x if x.sum() > 0 else -x  # torch.export cannot follow a value
    before = snapshot(model)
    with pytest.raises(TraceError, match="cannot trace BertForSequenceClassification"):
        trace(model)
    after = snapshot(model)
    assert after["training"] == before["training"]
    assert after["attributes"] == before["attributes"]


def test_metadata_of_a_transformers_model() -> None:
    result = traced("bert")
    assert result.task == "text-classification"
    assert result.config is source("bert").config
    assert result.example_inputs.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    assert repr(result) == (
        f"TracedModel(Bert, task='text-classification', {len(result.graph_module.graph.nodes)} nodes, 14 linear sites, "
        "input_ids length <= 64)"
    )


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert", "text-classification"),
        ("gpt2", "text-generation"),
        ("t5", "text2text-generation"),
        ("whisper", "automatic-speech-recognition"),
        ("vit", "image-classification"),
        ("clip_text", "feature-extraction"),
    ],
)
def test_the_task_is_told_by_the_class(name: str, task: str) -> None:
    assert traced(name).task == task


def test_static_shapes_on_request() -> None:
    model = tiny_model("bert")
    batch = text_batch(2, 6)
    result = trace(model, batch, dynamic=False)
    assert relative_error(run(result, batch), run(model, batch)) < 1e-5
    symbolic = [node for node in result.graph_module.graph.nodes if "sym_size" in str(node.target)]
    assert not symbolic


# -- plain modules ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "sample", [(torch.ones(1, 8),), {"x": torch.ones(1, 8)}, (torch.ones(4, 8),)], ids=["tuple", "dict", "rows"]
)
def test_a_plain_module(sample: Any) -> None:
    model = Mlp().eval()
    result = trace(model, sample)
    assert [site.path for site in result.sites] == ["up", "down"]
    for rows in (1, 2, 7):
        x = torch.randn(rows, 8)
        assert torch.allclose(result(x), model(x), atol=1e-6)
        assert torch.allclose(result(x=x), model(x), atol=1e-6)


def test_a_second_input_stays_an_input() -> None:
    model = Mlp().eval()
    result = trace(model, {"x": torch.ones(3, 8), "scale": torch.ones(3, 1)})
    x, scale = torch.randn(5, 8), torch.randn(5, 1)
    assert torch.allclose(result(x, scale), model(x, scale), atol=1e-6)
    assert torch.allclose(result(scale=scale, x=x), model(x, scale), atol=1e-6)


def test_an_input_without_axes_stays_an_input_too() -> None:
    model, x = Mlp().eval(), torch.randn(2, 5, 8)
    result = trace(model, (x, torch.tensor(1.5)))
    for sample in (x, torch.randn(3, 7, 8)):
        assert (result(sample, torch.tensor(-2.0)) - model(sample, torch.tensor(-2.0))).abs().max() < 1e-6


def test_a_sequence_axis_of_a_plain_module_varies() -> None:
    model = Mlp().eval()
    result = trace(model, (torch.ones(2, 5, 8),))
    for shape in ((1, 5, 8), (3, 1, 8), (1, 1, 8), (4, 9, 8)):
        x = torch.randn(shape)
        assert torch.allclose(result(x), model(x), atol=1e-6)


def test_a_plain_module_with_a_sequence_of_one_warns_that_it_stays() -> None:
    with pytest.warns(UserWarning, match="axis 1 of the example input 'x' has size 1 and stays fixed"):
        trace(Mlp().eval(), (torch.ones(2, 1, 8),))


# -- graphs -------------------------------------------------------------------------------------------------------


def front_ends(model: nn.Module, x: Tensor) -> dict[str, Any]:
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    return {"symbolic": fx.symbolic_trace(model), "program": program, "exported": program.module()}


@pytest.mark.parametrize("kind", ["symbolic", "program", "exported"])
def test_a_graph_keeps_its_sites_and_its_values(kind: str) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    result = trace(front_ends(model, torch.randn(3, 8))[kind])
    assert {site.path: (site.kind, site.in_features, site.out_features) for site in result.sites} == {
        "fc": ("linear", 8, 16),
        "conv": ("conv1d", 16, 8),
        "own": ("functional", 8, 6),
    }
    assert all(len(site.calls) == 1 for site in result.sites)
    for rows in (1, 2, 5):
        x = torch.randn(rows, 8)
        assert torch.allclose(result(x), model(x), atol=1e-6)


def test_a_symbolic_trace_is_left_as_it_is() -> None:
    graph_module = fx.symbolic_trace(Mixed())
    text = str(graph_module.graph)
    result = trace(graph_module, (torch.ones(2, 8),))
    assert str(graph_module.graph) == text
    assert {site.path: site.weight for site in result.sites}["fc"] is graph_module.fc.weight


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return self.fc(x) * factor


def test_a_symbolic_trace_keeps_its_defaults() -> None:
    model = Scaled()
    result = trace(fx.symbolic_trace(model))
    x = torch.randn(3, 8)
    for ours in (result, rewrite(result, GraloraConfig(r=2, target_modules={"fc"}))):
        assert torch.allclose(ours(x), model(x), atol=1e-6)
        assert torch.allclose(ours(x, factor=0.5), model(x, factor=0.5), atol=1e-6)


def test_a_symbolic_trace_goes_into_both_modes() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    result = trace(fx.symbolic_trace(model))
    x = torch.ones(64, 8)
    assert result.training
    assert not torch.equal(result(x), result(x))
    result.eval()
    model.eval()
    assert torch.allclose(result(x), model(x), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_a_program_keeps_the_mode_it_was_exported_in(training: bool) -> None:
    model = Mlp().train(training)
    result = trace(torch.export.export(model, (torch.ones(4, 8),)))
    assert result.training is training
    result.eval()
    model.eval()
    x = torch.randn(4, 8)
    assert torch.allclose(result(x), model(x), atol=1e-6)


def test_an_exported_transformers_program() -> None:
    model = tiny_model("bert").eval()
    batch = text_batch(3, 8)
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch}
    program = torch.export.export(model, (), dict(batch), dynamic_shapes=axes, strict=False)
    result = trace(program)
    assert result.input_names == ("input_ids", "attention_mask")
    paths = {site.path for site in traced("bert").sites if site.calls}
    assert {site.path for site in result.sites} == paths
    other = text_batch(1, 5)
    assert relative_error(run(result, other), run(model, other)) < 1e-5


def test_wrong_names_for_a_graph() -> None:
    with pytest.raises(TraceError, match="the graph takes x, not y; name its inputs"):
        trace(torch.export.export(Mlp(), (torch.ones(2, 8),)), {"y": torch.ones(2, 8)})


# -- what cannot be traced ----------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), Branching()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


def test_an_untraceable_model_says_where() -> None:
    with pytest.raises(TraceError, match=r"cannot trace Outer at blocks\.1 \(test_trace\.py:\d+\): \S"):
        trace(Outer(), (torch.ones(2, 4),))


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda h: h + h.data, r"a tensor that a graph does not see, such as `\.data`; use `\.detach\(\)`"),
        (torch.vmap(lambda row: row.softmax(-1)), r"the forward calls `torch\.vmap`, .*compute with the whole batch"),
    ],
    ids=["data", "vmap"],
)
def test_what_a_graph_cannot_hold_is_named(function: Any, told: str) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = function(self.fc(x))
            return h

    with pytest.raises(TraceError, match=told):
        trace(Calls(), (torch.randn(2, 3, 4),))


class Treacherous(nn.Module):
    """Computes something else while it is traced, as a fast path for compilers may."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (2 if torch.compiler.is_compiling() else 1)


def test_a_trace_that_computes_something_else_is_refused() -> None:
    with pytest.raises(TraceError, match="the trace of Treacherous differs from the model: output 0 differs"):
        trace(Treacherous(), (torch.ones(2, 4),))


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Mlp(), None, "example_inputs are missing; Mlp is not a transformers model, so give them"),
        (Mlp(), {"y": torch.ones(2, 8)}, r"do not fit Mlp\.forward\(x, scale\): .*give a dict"),
        (Mlp(), (torch.ones(2, 8),) * 3, r"do not fit Mlp\.forward\(x, scale\): too many positional"),
        (Mlp(), {"x": 3}, "the example inputs of Mlp hold no tensor"),
        (Mlp(), (torch.ones(2, 5),), "cannot trace Mlp.*: "),
        ("bert", (), "cannot trace a str; give an nn.Module, GraphModule or ExportedProgram"),
    ],
)
def test_wrong_example_inputs(model: Any, inputs: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(model, inputs)


def test_a_model_with_pefts_adapters_is_refused() -> None:
    wrapped = peft.get_peft_model(tiny_model("bert"), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(TraceError, match=r"the PeftModel has PEFT's own adapters in it; save them .*from_pretrained"):
        trace(wrapped)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("bert", "translation", "unknown task 'translation'; take one of feature-extraction"),
        ("bert", "image-classification", "takes pixel_values, but BertForSequenceClassification takes input_ids"),
    ],
)
def test_wrong_tasks(name: str, task: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(source(name), task=task)


@pytest.mark.parametrize(
    ("name", "task"),
    [("llama", "text-classification"), ("bert", "token-classification"), ("bert", "text-generation")],
)
def test_a_task_of_another_head_is_refused(name: str, task: str) -> None:
    own = task_of_class(type(source(name)).__name__)
    with pytest.raises(TraceError, match=f"is a model for {own}, not for {task}; leave task out, or load"):
        trace(source(name), task=task)


def test_calls_that_do_not_fit_the_trace() -> None:
    batch = text_batch(2, 5)
    with pytest.raises(TraceError, match=r"input 'position_ids' was not part of the trace.*trace again"):
        traced("bert")(**batch, position_ids=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(TraceError, match="input 'input_ids' is missing"):
        traced("bert")(attention_mask=batch["attention_mask"])
    with pytest.raises(TraceError, match="input 'input_ids' was given twice"):
        traced("bert")(batch["input_ids"], input_ids=batch["input_ids"])
    with pytest.raises(TraceError, match=r"takes 3 inputs \(input_ids, attention_mask, token_type_ids\), but got 4"):
        traced("bert")(*[batch["input_ids"]] * 4)


def test_flags_of_the_eager_call_are_let_through() -> None:
    batch = text_batch(2, 5)
    assert torch.equal(
        run(traced("llama"), {**batch, "use_cache": False, "return_dict": True}), run(traced("llama"), batch)
    )


# -- warnings -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_a_model_that_checkpoints_is_as_it_was_and_without_blocks_the_trace_says_so() -> None:
    model = tiny_model("bert")
    model.gradient_checkpointing_enable()
    before = snapshot(model)["attributes"], [vars(module).get("gradient_checkpointing") for module in model.modules()]
    assert True in before[1]
    assert trace(model).checkpointing is not None
    with pytest.warns(UserWarning, match="gradient checkpointing is not part of a trace.*no blocks.*argument blocks"):
        assert trace(model, blocks=[]).checkpointing is None
    after = snapshot(model)["attributes"], [vars(module).get("gradient_checkpointing") for module in model.modules()]
    assert after == before


def test_layerdrop_is_said_to_vanish_and_comes_back() -> None:
    model = tiny_model("opt", layerdrop=0.5)
    with pytest.warns(UserWarning, match=r"layerdrop .*not part of a trace"):
        result = trace(model.train())
    assert model.config.layerdrop == 0.5
    inputs = text_batch(2, 6)
    assert relative_error(run(result.eval(), inputs), run(model.eval(), inputs)) < 1e-5


def test_a_trace_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("opt", num_hidden_layers=1)
    capfd.readouterr()
    trace(model)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# -- what a trace cannot hold -----------------------------------------------------------------------------------------


class BranchesOnRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.shape[0] > 2 else 2 * self.fc(x)


class LoopsOverPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.fc(x[:, position]) for position in range(x.shape[1])], dim=1)


@pytest.mark.parametrize(
    ("model", "shape"), [(BranchesOnRows(), (2, 8)), (LoopsOverPositions(), (2, 4, 8))], ids=["branch", "loop"]
)
def test_a_size_that_the_forward_branches_on_is_refused(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with pytest.raises(TraceError, match=r"is valid for the example's sizes only.*dynamic=False"):
        trace(model, (x,))
    fixed = trace(model, (x,), dynamic=False)
    assert torch.allclose(fixed(x), model(x), atol=1e-6)


class TakesFactor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        self.calls += 1
        return factor * self.fc(x)


def test_a_scalar_argument_is_part_of_the_trace() -> None:
    model, x = TakesFactor(), torch.randn(2, 8)
    scaled = trace(model, (x, 3.0))
    assert torch.allclose(scaled(x, 3.0), 3 * model.fc(x), atol=1e-6)
    with pytest.raises(TraceError, match=r"input 'factor' was 3.0 when the model was traced.*cannot be 5.0"):
        scaled(x, 5.0)


def test_tracing_leaves_buffers_as_they_are() -> None:
    model = TakesFactor()
    trace(model, (torch.randn(2, 8),))
    assert model.calls.item() == 0


class KeepsMask(nn.Module):
    """Keeps what its last call computed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.mask: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mask = torch.ones(x.shape[1], x.shape[1]).tril()
        y: torch.Tensor = self.fc(self.mask @ x)
        self.last = y.detach()
        return y


def test_a_model_that_keeps_what_it_computed_is_usable_after_a_trace() -> None:
    model, x = KeepsMask(), torch.randn(2, 5, 8)
    traced = trace(model, (x,))
    copied = copy.deepcopy(model)  # which holds nothing of the trace
    torch.testing.assert_close(traced(x), copied(x))
    assert type(copied.mask) is type(copied.last) is torch.Tensor


@pytest.mark.parametrize("inputs", [5, [1, 2], "text"])
def test_example_inputs_of_another_kind_are_refused(inputs: object) -> None:
    with pytest.raises(TraceError, match="give a dict or a tuple of arguments"):
        trace(nn.Linear(2, 2), inputs)  # type: ignore[arg-type]


def test_example_inputs_that_the_model_refuses_are_named() -> None:
    with pytest.raises(TraceError, match=r"cannot trace|itself fails on the example inputs"):
        trace(tiny_model("bert", num_hidden_layers=1), {"input_ids": torch.full((2, 5), 5000)})


def test_one_row_of_a_sequence_classifier_of_an_encoder_decoder() -> None:
    model = transformers.BartForSequenceClassification(
        tiny_model("bart", encoder_layers=1, decoder_layers=1).config
    ).eval()
    traced_model = trace(model)
    ids = torch.tensor([[5, 6, 7, 2]])
    assert relative_error(run(traced_model, {"input_ids": ids}), run(model, {"input_ids": ids})) < 1e-5


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("vit", torch.bfloat16), ("vit", torch.float64), ("whisper", torch.bfloat16), ("whisper", torch.float16)],
    ids=str,
)
def test_inputs_made_from_a_configuration_have_the_models_data_type(name: str, dtype: torch.dtype) -> None:
    base = trace(tiny_model(name, **ONE_LAYER[name]).to(dtype))
    features = {t.dtype for t in base.example_inputs.values() if t.is_floating_point()}
    assert features == {dtype}


def test_tracing_imports_no_other_models() -> None:
    """The exporter underneath has patches for models that are known not to trace, and would import dozens of them."""
    assert fresh_process().imported_by_trace == []


def test_the_patches_of_the_exporter_are_as_they_were() -> None:
    before = list(exporter_utils._PATCHES["dynamo"])
    trace(tiny_model("llama", num_hidden_layers=1))
    assert exporter_utils._PATCHES["dynamo"] == before
    assert any("models.sam3" in path for path, *_ in before)


def test_what_transformers_logs_about_its_own_losses_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("gpt2")  # whose class is not named after its loss
    transformers.utils.logging.warning_once.cache_clear()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    try:
        assert trace(model).loss_function is not None
    finally:
        logger.removeHandler(caplog.handler)
    assert "loss_type" not in caplog.text
