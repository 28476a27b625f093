"""`rewrite` and `GraloraModel`: what is in the graph, what trains, and that nothing is ever half done."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_oracle import peft_model, trainable_gradients
from tiny_models import text_batch, tiny_model
from torch import Tensor, nn
from traces import fresh, fresh_trace, inputs_of, relative_error, run, traced

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, plan, rewrite, trace
from gralora_fx.core.adapters.checkpoint import checkpoint_parameters
from gralora_fx.core.methods.registry import GRALORA
from gralora_fx.errors import ConfigError, MergeError, RewriteError, TargetError

QUERY = {"r": 8, "target_modules": ["query"], "init_weights": False}


def adapted(name: str = "bert", seed: int = 1, **fields: Any) -> GraloraModel:
    """Return a rewritten tiny model whose adapter does something."""
    torch.manual_seed(seed)
    return rewrite(traced(name), GraloraConfig(**{**QUERY, "target_modules": "all-linear", **fields}))


def text(model: GraloraModel | TracedModel) -> str:
    return str(model.graph_module.graph)


def structure(model: GraloraModel) -> list[tuple[str, str, str]]:
    """Return a graph without the names of its nodes, which count on when an adapter goes out and in again."""
    numbers: dict[Any, str] = {}
    entries = []
    for node in model.graph_module.graph.nodes:
        numbers[node] = f"%{len(numbers)}"
        arguments = torch.fx.map_arg((node.args, dict(node.kwargs)), numbers.__getitem__)
        entries.append((node.op, node.name if node.op == "placeholder" else str(node.target), repr(arguments)))
    return entries


# -- what rewrite does --------------------------------------------------------------------------------------------


def test_an_untrained_adapter_changes_nothing() -> None:
    model = rewrite(traced("bert"), GraloraConfig(r=8, hybrid_r=4, target_modules="all-linear"))
    inputs = inputs_of("bert")
    assert torch.equal(run(model, inputs), run(traced("bert"), inputs))


def test_every_new_node_is_marked_and_the_rest_is_the_base() -> None:
    base = traced("bert")
    model = adapted()
    paths = {entry.site.path for entry in model.plans["default"].selected}
    base_names = [node.name for node in base.graph_module.graph.nodes]
    marked = {}
    for node in model.graph_module.graph.nodes:
        mark = node.meta.get("custom", {}).get("gralora")
        if node.name in base_names:
            assert mark is None
        else:
            assert mark is not None, node.name
            assert mark["adapter"] == "default"
            marked.setdefault(mark["site"], []).append(node)
    assert marked.keys() == paths
    model.graph_module.graph.lint()


def test_a_layer_called_twice_has_one_adapter_at_two_calls() -> None:
    model = adapted("albert", target_modules=["query"])
    marks = [node.meta["custom"]["gralora"] for node in model.graph_module.graph.nodes if is_marked(node)]
    assert {mark["site"] for mark in marks} == {"albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"}
    assert len({mark["call"] for mark in marks}) == 2
    assert len(checkpoint_parameters(model.adapter("default"))) == 2


def is_marked(node: Any) -> bool:
    return "gralora" in node.meta.get("custom", {})


def test_the_trace_keeps_its_own_graph() -> None:
    base = traced("bert")
    before = text(base)
    adapted()
    assert text(base) == before
    assert not any(is_marked(node) for node in base.graph_module.graph.nodes)


def test_a_plan_is_carried_out_as_it_stands() -> None:
    prepared = plan(traced("bert"), GraloraConfig(r=8, target_modules=["key"]))
    model = rewrite(traced("bert"), prepared, adapter_name="mine")
    assert model.plans == {"mine": prepared}
    assert model.active_adapters == ["mine"]


def test_a_plan_of_another_model_is_refused() -> None:
    other = plan(fresh_trace("bert", seed=1), GraloraConfig(r=8, target_modules=["key"]))
    with pytest.raises(RewriteError, match="of the plan is not a site of this model; plan it again"):
        rewrite(traced("bert"), other)


@pytest.mark.parametrize("name", ["", "a.b", "forward", 3, "train"])
def test_bad_adapter_names(name: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name!r} cannot name an adapter; use letters, digits"):
        rewrite(traced("bert"), GraloraConfig(**QUERY), adapter_name=name)


def test_a_peft_object_is_not_a_configuration_here() -> None:
    import peft

    with pytest.raises(ConfigError, match=r"not peft's GraloraConfig .*; convert it with GraloraConfig\.from_peft"):
        rewrite(traced("bert"), peft.GraloraConfig(**QUERY))  # type: ignore[arg-type]


# -- atomic -------------------------------------------------------------------------------------------------------


def fail_at_the_last_site(monkeypatch: pytest.MonkeyPatch, sites: int) -> None:
    """Let the insertion of the last of so many sites raise."""
    add_output, count = type(GRALORA).add_output, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == sites:
            raise RewriteError("the last site cannot be rewritten")
        return add_output(*args, **kwargs)

    monkeypatch.setattr(type(GRALORA), "add_output", failing)


@pytest.mark.quick
def test_an_error_at_the_last_site_leaves_the_trace_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    source, base = fresh("bert")
    source.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = text(base), base.graph_module.code
    flags = {name: p.requires_grad for name, p in source.named_parameters()}
    values = {name: (id(p), p.detach().clone()) for name, p in source.named_parameters()}
    names = [name for name, _ in base.graph_module.named_parameters()]
    config = GraloraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"], bias="all")
    fail_at_the_last_site(monkeypatch, 4)
    with pytest.raises(RewriteError, match="the last site cannot be rewritten"):
        rewrite(base, config)
    assert (text(base), base.graph_module.code) == before
    assert {name: p.requires_grad for name, p in source.named_parameters()} == flags
    assert [name for name, _ in base.graph_module.named_parameters()] == names
    for name, parameter in source.named_parameters():
        assert id(parameter) == values[name][0]
        assert torch.equal(parameter, values[name][1])
    monkeypatch.undo()
    assert rewrite(base, config).active_adapters == ["default"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"target_modules": ["absent"]}, TargetError),
        ({"target_modules": ["query", "classifier"], "gralora_k": 4}, TargetError),
        ({"target_modules": ["query"], "layers_to_transform": [9]}, TargetError),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_met_leaves_the_trace_as_it_was(fields: dict[str, Any], error: type) -> None:
    source, base = fresh("bert")
    before = text(base)
    with pytest.raises(error):
        rewrite(base, GraloraConfig(r=8, **fields))
    assert text(base) == before
    assert all(parameter.requires_grad for parameter in source.parameters())


def test_a_failed_first_or_second_adapter_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(target_modules=["query"])
    model.add_adapter("other", GraloraConfig(**{**QUERY, "target_modules": ["query", "key"]}))
    before = text(model), list(model.configs), sorted(dict(model.named_parameters()))
    inputs = inputs_of("bert")
    expected = run(model, inputs)
    with pytest.raises(TargetError):
        model.add_adapter("third", GraloraConfig(r=8, target_modules=["absent"]))
    with pytest.raises(ConfigError, match="adapter 'other' exists already; delete it first or take another name"):
        model.add_adapter("other", GraloraConfig(r=8, target_modules=["key"]))
    assert (text(model), list(model.configs), sorted(dict(model.named_parameters()))) == before
    fail_at_the_last_site(monkeypatch, 4)
    with pytest.raises(RewriteError, match="the last site"):
        model.set_adapter("other")
    monkeypatch.undo()
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model, inputs), expected)
    model.set_adapter("other")
    assert model.active_adapters == ["other"]


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear", "hybrid_r": 4},
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        {"target_modules": ["query"], "bias": "gralora_only"},
        {"target_modules": ["query"], "bias": "all"},
    ],
    ids=str,
)
def test_only_the_adapters_tensors_train(fields: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(**fields)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.startswith("graph_module.gralora.default.") for name in trainable)
    assert not any(p.requires_grad for p in model.traced.tree.parameters.values())
    count, total = model.get_nb_trainable_parameters()
    theirs = peft_model(tiny_model("bert"), r=8, **fields)
    assert count == theirs.get_nb_trainable_parameters()[0] == model.plans["default"].trainable_parameters
    assert total == model.plans["default"].total_parameters
    capsys.readouterr()
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {count:,} || all params: {total:,} || trainable%: {100 * count / total:.4f}\n"
    )


FIELDS = {"target_modules": "all-linear", "r": 8, "hybrid_r": 4, "alpha": 24}


def same_adapters(name: str, tmp_path: Any, **fields: Any) -> tuple[GraloraModel, Any]:
    """One adapter, in our model and in PEFT's."""
    theirs = peft_model(tiny_model(name), **FIELDS, **fields)
    theirs.save_pretrained(str(tmp_path))
    ours = GraloraModel.from_pretrained(fresh_trace(name), tmp_path)
    return ours, theirs


def loss_of(outputs: Any) -> Tensor:
    return outputs.logits.float().square().mean()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "opt", "t5", "vit", "albert", "falcon"])
def test_gradients_and_a_step_are_pefts(name: str, tmp_path: Any) -> None:
    ours, theirs = same_adapters(name, tmp_path)
    for parameter in theirs.parameters():
        parameter.requires_grad_(False)
    for key, parameter in theirs.named_parameters():
        parameter.requires_grad_("gralora_" in key)
    inputs = inputs_of(name)
    loss_of(ours(**inputs)).backward()
    loss_of(theirs(**inputs)).backward()
    expected = trainable_gradients(theirs)
    own = checkpoint_parameters(ours.adapter("default"))
    assert own.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        assert relative_error(own[key].grad, gradient) < 1e-4, key
    for parameters in (ours.parameters(), theirs.parameters()):
        torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1).step()
    inputs = inputs_of(name, 2, 5)
    assert relative_error(run(ours, inputs), run(theirs, inputs)) < 1e-5


def test_training_moves_the_adapter_only() -> None:
    source, base = fresh("bert")
    model = rewrite(base, GraloraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS", bias="all"))
    before = {name: p.detach().clone() for name, p in source.named_parameters()}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    inputs, labels = text_batch(4, 8), torch.tensor([0, 1, 0, 1])
    losses = []
    for _ in range(40):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(before[name], p) for name, p in source.named_parameters())
    assert torch.equal(run(model.unload().eval(), inputs), run(source, inputs))


# -- losses -------------------------------------------------------------------------------------------------------


def labels_of(name: str) -> dict[str, Tensor]:
    if name in ("bert", "vit", "distilbert", "roberta"):
        return {"labels": torch.tensor([0, 1, 1])}
    inputs = inputs_of(name)
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids")).clone()
    ids[:, -2:] = -100
    return {"labels": ids}


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "vit", "gpt2", "llama", "opt", "t5", "bart", "whisper"]
)
def test_the_loss_is_the_eager_models(name: str) -> None:
    source, base = fresh(name, **({"num_layers": 1, "decoder_start_token_id": 0} if name == "t5" else {}))
    model = rewrite(base, GraloraConfig(r=8, target_modules="all-linear"))
    inputs = {key: value for key, value in inputs_of(name).items() if not key.startswith("decoder")}
    labels = labels_of(name)
    expected = source(**inputs, **labels)
    actual = model(**inputs, **labels)
    assert type(actual) is type(expected)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert relative_error(actual.logits, expected.logits) < 1e-5


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("QuestionAnswering", {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 20])}),
        ("TokenClassification", {"labels": torch.tensor([[0, 1, -100, 1, 0, 1]] * 2)}),
        ("MaskedLM", {"labels": torch.tensor([[5, -100, -100, 9, 10, 2]] * 2)}),
    ],
)
def test_the_loss_of_other_heads(head: str, labels: dict[str, Tensor]) -> None:
    config = tiny_model("bert", num_hidden_layers=1).config
    torch.manual_seed(0)
    source = getattr(transformers, f"BertFor{head}")(config).eval()
    model = rewrite(trace(source), GraloraConfig(r=8, target_modules=["query"]))
    inputs = text_batch(2, 6)
    assert model(**inputs, **labels).loss.item() == pytest.approx(source(**inputs, **labels).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [("regression", torch.tensor([0.5, -1.0, 2.0])), ("multi_label_classification", torch.ones(3, 2))],
)
def test_the_loss_follows_the_problem_type(problem: str, labels: Tensor) -> None:
    labels_count = 1 if problem == "regression" else 2
    source = tiny_model("bert", problem_type=problem, num_labels=labels_count, num_hidden_layers=1)
    model = rewrite(trace(source), GraloraConfig(r=8, target_modules=["query"]))
    inputs = text_batch(3, 6)
    expected = source(**inputs, labels=labels).loss.item()
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(expected, rel=1e-5)


def test_labels_without_a_start_token_are_refused() -> None:
    """T5's own forward raises an AttributeError here."""
    model = adapted("t5")
    inputs = text_batch(2, 5)
    with pytest.raises(RewriteError, match="T5Config has no decoder_start_token_id, so give decoder_input_ids beside"):
        model(**inputs, labels=inputs["input_ids"])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_labels_without_a_loss_are_refused() -> None:
    model = rewrite(trace(Plain(), (torch.ones(2, 4),)), GraloraConfig(r=2, target_modules=["fc"]))
    with pytest.raises(RewriteError, match="the traced model has no loss function; compute the loss outside"):
        model(torch.ones(2, 4), labels=torch.ones(2))


def test_labels_that_the_loss_cannot_use_are_refused() -> None:
    model = adapted()
    with pytest.raises(RewriteError, match="needs labels, which neither the labels"):
        model(**text_batch(2, 5), start_positions=torch.zeros(2, dtype=torch.long))


# -- several adapters ---------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> GraloraModel:
    """Two adapters over partly the same sites; the first is active."""
    model = adapted(target_modules=["query", "dense"])
    torch.manual_seed(7)
    model.add_adapter("other", GraloraConfig(r=4, hybrid_r=2, target_modules=["query", "key"], init_weights=False))
    return model


def test_a_later_adapter_waits(pair: GraloraModel) -> None:
    alone = adapted(target_modules=["query", "dense"])
    inputs = inputs_of("bert")
    assert pair.active_adapters == ["default"]
    assert torch.equal(run(pair, inputs), run(alone, inputs))
    assert text(pair) == text(alone)
    assert not any(p.requires_grad for name, p in pair.named_parameters() if ".other." in name)


def test_switching_gives_the_other_adapters_output(pair: GraloraModel) -> None:
    inputs = inputs_of("bert")
    first, before = run(pair, inputs), structure(pair)
    pair.set_adapter("other")
    assert pair.active_adapters == ["other"]
    assert relative_error(run(pair, inputs), first) > 1e-3
    assert {name.split(".")[2] for name, p in pair.named_parameters() if p.requires_grad} == {"other"}
    pair.set_adapter("default")
    assert structure(pair) == before
    assert torch.equal(run(pair, inputs), first)


def test_two_active_adapters_are_the_sum_of_their_updates(pair: GraloraModel) -> None:
    inputs = inputs_of("bert")
    pair.set_adapter(["default", "other"])
    both = run(pair, inputs)
    from gralora_fx import merge

    assert relative_error(run(merge(pair), inputs), both) < 1e-5
    pair.set_adapter(["other", "default"])
    assert relative_error(run(pair, inputs), both) < 1e-5
    pair.graph_module.graph.lint()


def test_disabling_is_the_base_bit_for_bit(pair: GraloraModel) -> None:
    inputs = inputs_of("bert")
    first, before = run(pair, inputs), structure(pair)
    with pair.disable_adapter():
        assert text(pair) == text(traced("bert"))
        assert torch.equal(run(pair, inputs), run(traced("bert"), inputs))
    assert structure(pair) == before
    assert torch.equal(run(pair, inputs), first)
    with pytest.raises(ZeroDivisionError), pair.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(run(pair, inputs), first)


def test_deleting(pair: GraloraModel) -> None:
    with pytest.raises(RewriteError, match="adapter 'default' is active; set another one before deleting it"):
        pair.delete_adapter("default")
    pair.delete_adapter("other")
    assert list(pair.configs) == ["default"]
    assert not any(".other." in name for name, _ in pair.named_parameters())
    for call in (pair.set_adapter, pair.delete_adapter, pair.adapter):
        with pytest.raises(RewriteError, match="no adapter 'other'; there are default"):
            call("other")


def test_two_adapters_that_train_one_module_are_not_active_together() -> None:
    model = adapted(target_modules=["query"], modules_to_save=["classifier"])
    model.add_adapter("other", GraloraConfig(**QUERY, modules_to_save=["classifier"]))
    with pytest.raises(RewriteError, match="'default' and 'other' both train a copy of classifier"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
    model.set_adapter("other")


def test_only_one_adapter_may_train_biases() -> None:
    model = adapted(target_modules=["query"], bias="all")
    with pytest.raises(ConfigError, match="adapter 'default' trains biases already, and only one adapter may"):
        model.add_adapter("other", GraloraConfig(**QUERY, bias="gralora_only"))


def test_a_trained_head_is_a_copy(pair: GraloraModel) -> None:
    inputs = inputs_of("bert")
    base = run(traced("bert"), inputs)
    model = adapted(target_modules=["query"], modules_to_save=["classifier"], init_weights=True)
    assert torch.equal(run(model, inputs), base)
    with torch.no_grad():
        for parameter in model.adapter("default").copies["classifier"].values():
            parameter.add_(1)
    assert relative_error(run(model, inputs), base) > 0.1
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), base)
    assert torch.equal(run(traced("bert"), inputs), base)


def test_a_trained_tied_head_leaves_the_embedding_alone() -> None:
    model = adapted("gpt2", target_modules=["c_attn"], modules_to_save=["lm_head"], init_weights=True)
    inputs = inputs_of("gpt2")
    base = run(traced("gpt2"), inputs)
    with torch.no_grad():
        for parameter in model.adapter("default").copies["lm_head"].values():
            parameter.mul_(2)
    assert relative_error(run(model, inputs), 2 * base) < 1e-6
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), base)


# -- copies, merging and leaving ----------------------------------------------------------------------------------


def test_a_deep_copy_is_another_model_of_the_same_values() -> None:
    model = adapted()
    other = copy.deepcopy(model)
    inputs = inputs_of("bert")
    expected = run(model, inputs)
    assert torch.equal(run(other, inputs), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.equal(run(model, inputs), expected)
    assert relative_error(run(other, inputs), expected) > 1e-3
    assert torch.equal(run(other, inputs), run(traced("bert"), inputs))
    other.merge_adapter()
    other.unmerge_adapter()
    assert torch.equal(run(model, inputs), expected)


def test_unloading_gives_the_base_back() -> None:
    source, base = fresh("bert")
    source.classifier.weight.requires_grad_(False)
    inputs = inputs_of("bert")
    expected = run(base, inputs)
    model = rewrite(base, GraloraConfig(**QUERY, modules_to_save=["classifier"], bias="gralora_only"))
    assert not any(parameter.requires_grad for parameter in source.parameters())
    again = model.unload()
    assert isinstance(again, TracedModel)
    assert text(again) == text(base)
    assert [node.meta.get("custom") for node in again.graph_module.graph.nodes] == [
        node.meta.get("custom") for node in base.graph_module.graph.nodes
    ]
    assert torch.equal(run(again, inputs), expected)
    assert {id(p) for p in again.graph_module.parameters()} == {id(p) for p in base.graph_module.parameters()}
    assert [name for name, p in source.named_parameters() if not p.requires_grad] == ["classifier.weight"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "falcon", "albert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_back_is_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    source = tiny_model(name).to(dtype)
    torch.manual_seed(1)
    model = rewrite(
        trace(source), GraloraConfig(**{**QUERY, "target_modules": "all-linear", "hybrid_r": 4, "alpha": 6})
    )
    weights = {key: p.detach().clone() for key, p in source.named_parameters()}
    inputs = inputs_of(name)
    expected, before = run(model, inputs), structure(model)
    for _ in range(2):
        model.merge_adapter()
        assert text(model) == text(model.traced)
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        assert relative_error(run(model, inputs).float(), expected.float()) < tolerance
        model.unmerge_adapter()
        assert structure(model) == before
        assert torch.equal(run(model, inputs), expected)
        assert all(torch.equal(weights[key], p) for key, p in source.named_parameters())


def test_merging_one_of_two_keeps_the_output(pair: GraloraModel) -> None:
    inputs = inputs_of("bert")
    pair.set_adapter(["default", "other"])
    both = run(pair, inputs)
    pair.merge_adapter(["default"])
    assert pair.merged_adapters == ["default"]
    assert relative_error(run(pair, inputs), both) < 1e-5
    pair.merge_adapter(["other"])
    assert relative_error(run(pair, inputs), both) < 1e-5
    pair.unmerge_adapter()
    assert torch.equal(run(pair, inputs), both)


def test_unmerging_one_of_two_gives_every_bit_of_the_output_back(pair: GraloraModel) -> None:
    inputs = inputs_of("bert")
    pair.set_adapter(["default", "other"])
    expected, before = run(pair, inputs), structure(pair)
    pair.merge_adapter("default")
    pair.unmerge_adapter()
    assert structure(pair) == before
    assert torch.equal(run(pair, inputs), expected)


def test_what_goes_wrong_around_merging(pair: GraloraModel) -> None:
    with pytest.raises(MergeError, match="nothing is merged, so there is nothing to unmerge"):
        pair.unmerge_adapter()
    with pytest.raises(MergeError, match="adapter 'other' is not active, so merging it would change the output"):
        pair.merge_adapter(["other"])
    pair.merge_adapter()
    with pytest.raises(MergeError, match="adapter 'default' is merged already; unmerge first"):
        pair.merge_adapter(["default"])
    with pytest.raises(MergeError, match="there is no active adapter left to merge"):
        pair.merge_adapter()
    with pytest.raises(MergeError, match="cannot switch adapters while default is merged; call unmerge_adapter"):
        pair.set_adapter("other")
    with pytest.raises(MergeError, match="cannot add an adapter while default is merged"):
        pair.add_adapter("third", GraloraConfig(**QUERY))
    pair.unmerge_adapter()
    pair.set_adapter("other")


def test_disabling_while_merged_is_the_base_and_comes_back_merged(pair: GraloraModel) -> None:
    inputs = inputs_of("bert")
    pair.merge_adapter()
    merged = run(pair, inputs)
    with pair.disable_adapter():
        assert torch.equal(run(pair, inputs), run(traced("bert"), inputs))
    assert pair.merged_adapters == ["default"]
    assert torch.equal(run(pair, inputs), merged)


def test_a_damaged_adapter_is_not_merged(pair: GraloraModel) -> None:
    with torch.no_grad():
        next(iter(pair.adapter("default").factors.values())).B[0, 0, 0] = float("inf")
    before = text(pair)
    with pytest.raises(MergeError, match=r"the merged weight of bert\.\S+query is not finite"):
        pair.merge_adapter(safe_merge=True)
    assert text(pair) == before
    assert pair.merged_adapters == []


@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unload_changes_the_base(safe: bool) -> None:
    source, base = fresh("bert")
    torch.manual_seed(1)
    model = rewrite(base, GraloraConfig(**QUERY, modules_to_save=["classifier"]))
    with torch.no_grad():
        for parameter in model.adapter("default").copies["classifier"].values():
            parameter.add_(1)
    inputs = inputs_of("bert")
    expected, graph = run(model, inputs), text(base)
    result = model.merge_and_unload(safe_merge=safe)
    assert text(result) == graph
    for merged in (result, source):
        assert relative_error(run(merged, inputs), expected) < 1e-5


def test_a_failed_merge_and_unload_changes_no_weight() -> None:
    source, base = fresh("bert")
    model = rewrite(base, GraloraConfig(**{**QUERY, "target_modules": ["query", "key"]}))
    weights = {key: p.detach().clone() for key, p in source.named_parameters()}
    with torch.no_grad():
        list(model.adapter("default").factors.values())[-1].B[0, 0, 0] = float("nan")
    before = text(model)
    with pytest.raises(MergeError, match="is not finite"):
        model.merge_and_unload(safe_merge=True)
    assert text(model) == before
    assert all(torch.equal(weights[key], p) for key, p in source.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_a_half_precision_model_are_float32(dtype: torch.dtype) -> None:
    source = tiny_model("bert").to(dtype)
    model = rewrite(trace(source), GraloraConfig(**QUERY))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = model(**inputs_of("bert")).logits
    assert output.dtype == dtype
    output.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# -- autocast and compilation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_under_autocast_the_dtype_is_that_of_pefts_lora(base: torch.dtype, dtype: torch.dtype, mode: bool) -> None:
    """PEFT's GraLoRA gives float32 there."""
    torch.manual_seed(0)
    source, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).to(base), torch.randn(2, 3, 16).to(base)
    config = GraloraConfig(r=4, hybrid_r=2, target_modules=["0", "2"], init_weights=False)
    model = rewrite(trace(source, (x,)), config).train(mode)
    lora = peft.get_peft_model(copy.deepcopy(source), peft.LoraConfig(r=4, target_modules=["0", "2"])).train(mode)
    expected = model(x)
    with torch.autocast("cpu", dtype=dtype):
        recorded = model(x)
        with torch.no_grad():
            plain = model(x)
        assert recorded.dtype == plain.dtype == lora(x).dtype == dtype
    assert torch.equal(recorded, plain)
    assert relative_error(recorded.float(), expected.float()) < 0.05
    recorded.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_transformers_model_under_autocast() -> None:
    model, inputs = adapted("llama"), inputs_of("llama")
    expected = run(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(model, inputs)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual.float(), expected) < 0.1


@pytest.mark.parametrize("fields", [{}, {"hybrid_r": 2}], ids=str)
def test_it_compiles_in_both_modes(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    source, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), torch.randn(2, 3, 16)
    model = rewrite(trace(source, (x,)), GraloraConfig(r=4, target_modules=["0", "2"], init_weights=False, **fields))
    for mode in (False, True):
        model.train(mode)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), atol=1e-6)
        compiled(x).sum().backward()
