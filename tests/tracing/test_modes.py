"""`train()` and `eval()` of a trace do what the source model's do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import text_batch, tiny_model
from torch import Tensor, nn
from traces import fresh_trace, relative_error, run

from gralora_fx import GraloraConfig, TracedModel, rewrite, trace

aten = torch.ops.aten
DROPOUT, SDPA = aten.dropout.default, aten.scaled_dot_product_attention.default


def arguments(traced: TracedModel) -> tuple[list[tuple[float, bool]], list[float]]:
    """Probability and flag of every dropout, and the probability of every attention."""
    nodes = list(traced.graph_module.graph.nodes)
    dropouts = [(node.args[1], node.args[2]) for node in nodes if node.target is DROPOUT]
    attentions = [node.args[4] if len(node.args) > 4 else 0.0 for node in nodes if node.target is SDPA]
    return dropouts, attentions


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_attention_dropout_switch(training: bool) -> None:
    sizes = {"num_hidden_layers": 1, "attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.3}
    traced = trace(tiny_model("bert", **sizes).train(training))
    assert traced.training is training
    for mode in (True, False, True):
        assert traced.train(mode) is traced
        dropouts, attentions = arguments(traced)
        assert attentions == [0.2 * mode]
        assert {p for p, _ in dropouts} == {0.3}
        assert {flag for _, flag in dropouts} == {mode}


def test_switching_to_and_fro_gives_the_same_graph_and_values() -> None:
    traced = fresh_trace("bert", attention_probs_dropout_prob=0.2)
    inputs = text_batch(2, 6)
    text, expected = str(traced.graph_module.graph), run(traced, inputs)
    traced.train()
    assert str(traced.graph_module.graph) != text
    assert not torch.equal(run(traced, inputs), run(traced, inputs))
    traced.eval()
    assert str(traced.graph_module.graph) == text
    assert torch.equal(run(traced, inputs), expected)


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.3, "num_hidden_layers": 1}),
        ("bert", {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 1}),
        ("opt", {"dropout": 0.3, "attention_dropout": 0.3, "num_hidden_layers": 1}),
        ("llama", {"attention_dropout": 0.3, "num_hidden_layers": 1}),
        ("gpt2", {"attn_pdrop": 0.3, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "n_layer": 1}),
        ("t5", {"dropout_rate": 0.3, "num_layers": 1}),
    ],
)
def test_training_noise_has_the_eager_models_size(name: str, off: dict[str, float]) -> None:
    """The spread of the outputs over many draws, which a lost dropout makes smaller."""
    model = tiny_model(name, **off)
    traced = trace(model)
    inputs = {key: value.repeat(400, 1) for key, value in text_batch(1, 6).items()}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]

    def spread(call: Any) -> Tensor:
        torch.manual_seed(0)
        return run(call, inputs).std(dim=0).mean()

    model.train()
    traced.train()
    assert spread(traced) > 0
    assert spread(traced) == pytest.approx(spread(model).item(), rel=0.15)
    model.eval()
    assert relative_error(run(traced.eval(), inputs), run(model, inputs)) < 1e-5


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


def test_batch_statistics_count_in_training_only() -> None:
    torch.manual_seed(0)
    ours, theirs = Normed(), Normed()
    theirs.load_state_dict(ours.state_dict())
    traced = trace(ours.eval(), (torch.randn(5, 4),))
    assert ours.norm.num_batches_tracked == 0
    x = torch.randn(7, 4)
    assert torch.allclose(traced(x), theirs.eval()(x), atol=1e-6)
    assert ours.norm.num_batches_tracked == 0
    traced.train()
    theirs.train()
    assert torch.allclose(traced(x), theirs(x), atol=1e-6)
    for name, buffer in theirs.norm.named_buffers():
        assert torch.allclose(ours.norm.get_buffer(name), buffer), name
    traced.eval()
    assert torch.allclose(traced(x), theirs.eval()(x), atol=1e-6)
    assert ours.norm.num_batches_tracked == 1


def test_a_rewritten_model_switches_adapter_dropout_too() -> None:
    traced = trace(tiny_model("bert", num_hidden_layers=1, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0))
    config = GraloraConfig(r=8, target_modules={"query"}, gralora_dropout=0.5, init_weights=False)
    model = rewrite(traced, config)
    inputs = text_batch(2, 6)
    assert not model.training
    expected = run(model, inputs)
    assert torch.equal(run(model, inputs), expected)
    assert model.train() is model
    assert not torch.equal(run(model, inputs), run(model, inputs))
    model.eval()
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_rewritten_model_starts_in_the_mode_of_the_trace(training: bool) -> None:
    traced = trace(tiny_model("bert", num_hidden_layers=1, attention_probs_dropout_prob=0.2).train(training))
    model = rewrite(traced, GraloraConfig(r=8, target_modules={"query"}, gralora_dropout=0.5))
    assert model.training is training
    nodes = [node for node in model.graph_module.graph.nodes if node.target in (SDPA, torch.nn.functional.dropout)]
    flags = {node.args[4] > 0 if node.target is SDPA else node.kwargs["training"] for node in nodes}
    assert flags == {training}


def test_the_trace_keeps_its_own_mode_when_the_rewritten_model_switches() -> None:
    traced = fresh_trace("bert", attention_probs_dropout_prob=0.2)
    model = rewrite(traced, GraloraConfig(r=8, target_modules={"query"}))
    model.train()
    assert arguments(traced)[1] == [0.0, 0.0]
    assert not traced.training


def test_noise_of_training_is_not_part_of_evaluation() -> None:
    """Noise that rarely changes a result shows no difference on a sample; the trace must not have it all the same."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.gate(x)
            noise = torch.empty_like(scores).exponential_() * 1e-9 if self.training else 0.0
            return (scores + noise).argmax(-1)

    with pytest.warns(
        UserWarning, match=r"itself \(Router\) differs in training \(it draws random numbers \(aten.exponential_"
    ):
        traced = trace(Router(), (torch.randn(3, 8),))
    assert not any("exponential" in str(node.target) for node in traced.graph_module.graph.nodes)


def test_dropout_that_is_not_told_the_mode_is_on_in_both() -> None:
    class Sampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(self.inner(x), 0.5, training=True)

    x = torch.randn(4, 8)
    with pytest.warns(UserWarning, match="in evaluation too"):
        traced = trace(Sampled().eval(), (x,))
    model = rewrite(traced, GraloraConfig(r=4, target_modules=["inner"]))
    for mode in (False, True):
        assert not torch.equal(model.train(mode)(x), model(x))
