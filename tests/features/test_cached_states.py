"""Decoders traced with states in their cache: a step takes a layer's state and gives the next one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from traces import relative_error
from transformers import DynamicCache, PreTrainedModel

from gralora_fx import TracedModel, trace
from gralora_fx.core.tracing.inputs import cached_steps
from gralora_fx.core.tracing.inputs.cache import cached_slots, tensors_of
from gralora_fx.core.tracing.inputs.cached_steps import cached_inputs
from gralora_fx.core.tracing.inputs.signature import own_inputs
from gralora_fx.errors import TraceError
from gralora_fx.features.states.state_kinds import KINDS as STATES
from gralora_fx.format.cache_slots import KINDS, CacheSlot, slot_of
from gralora_fx.format.input_names import PAST
from tests.architectures.tiny_decoders import tiny_decoder

LFM2 = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}


@functools.cache
def source() -> PreTrainedModel:
    return tiny_decoder("Lfm2ForCausalLM", **LFM2)


@functools.cache
def traced() -> TracedModel:
    return trace(source(), task="text-generation-with-past")


def run(model: Any, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.quick
def test_the_name_of_a_tensor_tells_what_it_is() -> None:
    slots = [
        CacheSlot(3, STATES["conv"]),
        CacheSlot(0, STATES["recurrent"], 2),
        CacheSlot(1, KINDS["key"], 0, "decoder"),
    ]
    assert [slot.past for slot in slots] == [
        "past_key_values.3.conv", "past_key_values.0.recurrent.2", "past_key_values.1.decoder.key"
    ]  # fmt: skip
    assert [slot_of(name) for slot in slots for name in (slot.past, slot.present)] == [s for s in slots for _ in (0, 1)]
    assert [slot_of(name) for name in ("logits", "past_key_values.0.other", "present.key", "present.0.conv.x")] == 4 * [
        None
    ]


def test_a_state_holds_the_inputs_that_are_read_again() -> None:
    slots = {slot.place: tuple(t.shape) for slot, t in tensors_of(traced().example_inputs[PAST]).items()}
    assert slots == {"0.conv": (2, 32, 2), "1.key": (2, 2, 6, 8), "1.value": (2, 2, 6, 8), "2.conv": (2, 32, 2)}
    assert [slot.place for slot in cached_slots(traced().example_inputs)] == list(slots)


def test_a_recurrent_state_of_the_shape_of_a_convolutions_is_kept_whole() -> None:
    model = tiny_decoder("MambaForCausalLM", state_size=4, conv_kernel=4)
    slots = {slot.place: tuple(t.shape) for slot, t in tensors_of(cached_inputs(model)[PAST]).items()}
    assert slots["0.conv"] == (2, slots["0.recurrent"][1], 3)
    assert slots["0.recurrent"][2] == 4
    graph = trace(model, task="text-generation-with-past")
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))
    cache = run(graph, input_ids=ids[:, :5])[PAST]
    step = run(graph, input_ids=ids[:, 5:], **{PAST: cache})
    assert relative_error(step.logits, run(model, input_ids=ids).logits[:, 5:]) < 1e-5


def test_a_state_of_the_shape_of_another_layers_kernel_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dilated convolution that reads four inputs again, beside one whose kernel is four wide, of as many channels."""
    monkeypatch.setattr(cached_steps, "check_has_step", lambda _: None)  # the model is refused for another reason
    linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_conv_kernel_dim": 4}
    dilated = {"ple_layer_ids": [1], "ngram_size": 2, "ple_conv_kernel_size": 3, "ple_embed_dim": 16}
    ngrams = {"heads_per_ngram": 2, "split_ngram_parts": 1, "ngram_vocab_size_base": 64}
    model = tiny_decoder(
        "Qwen4ExpForCausalLM",
        **{**linear, **dilated, **ngrams, "linear_key_head_dim": 32, "linear_value_head_dim": 64, "hc_count": 4},
        make_ngram_vocab_size_divisible_by=2,
        eos_token_id=2,
    )
    slots = {slot.place: tuple(t.shape[1:]) for slot, t in tensors_of(cached_inputs(model)[PAST]).items()}
    assert (slots["0.conv"], slots["0.conv.1"]) == ((128, 3), (128, 4))


@pytest.mark.parametrize(("batch", "past", "length"), [(1, 0, 1), (1, 9, 1), (3, 0, 6), (2, 5, 4), (4, 7, 1)])
def test_steps_of_every_size_equal_the_eager_model(batch: int, past: int, length: int) -> None:
    inputs = cached_inputs(source(), batch=batch, past=past, length=length)
    before = tensors_of(own_inputs(inputs)[PAST])
    expected, actual = run(source(), **own_inputs(inputs), use_cache=True), run(traced(), **inputs)
    assert relative_error(actual.logits, expected.logits) < 1e-5
    ours, theirs = tensors_of(actual[PAST]), tensors_of(expected[PAST])
    assert all(torch.allclose(tensor, theirs[slot], atol=1e-5) for slot, tensor in ours.items())
    assert all(torch.equal(tensor, before[slot]) for slot, tensor in tensors_of(inputs[PAST]).items())  # a run keeps it


def test_a_cache_of_the_model_itself_is_taken_and_an_empty_one() -> None:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = run(source(), input_ids=ids).logits
    assert relative_error(run(traced(), input_ids=ids).logits, whole) < 1e-5
    assert relative_error(run(traced(), input_ids=ids, cache=DynamicCache(config=source().config)).logits, whole) < 1e-5
    eager = run(source(), input_ids=ids[:, :7], use_cache=True).cache
    step = run(traced(), input_ids=ids[:, 7:], cache=eager)
    assert relative_error(step.logits, whole[:, 7:]) < 1e-5


def test_transformers_generates_over_the_trace() -> None:
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(traced().generate(ids, **options), source().generate(ids, **options))


def test_a_cache_of_another_model_or_other_rows_is_refused() -> None:
    ids = torch.ones(1, 2, dtype=torch.long)
    other = tiny_decoder("Lfm2ForCausalLM", **{**LFM2, "layer_types": ["conv", "conv", "full_attention"]})
    foreign = run(other, input_ids=ids, use_cache=True).cache
    with pytest.raises(TraceError, match=r"past_key_values has none at 1\.key, where a step of 1 rows takes"):
        traced()(input_ids=ids, cache=foreign)
    with pytest.raises(TraceError, match=r"has one of shape \[2, 32, 2\] at 0\.conv, where .* takes \[1, 32, 2\]"):
        traced()(input_ids=ids, cache=cached_inputs(source())[PAST])
