"""An adapter a row: rows of one batch with adapters of their own, equal to each run alone and to PEFT's."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import text_batch
from torch import Tensor, fx, nn
from traces import fresh, fresh_trace
from transformers import SwinConfig, SwinForImageClassification

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.core.adapters.fuse_linears import adapted_linear
from gralora_fx.errors import ConfigError, RewriteError, TraceError

ROWS = ["gralora", "dora", "__base__", "lora", "gralora", "hybrid"]  # not in order
IN_ORDER = ["__base__", "dora", "gralora", "gralora", "hybrid", "lora"]


SEEN: list[Tensor] = []


def remember(value: Tensor) -> None:
    SEEN.append(value.clone())


def configs(*saved: str, dropout: float = 0.0) -> dict[str, Any]:
    """Adapters of every method; those of GraLoRA and LoRA train modules whole, too."""
    lora = {"target_modules": "all-linear", "init_lora_weights": False, "lora_dropout": dropout}
    gralora = {"target_modules": "all-linear", "init_weights": False, "gralora_dropout": dropout}
    return {
        "gralora": GraloraConfig(r=4, modules_to_save=list(saved) or None, **gralora),
        "hybrid": GraloraConfig(r=4, hybrid_r=2, **gralora),
        "lora": LoraConfig(r=4, modules_to_save=list(saved) or None, **lora),
        "dora": DoraConfig(r=4, **lora),
    }


def with_adapters(traced: Any, *saved: str, dropout: float = 0.0) -> GraloraModel:
    torch.manual_seed(0)
    first, *others = configs(*saved, dropout=dropout).items()
    model = rewrite(traced, first[1], adapter_name=first[0])
    for name, config in others:
        model.add_adapter(name, config)
    with torch.no_grad():
        for name in model.configs:
            for parameter in model.adapter(name).parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def alone(model: GraloraModel, name: str, run: Any) -> Any:
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


def of_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in batch.items()}


@pytest.mark.parametrize(
    ("name", "saved", "rows"),
    [
        ("llama", "lm_head", ROWS),
        ("llama", "lm_head", IN_ORDER),
        ("bert", "classifier", ROWS),
        ("t5", "", IN_ORDER),
        ("gpt2", "", ROWS),
        ("vit", "classifier", IN_ORDER),
    ],
)
def test_a_row_is_what_its_adapter_gives_alone(name: str, saved: str, rows: list[str]) -> None:
    model = with_adapters(fresh_trace(name), *filter(None, [saved])).eval()
    batch: dict[str, Any] = text_batch(6) if name != "vit" else {"pixel_values": torch.randn(6, 3, 16, 16)}
    if name == "t5":
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            together = model(**batch, adapter_names=rows).logits
            for row, adapter in enumerate(rows):
                expected = alone(model, adapter, lambda row=row: model(**of_row(batch, row))).logits
                torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_layers_that_read_windows_of_every_row_have_adapters_by_row_too() -> None:
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    torch.manual_seed(0)
    model = with_adapters(trace(SwinForImageClassification(SwinConfig(**sizes, window_size=4)).eval())).eval()
    batch = {"pixel_values": torch.randn(6, 3, 32, 32)}
    together = model(**batch, adapter_names=ROWS).logits
    for row, adapter in enumerate(ROWS):
        expected = alone(model, adapter, lambda row=row: model(**of_row(batch, row))).logits
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_lora_rows_are_pefts_in_a_forward_and_in_generate_with_beams(tmp_path: Path) -> None:
    source, traced = fresh("llama", task="text-generation-with-past")
    sizes: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(source), peft.LoraConfig(**sizes), adapter_name="one")
    theirs.add_adapter("two", peft.LoraConfig(**sizes))
    theirs.save_pretrained(str(tmp_path))
    ours = GraloraModel.from_pretrained(traced, tmp_path / "one", adapter_name="one").eval()
    ours.load_adapter(tmp_path / "two", "two")
    batch, rows = text_batch(4, padding="left"), ["two", "__base__", "one", "two"]
    theirs.eval()
    with torch.no_grad():
        expected = theirs(**batch, adapter_names=rows).logits
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(ours(**batch, adapter_names=rows).logits[mask], expected[mask])
    for options in ({}, {"num_beams": 3}):
        options = {
            **batch,
            "adapter_names": rows,
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
            **options,
        }
        assert torch.equal(ours.generate(**options), theirs.generate(**options))


def test_rows_of_an_encoder_decoder_generate_what_each_does_alone() -> None:
    sizes: dict[str, Any] = {"decoder_start_token_id": 0, "num_layers": 1}
    model = with_adapters(fresh_trace("t5", task="text2text-generation-with-past", **sizes)).eval()
    batch, options = text_batch(6), {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    together = model.generate(**batch, adapter_names=ROWS, **options)
    for row, adapter in enumerate(ROWS):
        expected = alone(model, adapter, lambda row=row: model.generate(**of_row(batch, row), **options))[0]
        assert together[row, : len(expected)].tolist() == expected.tolist()


def train(model: GraloraModel, steps: int, losses: Any) -> dict[str, Tensor]:
    """Train each adapter by an optimizer of its own; how each one ends."""
    names = list(model.configs)
    optimizers = {
        n: torch.optim.SGD(model.adapter(n).parameters(), lr=0.002 / (1 + i), momentum=0.9) for i, n in enumerate(names)
    }
    for step in range(steps):
        torch.manual_seed(step)
        ids = torch.randint(3, 100, (2 * len(names), 7))
        losses(model, names, ids)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    return {key: p.detach().clone() for n in names for key, p in model.adapter(n).named_parameters()}


def by_row(model: GraloraModel, names: list[str], ids: Tensor) -> None:
    rows = [name for name in names for _ in range(2)]
    sum(model.losses_by_adapter(input_ids=ids, labels=ids, adapter_names=rows).values()).backward()  # type: ignore[union-attr]


def one_by_one(model: GraloraModel, names: list[str], ids: Tensor) -> None:
    for index, name in enumerate(names):
        own = ids[2 * index : 2 * index + 2]
        model.set_adapter(name)
        model(input_ids=own, labels=own).loss.backward()


@pytest.mark.parametrize(("name", "checkpoints"), [("llama", False), ("llama", True), ("t5", False)])
def test_adapters_trained_in_one_batch_end_as_each_trained_alone(name: str, checkpoints: bool) -> None:
    options: dict[str, Any] = {
        "decoder_start_token_id": 0,
        "dtype": torch.float64,
        **({"num_layers": 1} if name == "t5" else {}),
    }  # differences of float32 grow by the step
    together, apart = (with_adapters(fresh_trace(name, **options), "lm_head").train() for _ in range(2))
    together.dropout.p = apart.dropout.p = 0.0
    if checkpoints:
        together.gradient_checkpointing_enable()
    together.set_requires_grad(list(together.configs))
    expected = train(apart, 4, one_by_one)
    for key, tensor in train(together, 4, by_row).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6)


def test_mixed_rows_of_a_classifier_have_the_losses_of_each_alone() -> None:
    model = with_adapters(fresh_trace("bert"), "classifier").train()
    model.set_requires_grad(list(model.configs))
    model.dropout.p = 0.0
    batch, labels = text_batch(6), torch.tensor([0, 1, 1, 0, 1, 1])
    losses = model.losses_by_adapter(**batch, labels=labels, adapter_names=ROWS)
    assert set(losses) == {*ROWS} - {"__base__"}
    for name, loss in losses.items():
        rows = [row for row, adapter in enumerate(ROWS) if adapter == name]
        own = {key: value[rows] for key, value in batch.items()}
        torch.testing.assert_close(loss, alone(model, name, lambda o=own, r=rows: model(**o, labels=labels[r])).loss)


@pytest.mark.parametrize("rows", [ROWS, IN_ORDER], ids=["mixed", "in order"])
def test_the_nodes_of_training_give_the_flat_graphs_gradients(rows: list[str]) -> None:
    model = with_adapters(fresh_trace("llama")).train()
    model.set_requires_grad(list(model.configs))
    rows = [name if name != "dora" else "lora" for name in rows]
    state = model._state
    batch = text_batch(6)

    def gradients(run: Any) -> dict[str, Tensor]:
        model.zero_grad()
        run(**batch, adapter_names=rows)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    joined = gradients(model)
    made = next(graph for graph in state._cache._graphs.values() if graph.state.by_row)
    modules = [module for module in made.running.modules() if isinstance(module, fx.GraphModule)]
    nodes = [n for m in modules for n in m.graph.find_nodes(op="call_function", target=adapted_linear)]
    assert any(len(node.args[4]) == 4 and node.args[-1] is not None for node in nodes)  # q, k and v, of four entries
    made.__dict__["_training_passes"] = lambda: ()
    made._running = made._new_running(made.flat.module)
    made._forms = {}
    flat = gradients(model)
    assert flat.keys() == joined.keys()
    for key, gradient in joined.items():
        torch.testing.assert_close(gradient, flat[key], rtol=1e-4, atol=1e-6)


def test_dropout_half_precision_and_compiled_runs_take_rows() -> None:
    model = with_adapters(fresh_trace("llama", num_hidden_layers=1), dropout=0.5)
    batch = text_batch(6)
    model.eval()
    expected = model(**batch, adapter_names=ROWS).logits
    compiled: Any = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch, adapter_names=ROWS).logits, expected, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(model).to(torch.bfloat16)
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(
        half(**batch, adapter_names=ROWS).logits[mask].float(), expected[mask], rtol=0.1, atol=0.1
    )
    model.train()
    first, second = (model(**batch, adapter_names=ROWS).logits for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])  # of the base, where nothing drops


def test_a_pass_that_reads_a_layers_own_output_still_sees_it() -> None:
    model = with_adapters(fresh_trace("llama")).eval()
    expected = model(**text_batch(6), adapter_names=IN_ORDER).logits.detach()
    SEEN.clear()

    def probes(graph_module: fx.GraphModule) -> None:
        node = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
        after = graph_module.graph.output_node()
        with graph_module.graph.inserting_before(after):
            graph_module.graph.call_function(remember, (node,))

    model.add_pass(probes)
    with torch.no_grad():
        assert torch.allclose(model(**text_batch(6), adapter_names=IN_ORDER).logits, expected, atol=1e-6)
        with model.disable_adapter():
            model(**text_batch(6))
    torch.testing.assert_close(SEEN[0], SEEN[1])


def test_disabled_adapters_are_the_bases_in_every_row_and_the_signature_keeps_the_column_of_names() -> None:
    model = with_adapters(fresh_trace("llama")).eval()
    with model.disable_adapter():
        expected = model(**text_batch(6)).logits
        assert torch.equal(model(**text_batch(6), adapter_names=ROWS).logits, expected)
    assert torch.equal(model(**text_batch(6), adapter_names=["__base__"] * 6).logits, expected)
    assert "adapter_names" in inspect.signature(model.forward).parameters


def test_wrong_names_are_one_error_each() -> None:
    model = with_adapters(fresh_trace("llama")).eval()
    batch = text_batch(6)
    with pytest.raises(RewriteError, match=r"no adapter 'nobody'; there are gralora, hybrid, lora, dora"):
        model(**batch, adapter_names=["nobody"] * 6)
    with pytest.raises(RewriteError, match=r"the batch has 6 rows, and 2 names are given"):
        model(**batch, adapter_names=["lora", "dora"])
    with pytest.raises(RewriteError, match=r"for each row .* but got 'lora'"):
        model(**batch, adapter_names="lora")
    with pytest.raises(RewriteError, match=r"need labels"):
        model.losses_by_adapter(**batch, adapter_names=ROWS)
    with pytest.raises(RewriteError, match=r"adapter 'hybrid' does not train.*set_requires_grad\(\['hybrid'\]\)"):
        model.train().losses_by_adapter(**batch, labels=batch["input_ids"], adapter_names=["hybrid"] * 6)
    with pytest.raises(ConfigError, match=r"'__base__' names rows without an adapter"):
        model.add_adapter("__base__", LoraConfig(r=4, target_modules=["q_proj"]))
    model.eval()
    with pytest.raises(RewriteError, match=r"no record of its shapes"):
        pickle.loads(pickle.dumps(model))(**batch, adapter_names=ROWS)
    model.add_adapter("biased", LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    with pytest.raises(RewriteError, match=r"'biased', which trains the base's biases"):
        rewrite(fresh_trace("bert"), LoraConfig(r=4, target_modules=["query"], bias="all"), adapter_name="biased")(
            **batch, adapter_names=["biased"] * 6
        )


@pytest.mark.parametrize(
    ("name", "saved"), [("gpt2", "transformer.h.0.mlp"), ("bart", "model.decoder"), ("albert", "classifier")]
)
def test_whole_modules_with_dropout_masks_or_shared_layers_are_computed_by_row(name: str, saved: str) -> None:
    torch.manual_seed(0)
    traced = fresh_trace(name, dtype=torch.float64)
    model = rewrite(traced, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), adapter_name="one")
    targets = [site.path for site in traced.sites if saved not in site.path]
    model.add_adapter("two", LoraConfig(r=4, target_modules=targets, modules_to_save=[saved]))
    with torch.no_grad():
        for parameter in model.adapter("two").parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval()
    batch: dict[str, Any] = text_batch(4)
    if name == "bart":
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    rows = ["__base__", "two", "one", "two"]
    together = model(**batch, adapter_names=rows)[0]
    for row, adapter in enumerate(rows):
        expected = alone(model, adapter, lambda row=row: model(**of_row(batch, row)))[0]
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-9, atol=1e-9)


class Chained(nn.Module):
    """Adapted layers that read each other directly, of which a third is read by code outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.third = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x))) @ self.third.weight


def chained(*saved: str) -> GraloraModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"r": 2, "init_lora_weights": False}
    traced = trace(Chained().eval(), example_inputs={"x": torch.randn(4, 8)})
    model = rewrite(traced, LoraConfig(target_modules=["first", "second.0"], **sizes), adapter_name="one")
    for index, module in enumerate(saved):
        model.add_adapter(f"saves{index}", LoraConfig(target_modules=["first"], modules_to_save=[module], **sizes))
    model.add_adapter("two", LoraConfig(target_modules=["first", "third"], **sizes))
    return model.eval()


def test_a_layer_that_reads_another_adapted_one_gets_its_rows() -> None:
    model, x, rows = chained(), torch.randn(4, 8), ["two", "one", "__base__", "two"]
    together = model(x=x, adapter_names=rows)
    for row, adapter in enumerate(rows):
        expected = alone(model, adapter, lambda row=row: model(x=x[row : row + 1]))
        torch.testing.assert_close(together[row : row + 1], expected)


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        (["second"], "second, which updates buffers of the base"),
        (["third"], r"third, whose third\.weight other code reads too"),
        (["second", "second.0"], r"has second, and of another second\.0 within it"),
    ],
)
def test_whole_modules_that_cannot_be_by_row_are_refused_by_name(saved: list[str], problem: str) -> None:
    model = chained(*saved)
    with pytest.raises(RewriteError, match=problem):
        model(
            x=torch.randn(4, 8), adapter_names=[*(f"saves{i}" for i in range(len(saved))), *["two"] * (4 - len(saved))]
        )


def test_rows_have_the_bases_own_weights_while_another_adapter_is_merged() -> None:
    model = with_adapters(fresh_trace("llama")).eval()
    expected = model(**text_batch(6), adapter_names=ROWS).logits
    model.set_adapter("lora")
    model.merge_adapter()
    assert torch.equal(model(**text_batch(6), adapter_names=ROWS).logits, expected)
    model.unmerge_adapter()


def test_generate_checks_the_names_of_its_rows() -> None:
    model = with_adapters(fresh_trace("llama", task="text-generation-with-past")).eval()
    prompts = text_batch(6, padding="left")
    with pytest.raises(RewriteError, match=r"the batch has 6 rows, and 2 names are given"):
        model.generate(**prompts, adapter_names=["lora", "dora"], max_new_tokens=2)
    with pytest.raises(TraceError, match=r"guidance_scale beside adapter_names"):
        model.generate(**prompts, adapter_names=ROWS, guidance_scale=2.0, max_new_tokens=2)
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": True, "num_return_sequences": 2, "pad_token_id": 0}
    assert model.generate(prompts["input_ids"], adapter_names=ROWS, **options).shape[0] == 12


def test_stacked_experts_are_refused_by_name() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    model = rewrite(fresh_trace("mixtral"), config).eval()
    with pytest.raises(RewriteError, match=r"'default', which adapts model\.layers\.0\.mlp\.experts\.down_proj"):
        model(**text_batch(2), adapter_names=["default", "__base__"])
