"""Decoders traced with a cache: one graph for prompts and steps, padded or not, attention one node a layer."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from traces import relative_error
from transformers import DynamicCache, PreTrainedModel

from gralora_fx import GraloraConfig, TracedModel, merge, rewrite, trace
from gralora_fx.core.operators.attention import Attention
from gralora_fx.core.tracing.inputs.cached_steps import cached_inputs
from gralora_fx.core.tracing.inputs.signature import own_inputs
from gralora_fx.errors import TraceError
from gralora_fx.format.input_names import PAST
from tests.architectures.tiny_decoders import tiny_decoder

DECODERS = ("llama", "mistral", "qwen3", "gemma3", "phi3", "mixtral", "gpt2", "opt")
TASK = "text-generation-with-past"


@functools.cache
def source(name: str) -> PreTrainedModel:
    sizes = {"sliding_window": 4} if name == "gemma3" else {}
    return tiny_model(name, **sizes)


@functools.cache
def traced(name: str) -> TracedModel:
    return trace(source(name), task=TASK)


@pytest.mark.parametrize("name", DECODERS)
def test_attention_is_one_node_a_layer(name: str) -> None:
    assert len(list(Attention.all_in(traced(name).graph_module.graph))) == 2
    assert source(name).config._attn_implementation != "gralora"
    assert traced(name).input_names[-1] == PAST


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("batch", "past", "length"), [(1, 0, 1), (1, 9, 1), (3, 0, 6), (2, 5, 4), (4, 7, 1)])
def test_steps_of_every_size_equal_the_eager_model(name: str, batch: int, past: int, length: int) -> None:
    inputs = cached_inputs(source(name), batch=batch, past=past, length=length)
    with torch.no_grad():
        expected, actual = source(name)(**own_inputs(inputs), use_cache=True), traced(name)(**own_inputs(inputs))
    real = inputs["attention_mask"][:, past:].bool()
    assert relative_error(actual.logits[real], expected.logits[real]) < 1e-5
    for ours, theirs in zip(actual[PAST].layers, expected[PAST].layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-5)
        assert ours.values.shape[2] == past + length


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_steps_one_by_one_are_the_whole_text_at_once(name: str) -> None:
    inputs = cached_inputs(source(name), batch=3, past=0, length=8)
    inputs["attention_mask"][1, :3] = 0
    with torch.no_grad():
        whole = traced(name)(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        cache, logits = None, []
        for end in range(1, 9):
            ids, mask = inputs["input_ids"][:, end - 1 : end], inputs["attention_mask"][:, :end]
            result = traced(name)(input_ids=ids, attention_mask=mask, past_key_values=cache)
            cache = result[PAST]
            logits.append(result.logits)
    real = inputs["attention_mask"].bool()
    assert relative_error(torch.cat(logits, dim=1)[real], whole[real]) < 1e-5


def test_what_is_left_out_is_an_empty_cache_and_a_mask_of_ones() -> None:
    ids = torch.tensor([[5, 9, 12], [7, 3, 4]])
    with torch.no_grad():
        assert relative_error(traced("llama")(ids).logits, source("llama")(ids).logits) < 1e-5


def test_greedy_tokens_are_the_eager_models() -> None:
    ids = torch.tensor([[5, 9, 12, 40], [7, 3, 4, 8]])
    expected = source("llama").generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    tokens, cache, mask = [ids], None, torch.ones_like(ids)
    for _ in range(8):
        with torch.no_grad():
            result = traced("llama")(input_ids=tokens[-1], attention_mask=mask, past_key_values=cache)
        cache = result[PAST]
        tokens.append(result.logits[:, -1:].argmax(-1))
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_it_is_rewritten_and_merged_like_any_trace(name: str) -> None:
    torch.manual_seed(0)
    fields = {"target_modules": "all-linear", "fan_in_fan_out": name == "gpt2"}
    model = rewrite(traced(name), GraloraConfig(r=4, init_weights=False, **fields))
    inputs = cached_inputs(source(name), batch=2, past=4, length=2)
    with torch.no_grad():
        adapted: Tensor = model(**own_inputs(inputs)).logits
        assert relative_error(merge(model)(**own_inputs(inputs)).logits, adapted) < 1e-5
        assert relative_error(adapted, traced(name)(**own_inputs(inputs)).logits) > 1e-2


def test_training_keeps_attention_dropout() -> None:
    model = trace(tiny_model("llama", attention_dropout=0.5), task=TASK)
    inputs = cached_inputs(source("llama"))
    torch.manual_seed(0)
    first, second = (model.train()(**own_inputs(inputs)).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(*(model.eval()(**own_inputs(inputs)).logits for _ in range(2)))


def test_a_model_without_such_a_cache_is_refused() -> None:
    with pytest.raises(TraceError, match="BertForSequenceClassification keeps no cache of keys and values"):
        trace(tiny_model("bert"), task=TASK)
    with pytest.raises(TraceError, match=r"'text2text-generation-with-past' is not one of BertForSequence"):
        trace(tiny_model("bert"), task="text2text-generation-with-past")


def test_t5_is_no_model_of_speech() -> None:
    with pytest.raises(TraceError, match=r"takes input_features or .*, but T5ForConditionalGeneration takes input_ids"):
        trace(tiny_model("t5"), task="automatic-speech-recognition-with-past")


def test_a_model_that_fails_itself_says_so() -> None:
    model = tiny_decoder("MixtralForCausalLM", num_local_experts=2, num_experts_per_tok=3)
    with pytest.raises(TraceError, match=r"itself fails when it is called with a cache \(.*k out of range\)"):
        trace(model, task=TASK)


def test_a_cache_of_ones_own_size_may_be_the_example() -> None:
    model = source("llama")
    traced_here = trace(model, cached_inputs(model, batch=1, past=3, length=1), task=TASK)
    assert isinstance(traced_here.example_inputs[PAST], DynamicCache)
    assert traced_here(torch.tensor([[4]])).logits.shape == (1, 1, 101)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((1, 3), r"attention_mask has shape \[1, 3\], but 0 cached and 4 new positions of 2 rows need \[2, 4\]"),
        ((2, 3), r"attention_mask has shape \[2, 3\], but 0 cached"),
        ((2, 1, 4, 4), r"'attention_mask' has shape \[2, 1, 4, 4\], but the trace takes \[any, any\]"),
    ],
)
def test_a_mask_of_the_wrong_shape_is_named(mask: tuple[int, ...], message: str) -> None:
    ids = torch.randint(3, 100, (2, 4))
    for model in (traced("llama"), rewrite(traced("llama"), GraloraConfig(r=4, target_modules=["q_proj"]))):
        with pytest.raises(TraceError, match=message):
            model(input_ids=ids, attention_mask=torch.ones(mask, dtype=torch.long))


def test_a_mask_has_the_cached_positions_too_and_a_cache_the_rows_of_its_tokens() -> None:
    inputs = cached_inputs(source("llama"), batch=2, past=5, length=3)
    with pytest.raises(
        TraceError, match=r"has shape \[2, 3\], but 5 cached and 3 new positions of 2 rows need \[2, 8\]"
    ):
        traced("llama")(**{**own_inputs(inputs), "attention_mask": inputs["attention_mask"][:, :3]})
    other = cached_inputs(source("llama"), batch=1, past=5, length=3)
    with pytest.raises(TraceError, match=r"past_key_values has 1 rows, but input_ids has shape \[2, 3\]"):
        traced("llama")(**{**own_inputs(inputs), PAST: own_inputs(other)[PAST]})
    with pytest.raises(TraceError, match="past_key_values has no layers; leave it out for an empty cache"):
        traced("llama")(input_ids=inputs["input_ids"], past_key_values=DynamicCache())
    with pytest.raises(TraceError, match=r"'input_ids' has shape \[3\], but the trace takes \[any, any\]"):
        traced("llama")(**{**own_inputs(inputs), "input_ids": torch.tensor([5, 6, 7])})
