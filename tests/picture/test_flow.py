"""Data flow between sites: what is left when every other node is looked through."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from traces import traced

from gralora_fx import trace
from gralora_fx.picture.blocks import BlockMap
from gralora_fx.picture.facts import read_facts
from gralora_fx.picture.flow import Flow, condense


class Attention(nn.Module):
    """A residual block: two projections that meet, a third after them, a layer called twice, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.again, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        weights = (self.query(x) @ self.key(x).transpose(0, 1)).softmax(-1)
        x = x + self.out(weights @ x).reshape(rows, 8)
        x = self.norm(self.again(torch.relu(self.again(x))))
        return x.tanh()


def flow_of(model: object) -> Flow:
    facts = read_facts(model)  # type: ignore[arg-type]
    return condense(facts, BlockMap(facts.sites))


def test_edges_of_a_known_module() -> None:
    flow = flow_of(trace(Attention(), (torch.randn(3, 8),)))
    assert {(a.path, b.path) for a, b in flow.edges} == {
        ("x", "query"),
        ("x", "key"),
        ("query", "out"),
        ("key", "out"),
        ("out", "again"),  # not x -> out or x -> again: a longer way leads there
        ("again", "norm"),
        ("norm", "output"),
    }
    assert [item.path for item in flow.items][-1] == "idle"


def test_order_is_that_of_computation() -> None:
    flow = flow_of(traced("bert"))
    paths = [item.path for item in flow.items]
    index = paths.index
    assert index("input_ids") < index("bert.embeddings") < index("bert.encoder.layer.0.attention.self.query")
    assert index("bert.encoder.layer.1.output.dense") < index("bert.pooler.dense") < index("classifier")
    assert paths[-1] == "output"
    edges = {(a.path, b.path) for a, b in flow.edges}
    layer = "bert.encoder.layer.0"
    assert (f"{layer}.attention.self.value", f"{layer}.attention.output.dense") in edges
    assert (f"{layer}.attention.output.dense", "bert.encoder.layer.1.attention.self.query") not in edges


def test_an_encoder_of_speech_feeds_the_cross_attention_of_every_decoder_layer() -> None:
    edges = {(a.path, b.path) for a, b in flow_of(traced("whisper")).edges}
    for index in range(2):
        assert ("model.encoder.layer_norm", f"model.decoder.layers.{index}.encoder_attn.k_proj") in edges
        assert ("model.encoder.layer_norm", f"model.decoder.layers.{index}.self_attn.k_proj") not in edges


def test_layers_called_again_lead_back() -> None:
    flow = flow_of(traced("albert"))
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    edges = {(a.path, b.path) for a, b in flow.edges}
    assert (f"{layer}.ffn_output", f"{layer}.attention.query") in edges


def test_stacked_experts_take_part_once_a_plan_names_them() -> None:
    from gralora_fx import GraloraConfig, plan

    model = traced("mixtral")
    facts = read_facts(model, plan(model, GraloraConfig(r=4, target_modules=["q_proj"])))
    edges = {(a.path, b.path) for a, b in condense(facts, BlockMap(facts.sites)).edges}
    experts = "model.layers.0.mlp.experts"
    assert (f"{experts}.gate_up_proj", f"{experts}.down_proj") in edges
