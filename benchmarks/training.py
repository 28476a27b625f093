"""A training step on MiniLM, beside PEFT's GraLoRA and LoRA, and with other ways to add the adapter's output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, fx, nn

from benchmarks.harness import Case, Report, Table, measure, progress
from benchmarks.models import minilm
from gralora_fx import GraloraConfig, GraloraModel, TracedModel, rewrite, trace
from gralora_fx.core.methods.low_rank import accumulate

BATCH, LENGTH, RANK = 16, 64, 32


def run(iterations: int = 20) -> Report:
    """Compare whole steps: forward, backward and AdamW."""
    report = Report(
        "training", f"training: a step of MiniLM, batch {BATCH}x{LENGTH}, r={RANK}, all linear layers, fp32"
    )
    progress("training, MiniLM")
    torch.manual_seed(0)
    source = minilm().train()
    inputs = _inputs(source.config.vocab_size)
    lora = peft.LoraConfig(r=RANK, target_modules="all-linear")
    gralora = peft.GraloraConfig(r=RANK, gralora_k=2, target_modules="all-linear")
    theirs = {"PEFT GraLoRA": gralora, "PEFT LoRA": lora}
    models: dict[str, nn.Module] = {n: peft.get_peft_model(copy.deepcopy(source), c) for n, c in theirs.items()}
    traced = trace(source, inputs, task="feature-extraction")
    models["ours"] = _ours(traced)
    models |= {f"ours, {name}": _ours(traced, change) for name, change in VARIANTS.items()}
    cases = [Case(name, lambda step: step(), _stepper(model.train(), inputs)) for name, model in models.items()]
    timings = measure(cases, iterations=iterations)
    report.tables.append(Table("one step", [timings.row(case.name, "PEFT GraLoRA") for case in cases]))
    variants = [name for name in models if name.startswith("ours")]
    title = "ways to add the adapter's output to the layer's: ours is baddbmm in training, in place without gradients"
    report.tables.append(Table(title, [timings.row(name, "ours") for name in variants]))
    return report


def _inputs(vocabulary: int) -> dict[str, Tensor]:
    """A batch in which every fourth row is padded."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[::4, LENGTH * 3 // 4 :] = 0
    return {"input_ids": torch.randint(vocabulary, (BATCH, LENGTH)), "attention_mask": mask}


def _stepper(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Callable[[], Any]]:
    """Setup of a case: an optimizer over what trains, and a step with it."""

    def setup() -> Callable[[], Any]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            outputs = model(**inputs)
            loss = outputs.last_hidden_state.square().mean() + outputs.pooler_output.square().mean()
            loss.backward()
            optimizer.step()

        return step

    return setup


def _ours(traced: TracedModel, change: Callable[[fx.Graph, fx.Node], fx.Node] | None = None) -> GraloraModel:
    """A rewritten model, every accumulation into the layer's output replaced by `change`."""
    model = rewrite(traced, GraloraConfig(r=RANK, gralora_k=2, target_modules="all-linear"))
    graph = model.graph_module.graph
    for node in list(graph.find_nodes(op="call_function", target=accumulate)) if change else []:
        with graph.inserting_before(node):
            node.replace_all_uses_with(change(graph, node))  # type: ignore[misc]
        graph.erase_node(node)
    graph.lint()
    model.graph_module.recompile()
    return model


def _in_place(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """`baddbmm_` into the layer's output, as without gradients."""
    return graph.call_method("baddbmm_", node.args[:3], {"alpha": node.args[3]})


def _add(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """`bmm`, then `add` with a factor."""
    product = graph.call_function(torch.bmm, node.args[1:3])
    return graph.call_function(torch.add, (node.args[0], product), {"alpha": node.args[3]})


def _scaled_add(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """`bmm` of scaled hidden values, then `add`: no tensor of the output's size is scaled, in backward either."""
    hidden = graph.call_function(torch.mul, (node.args[1], node.args[3]))
    product = graph.call_function(torch.bmm, (hidden, node.args[2]))
    return graph.call_function(torch.add, (node.args[0], product))


VARIANTS = {"in place": _in_place, "bmm and add": _add, "bmm of scaled and add": _scaled_add}
