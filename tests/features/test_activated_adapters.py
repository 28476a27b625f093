"""Adapters that act from their invocation tokens on are PEFT's aLoRA; GraLoRA's are the base, then PEFT's GraLoRA."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.gralora.layer import GraloraLayer
from peft_oracle import peft_model
from torch import Tensor
from traces import fresh, fresh_trace
from transformers import PreTrainedModel

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, TracedModel, merge, plan, rewrite, trace
from gralora_fx.core.adapters.adapter import checkpoint_parameters
from gralora_fx.core.methods import method_of
from gralora_fx.errors import ConfigError, MergeError, RewriteError, TargetError
from gralora_fx.exporters import export_onnx, merge_checkpoint, to_lora
from tests.architectures.tiny_decoders import tiny_decoder

INVOCATION = [7, 8]
FIELDS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "lora_alpha": 16},
    "GRALORA": {"r": 4, "gralora_k": 2, "alpha": 16, "hybrid_r": 2},
}
CACHED = "text-generation-with-past"
DECODERS = ("llama", "qwen3", "gpt2", "gemma3", "mistral", "phi3", "falcon", "mixtral")
OTHERS = ("Qwen2ForCausalLM", "GPTNeoXForCausalLM", "Olmo2ForCausalLM", "StableLmForCausalLM")
LINEAR: dict[str, Any] = {"mixtral": ["q_proj", "o_proj"]}
WITHOUT = pytest.mark.filterwarnings("ignore:rows .* lack the tokens:UserWarning")


def rows(padding: str = "left") -> dict[str, Tensor]:
    """Rows with the invocation in the middle, at the end, twice, after or before padding, in padding, half, and not."""
    ids = torch.randint(9, 99, (7, 12), generator=torch.Generator().manual_seed(3))
    mask, call = torch.ones_like(ids), torch.tensor(INVOCATION)
    for row, places in enumerate(((4,), (10,), (1, 6), (5,), (2,), (), ())):
        for place in places:
            ids[row, place : place + 2] = call
    pads = slice(0, 4) if padding == "left" else slice(8, 12)
    mask[3:5, pads] = 0
    if padding == "right":
        ids[4, 9:11] = call  # the last one is in the padding, which PEFT does not tell from text
    ids[5, -1] = INVOCATION[0]
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def gralora_from_invocations(wrapped: peft.PeftModel, ids: Tensor) -> Iterator[None]:
    """PEFT's GraLoRA from the last invocation of each row on, and the base's layers before it."""
    starts = [max((i for i in range(len(row) - 1) if row[i : i + 2] == INVOCATION), default=99) for row in ids.tolist()]
    acting = torch.arange(ids.shape[1])[None] >= torch.tensor(starts)[:, None]

    def mixed(layer: GraloraLayer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where(acting.reshape(*output.shape[:-1], 1), output, layer.base_layer(inputs[0]))

    layers = [module for module in wrapped.modules() if isinstance(module, GraloraLayer)]
    hooks = [layer.register_forward_hook(mixed) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def pair(
    name: str, directory: Path, method: str = "LORA", task: str | None = CACHED
) -> tuple[GraloraModel, peft.PeftModel, PreTrainedModel]:
    """Return a model of ours and PEFT's with one activated adapter, and their base."""
    if name in OTHERS:
        model = tiny_decoder(name)
        traced = trace(copy.deepcopy(model), task=task)
    else:
        model, traced = fresh(name, task=task)
    base, fields = copy.deepcopy(model), {**FIELDS[method], "target_modules": LINEAR.get(name, "all-linear")}
    fields |= {"task_type": "CAUSAL_LM"} | ({"alora_invocation_tokens": INVOCATION} if method == "LORA" else {})
    theirs = peft_model(copy.deepcopy(model), method=method, **fields)
    theirs.save_pretrained(str(directory))
    if method == "GRALORA":
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "alora_invocation_tokens": INVOCATION}))
    return GraloraModel.from_pretrained(traced, directory), theirs, base


def far(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """Return the ids as labels, without those of padding and those that follow it."""
    mask = inputs["attention_mask"].bool()
    counts = mask & torch.nn.functional.pad(mask, (1, 0), value=False)[:, :-1]
    return torch.where(counts, inputs["input_ids"], -100)


def gradients(ours: GraloraModel, theirs: peft.PeftModel) -> float:
    """Return the largest difference of gradients, relative to the largest."""
    own = checkpoint_parameters(ours.adapter("default"))
    pairs = [(own[n.replace(".default", "")].grad, p.grad) for n, p in theirs.named_parameters() if p.requires_grad]
    assert len(pairs) == len(own)
    largest = max(float(grad.abs().max()) for _, grad in pairs if grad is not None)
    return max(float((a - b).detach().abs().max()) for a, b in pairs if a is not None and b is not None) / largest


@WITHOUT
@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_logits_and_gradients_and_tokens_are_pefts(name: str, tmp_path: Path) -> None:
    ours, theirs, base = pair(name, tmp_path)
    inputs = rows()
    counts = inputs["attention_mask"].bool()
    expected, alone = theirs(**inputs).logits, base(**inputs).logits
    actual = ours(**inputs).logits
    assert far(actual[counts], expected[counts]) < 1e-5
    assert torch.equal(actual[5:], ours.traced(**inputs).logits[5:])  # rows without an invocation are the base's
    assert far(alone[0, 4:], expected[0, 4:]) > 1e-2
    answers = [m.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (ours, theirs)]
    assert torch.equal(*answers)
    labels = labels_of(inputs)
    for model in (ours, theirs):
        model(**inputs, labels=labels).loss.backward()
    assert gradients(ours, theirs) < 1e-5


@WITHOUT
def test_the_invocation_may_be_in_the_padding_on_the_right_as_in_peft(tmp_path: Path) -> None:
    ours, theirs, _ = pair("llama", tmp_path)
    inputs = rows("right")
    counts = inputs["attention_mask"].bool()
    assert far(ours(**inputs).logits[counts], theirs(**inputs).logits[counts]) < 1e-5


@WITHOUT
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
def test_gralora_is_the_base_and_then_pefts_gralora(name: str, tmp_path: Path) -> None:
    ours, theirs, _ = pair(name, tmp_path, "GRALORA")
    inputs = rows()
    counts = inputs["attention_mask"].bool()
    labels = labels_of(inputs)
    with gralora_from_invocations(theirs, inputs["input_ids"]):
        expected = theirs(**inputs, labels=labels)
        expected.loss.backward()
    actual = ours(**inputs, labels=labels)
    actual.loss.backward()
    assert far(actual.logits[counts], expected.logits[counts]) < 1e-5
    assert gradients(ours, theirs) < 1e-5


@WITHOUT
def test_a_training_step_with_checkpointed_blocks_has_the_same_gradients(tmp_path: Path) -> None:
    ours, theirs, _ = pair("llama", tmp_path)
    ours.gradient_checkpointing_enable()
    inputs = rows()
    labels = labels_of(inputs)
    for model in (ours.train(), theirs.train()):
        model(**inputs, labels=labels).loss.backward()
    assert "checkpoint" in ours._state.current.running.code
    assert gradients(ours, theirs) < 1e-5


@WITHOUT
def test_samples_and_beams_of_a_row_begin_where_it_does(tmp_path: Path) -> None:
    ours, _, _ = pair("llama", tmp_path)
    ids = {"input_ids": rows()["input_ids"][:3]}
    greedy = ours.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    options: dict[str, Any] = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    samples = ours.generate(**ids, max_new_tokens=4, pad_token_id=0, **options)
    assert torch.equal(samples, greedy.repeat_interleave(2, dim=0))
    beams = ours.generate(**ids, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0)
    for row in range(3):  # each as if it were alone
        own = ours.generate(input_ids=ids["input_ids"][row : row + 1], max_new_tokens=4, num_beams=3, pad_token_id=0)
        assert torch.equal(beams[row : row + 1], own)


@WITHOUT
def test_each_row_of_a_batch_may_have_another_activated_adapter_or_a_plain_one(tmp_path: Path) -> None:
    ours, _, _ = pair("llama", tmp_path)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    ours.add_adapter("other", LoraConfig(**fields, alora_invocation_tokens=[8]))
    ours.add_adapter("plain", LoraConfig(**fields))
    inputs, names = rows(), ["default", "other", "plain", "__base__", "default", "plain", "other"]
    together = ours(**inputs, adapter_names=names).logits
    answers = ours.generate(**inputs, adapter_names=names, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        if name != "__base__":
            ours.set_adapter(name)
        model = ours.traced if name == "__base__" else ours
        assert far(together[row : row + 1, 4:], model(**own).logits[:, 4:]) < 1e-5
        alone = model.generate(**own, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(answers[row : row + 1], alone)


def test_a_cache_goes_on_where_starts_say(tmp_path: Path) -> None:
    ours, _, _ = pair("llama", tmp_path)
    ids = rows()["input_ids"][:1]
    whole = ours(input_ids=ids).logits
    with ours.disable_adapter():
        cache = ours(input_ids=ids[:, :4]).past_key_values  # what the base has read is every adapter's
    rest = ours(input_ids=ids[:, 4:9], past_key_values=cache)
    last = ours(input_ids=ids[:, 9:], past_key_values=rest.past_key_values, adapter_starts=torch.tensor([4]))
    assert far(torch.cat([rest.logits, last.logits], 1), whole[:, 4:]) < 1e-5
    with pytest.raises(RewriteError, match="adapter_starts is a column for each of the 1 rows"):
        ours(input_ids=ids, adapter_starts=torch.tensor([1.5]))


def test_rows_without_the_invocation_are_named_in_a_warning(tmp_path: Path) -> None:
    ours, _, _ = pair("llama", tmp_path)
    with pytest.warns(UserWarning, match=r"rows 5, 6 lack the tokens \[7, 8\]"):
        ours(**rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(input_ids=rows()["input_ids"][:3])


def test_the_mask_is_one_node_and_layers_of_one_input_share_what_they_read(tmp_path: Path) -> None:
    ours, _, _ = pair("llama", tmp_path)
    names = [getattr(node.target, "__name__", "") for node in ours.graph_module.graph.nodes]
    assert names.count("invoked_tokens") == 1
    assert names.count("at_tokens") == 2 * 4  # of each layer: attention's input, its output, and those of the MLP
    with ours.disable_adapter():
        assert "invoked_tokens" not in ours.graph_module.code


def test_files_are_read_and_written_as_peft_does(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert peft.LoraConfig.from_pretrained(str(tmp_path)).alora_invocation_tokens == INVOCATION
    assert LoraConfig.from_pretrained(tmp_path) == config
    assert LoraConfig.from_peft(peft.LoraConfig.from_pretrained(str(tmp_path))) == config
    assert method_of(config).settings(config)["alora_invocation_tokens"] == INVOCATION  # as tables show it
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert "alora_invocation_tokens" not in (tmp_path / "adapter_config.json").read_text()
    ours = GraloraConfig(target_modules=["q_proj"], alora_invocation_tokens=INVOCATION)
    ours.save_pretrained(tmp_path)
    assert GraloraConfig.from_pretrained(tmp_path) == ours
    with pytest.warns(UserWarning, match="alora_invocation_tokens"):  # PEFT's GraLoRA says that it ignores the field
        peft.GraloraConfig.from_pretrained(str(tmp_path))


def test_gralora_becomes_a_lora_that_peft_activates(tmp_path: Path) -> None:
    ours, _, base = pair("llama", tmp_path / "gralora", "GRALORA")
    to_lora(tmp_path / "gralora", tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    inputs = {"input_ids": rows()["input_ids"][:3]}
    assert far(ours(**inputs).logits, theirs(**inputs).logits) < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alora_invocation_tokens": []}, "must be a list of at least one token id"),
        ({"alora_invocation_tokens": "hi"}, "must be a list of at least one token id"),
        ({"alora_invocation_tokens": [3, -1]}, "must hold token ids, .* but it holds -1"),
        ({"alora_invocation_tokens": [True]}, "but it holds True"),
        ({"alora_invocation_tokens": [3], "target_parameters": ["w"]}, "does not work with target_parameters"),
    ],
)
@pytest.mark.parametrize("kind", [LoraConfig, GraloraConfig])
def test_a_bad_invocation_is_named(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(target_modules=["q"], **fields)


def test_fields_of_two_methods_and_dora_are_refused() -> None:
    fields = {"target_modules": ["q"], "alora_invocation_tokens": [1]}
    with pytest.raises(ConfigError, match="has no field gralora_k: it is GraLoRA's number of blocks"):
        LoraConfig(**fields, gralora_k=2)
    with pytest.raises(ConfigError, match="has no field lora_alpha; use alpha"):
        GraloraConfig(**fields, lora_alpha=2)
    with pytest.raises(
        ConfigError, match=r"use_dora=True does not work with alora_invocation_tokens=\[1\], as in PEFT"
    ):
        DoraConfig(**fields)


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("llama", [7, 101, 5000], "has 101, 5000, outside the model's vocabulary of 101 tokens"),
        ("bert", [7], "is for causal language models, as in PEFT"),
        ("t5", [7], "is for causal language models, as in PEFT"),
    ],
)
def test_a_model_that_cannot_have_one_is_refused(name: str, tokens: list[int], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        plan(fresh_trace(name), LoraConfig(target_modules="all-linear", alora_invocation_tokens=tokens))


def test_merging_and_what_merges_is_refused_by_name(tmp_path: Path) -> None:
    ours, _, base = pair("llama", tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    message = r"acts only on its tokens \[7, 8\] and what follows; .*on every token"
    for merged in (
        lambda: merge(ours),
        ours.merge_adapter,
        ours.merge_and_unload,
        lambda: export_onnx(ours, tmp_path / "export"),
        lambda: merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"),
    ):
        with pytest.raises(MergeError, match=message):
            merged()
    ours.add_adapter("other", LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[9]))
    with pytest.raises(RewriteError, match="act from different tokens on"):
        ours.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    ours.add_weighted_adapter(["default"], [1], "same")
    ids = {"input_ids": rows()["input_ids"][:3]}
    before = ours(**ids).logits
    ours.set_adapter("same")
    assert far(ours(**ids).logits, before) < 1e-5


def test_rows_of_several_texts_are_refused(tmp_path: Path) -> None:
    ours, _, _ = pair("llama", tmp_path)
    ids = rows()["input_ids"][:1]
    with pytest.raises(RewriteError, match="needs one text per row"):
        ours(input_ids=ids, position_ids=torch.tensor([[*range(6), *range(6)]]), use_cache=False)


def test_without_a_cache_it_is_the_same(tmp_path: Path) -> None:
    ours, theirs, _ = pair("gpt2", tmp_path, task=None)
    ids = {"input_ids": rows()["input_ids"][:3]}
    assert far(ours(**ids).logits, theirs(**ids).logits) < 1e-5


def test_a_copy_and_a_pickled_trace_act_alike(tmp_path: Path) -> None:
    ours, _, _ = pair("llama", tmp_path)
    ids = {"input_ids": rows()["input_ids"][:3]}
    assert torch.equal(copy.deepcopy(ours)(**ids).logits, ours(**ids).logits)
    traced: TracedModel = ours.traced
    fresh_one = rewrite(traced, LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=INVOCATION))
    assert torch.equal(fresh_one(**ids).logits, traced(**ids).logits)  # B is zero
