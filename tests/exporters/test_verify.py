"""Verification of exports that generate: greedy tokens, their near ties, faults that it must see, and other bases."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import peft
import pytest
import torch
from damaged_exports import forget_digests
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite, trace
from gralora_fx.core.model.rewrite import merge_lazily
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.artifact.manifest import describe_adapters
from gralora_fx.exporters.verify import same_model
from gralora_fx.exporters.verify.cases import pad_prompts, random_prompts
from gralora_fx.exporters.verify.greedy_tokens import compare_greedy, reader
from gralora_fx.exporters.verify.tolerances import ToleranceCheck, largest_gap, largest_value, tolerance_of
from gralora_fx.exporters.verify_report import TensorCheck, TokenCheck, VerifyReport
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.sessions.session import open_session

SIZES: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def adapted(seed: int = 0, **sizes: Any) -> GraloraModel:
    torch.manual_seed(seed)
    traced = fresh_trace("llama", seed, **{**SIZES, **sizes}, task="text-generation-with-past")
    return rewrite(traced, GraloraConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False))


@pytest.fixture(scope="module")
def model() -> GraloraModel:
    return adapted()


@pytest.fixture(scope="module")
def export(model: GraloraModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "onnx"
    export_onnx(model, path, tokenizer=tiny_tokenizer(), verify="full")
    return path


def test_greedy_tokens_are_in_the_manifest(export: Path) -> None:
    tokens = json.loads((export / "gralora_export.json").read_text())["verification"]["tokens"]
    assert tokens["cases"] == [
        "1 prompt of 12 tokens",
        "4 prompts of 3 to 17 tokens padded left",
        "3 prompts of 5 to 9 tokens padded right",
        "1 prompt of 58 tokens",  # the context of 64, less 2 that some models do not have, less 4 new ones
    ]
    assert tokens["compared"] == tokens["equal"] == 16 + 4 * 16 + 3 * 4 + 4
    assert (tokens["near_ties"], tokens["first_difference"]) == (0, None)
    assert len(tokens["step_errors"]) == 16
    assert 0 < max(tokens["step_errors"]) <= 1e-5


def test_a_report_is_read_at_a_glance(export: Path, model: GraloraModel) -> None:
    text = verify_onnx(export, model).details
    assert "greedy tokens: 96 of 96 equal (100.0 %), 0 near ties; 4 cases (1 prompt of 12 tokens; 4 prompts" in text
    assert "logits by step, largest " in text
    assert [line.split()[0] for line in text.splitlines()[:4]] == [
        "output",
        "logits",
        "present.*.key",
        "present.*.value",
    ]


def test_a_context_of_a_thousand_positions_is_filled() -> None:
    long = adapted(max_position_embeddings=4096, num_hidden_layers=1)
    assert [case.ids.shape[1] for case in random_prompts(long.traced, 0)] == [12, 17, 9, 996]
    short = adapted(max_position_embeddings=12, num_hidden_layers=1)
    assert [tuple(case.mask.sum(1).tolist()) for case in random_prompts(short.traced, 0)] == [(6, 5, 6), (6,)]


def test_prompts_of_ones_own_are_compared_in_addition(export: Path, model: GraloraModel) -> None:
    report = verify_onnx(export, model, prompts=["abc", [5, 6, 7, 8, 9], torch.tensor([4])])
    assert report.passed
    assert report.tokens is not None
    assert report.tokens.cases[-1] == "3 given prompts of 1 to 5 tokens padded left"
    assert report.tokens.compared == 96 + 3 * 16


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts are a list of texts, chats or token ids, with at least one"),
        ("abc", "prompts are a list of texts, chats or token ids"),
        ([[5], []], "prompt 1 is empty; give other ids"),
        ([[5, 101]], "prompt 0 holds token 101, outside the vocabulary of 101 tokens"),
        ([[5], [-3]], "prompt 1 holds token -3, outside"),
        ([[5] * 50], "prompt 0 has 50 tokens, and 16 are added, more than the context of 62; shorten it"),
        ([5.5], "a prompt is text, a list of messages or a list of token ids, but got 5.5"),
    ],
)
def test_prompts_that_do_not_fit_are_named(export: Path, model: GraloraModel, prompts: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        verify_onnx(export, model, prompts=prompts)


def test_prompts_need_a_cache(tmp_path: Path) -> None:
    traced = fresh_trace("llama")
    export_onnx(traced, tmp_path / "onnx", verify=False)
    with pytest.raises(ExportError, match="the export has no cache, so it takes no prompts"):
        verify_onnx(tmp_path / "onnx", traced, prompts=[[5]])


# -- faults that verification must see ---------------------------------------------------------------------------------


def damaged(export: Path, copy: Path, damage: Any) -> Path:
    """Return an export whose graph was edited after it was verified."""
    shutil.copytree(export, copy)
    model = ir.load(copy / "model.onnx")
    damage(model)
    ir.save(model, copy / "model.onnx", external_data="other_data")
    forget_digests(copy)
    return copy


FAULTS = ["fold", "mask", "cache", "batch"]


def _damage(fault: str, graph: ir.Model) -> None:
    """Edit a graph: another folded weight, padding that is read, keys given back wrong, or rows that are lost."""
    inputs = {str(value.name): value for value in graph.graph.inputs}
    if fault == "fold":
        name = next(n for n in graph.graph.initializers if "layers.1" in n and "down_proj" in n)
        value = graph.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 1.01, name=name)
        return
    if fault == "cache":
        position = next(i for i, value in enumerate(graph.graph.outputs) if value.name == "present.1.key")
        value = graph.graph.outputs[position]
    else:
        value = inputs["attention_mask" if fault == "mask" else "input_ids"]
    one = ir.Value(name="one", const_value=ir.tensor([1] if fault != "cache" else [0.5], name="one"))
    graph.graph.initializers["one"] = one
    if fault == "mask":  # 0 ** 0 is 1, and so is 1 ** 0
        node = ir.node("Max", [value, one])
    elif fault == "batch":  # every row reads the first one's tokens
        zero = ir.Value(name="zero", const_value=ir.tensor([0], name="zero"))
        graph.graph.initializers["zero"] = zero
        row = ir.node("Gather", [value, zero], {"axis": 0})
        shape = ir.node("Shape", [value])
        node = ir.node("Expand", [row.outputs[0], shape.outputs[0]])
        graph.graph.insert_before(graph.graph[0], [row, shape])
    else:
        node = ir.node("Mul", [value, one])
    output = node.outputs[0]
    output.shape, output.type = value.shape, value.type
    if fault == "cache":
        producer = value.producer()
        assert producer is not None
        value.name, output.name = "kept", "present.1.key"
        graph.graph.append(node)
        graph.graph.outputs[position] = output
        return
    output.name = f"changed_{value.name}"
    own = {id(node)} | ({id(row), id(shape)} if fault == "batch" else set())
    for user, index in list(value.uses()):
        if id(user) not in own:
            user.replace_input_with(index, output)
    after = shape if fault == "batch" else None
    if after is None:
        graph.graph.insert_before(graph.graph[0], node)
    else:
        graph.graph.insert_after(after, node)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_quick_verification_sees_every_kind_of_fault(
    export: Path, model: GraloraModel, tmp_path: Path, fault: str
) -> None:
    path = damaged(export, tmp_path / "onnx", lambda graph: _damage(fault, graph))
    report = verify_onnx(path, model, level="quick")
    assert not report.passed


def test_a_quick_verification_runs_a_tenth_of_the_tokens(export: Path, model: GraloraModel) -> None:
    seen: dict[str, int] = {}
    for level in ("quick", "full"):
        ids: list[int] = []
        hook = model.graph_module.register_forward_pre_hook(
            lambda _, args, kwargs, ids=ids: ids.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        report = verify_onnx(export, model, level=level)  # type: ignore[arg-type]
        hook.remove()
        assert report.passed
        assert report.level == level
        assert f"{level} verification, compared with the PyTorch model with 'default' active" in report.details
        seen[level] = len(ids)
    assert 6 * seen["quick"] <= seen["full"]


def test_the_manifest_says_which_level_was_run(export: Path, model: GraloraModel, tmp_path: Path) -> None:
    assert json.loads((export / "gralora_export.json").read_text())["verification"]["level"] == "full"
    quick = export_onnx(model, tmp_path / "onnx", quantize="int4").verification
    assert quick is not None
    verification = json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())["verification"]
    assert verification["level"] == quick.level == "quick"
    assert (
        verification["reference"] == "the PyTorch model with 'default' active, its weights rounded as the export's are"
    )


@pytest.mark.parametrize("level", ["slow", "", None, True])
def test_other_levels_are_refused(export: Path, model: GraloraModel, level: Any) -> None:
    with pytest.raises(ExportError, match=r"level=.* is not available; take 'quick' or 'full'"):
        verify_onnx(export, model, level=level)


@pytest.mark.quick
def test_a_wrong_weight_is_seen(export: Path, model: GraloraModel, tmp_path: Path) -> None:
    def damage(graph: ir.Model) -> None:
        value = graph.graph.initializers["model.layers.1.input_layernorm.weight"]
        assert value.const_value is not None
        value.const_value = ir.tensor(-value.const_value.numpy(), name=value.name)

    report = verify_onnx(damaged(export, tmp_path / "onnx", damage), model)
    assert not report.passed
    assert report.tokens is not None
    assert report.tokens.equal < report.tokens.compared
    assert report.tokens.first_difference is not None
    assert "first difference: 1 prompt of 12 tokens: row 0, token " in report.details
    assert "FAILED" in report.details


def test_a_cache_that_is_given_back_wrong_is_seen_by_its_tokens(
    export: Path, model: GraloraModel, tmp_path: Path
) -> None:
    """The last layer's values are twice what they should be: the first token is right, the next ones are not."""

    def damage(graph: ir.Model) -> None:
        value = next(v for v in graph.graph.outputs if v.name == "present.1.value")
        node = value.producer()
        assert node is not None
        inner = ir.Value(name="inner", shape=value.shape, type=value.type)
        two = ir.Value(name="two", const_value=ir.tensor([2.0], name="two"))
        graph.graph.initializers["two"] = two
        node.outputs[2].name = "kept"
        doubled = ir.node("Mul", [value, two])
        doubled.outputs[0].name, doubled.outputs[0].type = "present.1.value", inner.type
        doubled.outputs[0].shape = inner.shape
        graph.graph.append(doubled)
        graph.graph.outputs[list(graph.graph.outputs).index(value)] = doubled.outputs[0]

    session = open_session(damaged(export, tmp_path / "onnx", damage))
    check = ToleranceCheck(model, 1e-4, use_float64=False)
    (tokens,) = compare_greedy({"": reader(session)}, model, [pad_prompts([[5, 9, 12]], steps=4)], check)
    assert tokens.step_errors[0] <= 1e-6
    assert min(tokens.step_errors[1:]) > 1e-3


def test_a_near_tie_is_not_an_error(export: Path, model: GraloraModel) -> None:
    """With a tolerance as wide as the logits any other token is one that could not be told."""
    other = adapted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    cases = [pad_prompts([[5, 9, 12], [7, 3]], steps=16)]
    readers = {"": reader(open_session(export))}
    wide, strict = (
        compare_greedy(readers, other.eval(), cases, ToleranceCheck(other, tolerance, use_float64=False))[0]
        for tolerance in (10.0, 0.0)
    )
    assert wide.compared == strict.compared == 32
    assert wide.near_ties == wide.compared - wide.equal > 0
    assert strict.near_ties == 0
    assert strict.first_difference is not None
    assert wide.first_difference == f"{strict.first_difference} (a near tie)"


def test_a_step_beyond_the_tolerance_fails(export: Path, model: GraloraModel) -> None:
    report = verify_onnx(export, model)
    assert report.tokens is not None
    tight = verify_onnx(export, model, tolerance=max(report.tokens.step_errors) / 2)
    assert report.passed
    assert not tight.passed
    assert not tight.rounding


@pytest.mark.parametrize(("precision", "expected"), [("fp32", 1e-4), ("fp16", 1e-2), ("bf16", 1e-2)])
def test_tolerance_is_what_the_arithmetic_explains(precision: str, expected: float) -> None:
    assert tolerance_of(precision) == expected


def test_gaps_count_what_is_not_a_number() -> None:
    inf, nan = float("inf"), float("nan")
    same = torch.tensor([1.0, inf, -inf, nan])
    assert largest_gap(same, same.clone()) == 0.0
    assert largest_gap(same, torch.tensor([1.5, inf, -inf, nan])) == 0.5
    assert largest_gap(same, torch.tensor([1.0, inf, -inf, 0.0])) == inf
    assert largest_gap(same, torch.tensor([1.0, 5.0, -inf, nan])) == inf
    assert largest_value(same) == 1.0


def test_layers_are_shown_by_their_largest() -> None:
    tensors = tuple(TensorCheck(f"present.{layer}.key", 1.0 + layer, 0.5 - layer / 10, None) for layer in range(3))
    tokens = TokenCheck(("one",), 4, 3, 1, "one: row 0, token 2 is 5 instead of 6 (a near tie)", (1e-6, 2e-6))
    report = VerifyReport(True, 1e-4, ("1 x 1",), tensors, tokens)
    text = report.details
    assert "present.*.key                   3.00e+00    5.00e-01" in text
    assert "greedy tokens: 3 of 4 equal (75.0 %), 1 near ties; 1 case (one)" in text
    assert report.to_dict()["tokens"] == dataclasses.asdict(tokens)


# -- another base ------------------------------------------------------------------------------------------------------


def test_a_report_says_why_float16_gives_no_numbers() -> None:
    report = VerifyReport(False, 1e-2, ("1 x 1",), (TensorCheck("logits", math.inf, math.inf, 0.0),), weights="fp16")
    assert "the model computes numbers above 65504, where float16 ends; take precision='fp32'" in report.details
    finite = dataclasses.replace(report, tensors=(TensorCheck("logits", 3.0, 1.0, 0.0),))
    assert "65504" not in str(finite)


def test_an_export_of_another_base_is_refused(export: Path, model: GraloraModel) -> None:
    fingerprint = json.loads((export / "gralora_export.json").read_text())["base_fingerprint"]
    with pytest.raises(
        ExportError, match=f"was exported from another base: its weights have fingerprint {fingerprint[:12]}"
    ):
        verify_onnx(export, adapted(seed=1))
    with pytest.raises(ExportError, match="with its adapters active rather than folded"):
        verify_onnx(export, merge(model))


def test_another_adapter_of_the_same_base_is_refused(export: Path, model: GraloraModel, tmp_path: Path) -> None:
    traced = fresh_trace("llama", **SIZES, task="text-generation-with-past")
    sizes = r"the adapter 'default' \(r=4, hybrid_r=0, alpha=64, gralora_k=2, SHA-256 [0-9a-f]{12}\)"
    with pytest.raises(ExportError, match=f"was exported with {sizes}, but the given model has no active adapter"):
        verify_onnx(export, traced)
    other = adapted()
    with torch.no_grad():
        next(p for p in other.parameters() if p.requires_grad).add_(1e-4)
    with pytest.raises(ExportError, match=f"was exported with {sizes}, but the given model has {sizes} active; give"):
        verify_onnx(export, other)
    export_onnx(traced, tmp_path / "onnx", verify=False)
    with pytest.raises(ExportError, match=f"was exported without an adapter, but the given model has {sizes} active"):
        verify_onnx(tmp_path / "onnx", model)


def test_an_export_after_a_merge_is_verified_with_its_base_and_adapter(model: GraloraModel, tmp_path: Path) -> None:
    merged = merge(model)
    export_onnx(merged, tmp_path / "onnx", verify=False)
    for same in (model, merged):
        assert verify_onnx(tmp_path / "onnx", same, "quick").passed
    with pytest.raises(ExportError, match="was exported from another base"):
        verify_onnx(tmp_path / "onnx", model.traced)


def test_a_model_is_fingerprinted_once_for_each_adapter_that_an_export_of_a_merge_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones of the manifest are merged in it; those that were folded into the export afterwards follow."""
    several = adapted()
    names = ["zeta", "alpha", "beta", "eta"]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        several.add_adapter(name, GraloraConfig(r=4, target_modules=["q_proj"], init_weights=False))
    several.set_adapter(names)
    export_onnx(merge(several, names[:2]), tmp_path / "onnx", verify=False)
    manifest = read_manifest(tmp_path / "onnx")
    assert list(manifest.adapters) == names[:2]
    folded = dataclasses.replace(manifest, adapters=describe_adapters(several))
    (tmp_path / "onnx" / "gralora_export.json").write_text(folded.to_json())
    assert list(read_manifest(tmp_path / "onnx").adapters) == names
    counted: list[Any] = []
    monkeypatch.setattr(same_model, "merge_lazily", lambda *a: counted.append(a[1]) or merge_lazily(*a))
    several.set_adapter(names[::-1])
    same_model.check_same_model(tmp_path / "onnx", read_manifest(tmp_path / "onnx"), several)
    assert counted == [names, names[:3], names[:2]]
    counted.clear()
    other = dataclasses.replace(folded, base_fingerprint="0" * 64)
    with pytest.raises(ExportError, match="was exported from another base"):
        same_model.check_same_model(tmp_path / "onnx", other, several)
    assert len(counted) == len(names)


def test_a_fresh_head_that_an_adapter_replaces_is_not_another_base(tmp_path: Path) -> None:
    """A classifier's base has no head of its own: it is drawn anew in every run, and the adapter's copy is exported."""
    source = tiny_model("bert", num_labels=3)
    config = peft.GraloraConfig(r=8, target_modules=["query"], task_type="SEQ_CLS", init_weights=False)
    peft.get_peft_model(source, config).save_pretrained(tmp_path / "adapter")
    models = []
    for head in (0.0, 1.0):
        base = tiny_model("bert", num_labels=3)
        torch.nn.init.constant_(base.classifier.weight, head)
        models.append(GraloraModel.from_pretrained(trace(base), tmp_path / "adapter"))
    export_onnx(models[0], tmp_path / "onnx")
    assert verify_onnx(tmp_path / "onnx", models[1]).passed
