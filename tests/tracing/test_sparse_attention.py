"""Decoders whose indexer chooses the keys of each query: traced for any number of them, with the indexer's cache."""

from __future__ import annotations

import functools

import pytest
import torch
from traces import relative_error
from transformers import PreTrainedModel

from gralora_fx import TracedModel, trace
from gralora_fx.core.tracing.inputs.cache import tensors_of
from gralora_fx.core.tracing.inputs.cached_steps import cached_inputs
from gralora_fx.core.tracing.inputs.signature import own_inputs
from gralora_fx.core.tracing.sparse_attention import known_positions, only_chosen
from gralora_fx.format.input_names import PAST
from tests.architectures.tiny_decoders import tiny_decoder

CHOSEN = 4


@functools.cache
def source() -> PreTrainedModel:
    return model_that_chooses(CHOSEN)


def model_that_chooses(count: int) -> PreTrainedModel:
    # of so many heads that no two keys are equally bad
    fields = {"num_hidden_layers": 1, "mlp_layer_types": ["dense"], "layer_types": ["indexed_attention"]}
    return tiny_decoder("DeepseekV32ForCausalLM", index_topk=count, index_n_heads=16, **fields)


@functools.cache
def traced() -> TracedModel:
    return trace(source(), task="text-generation-with-past")


@pytest.mark.quick
def test_keys_that_were_not_chosen_are_hidden() -> None:
    mask = torch.tensor([[0.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])[None, None]
    hidden = only_chosen(mask, torch.tensor([[[0, 3], [2, 1]]], dtype=torch.int32))
    smallest = torch.finfo(torch.float32).min
    assert hidden.tolist() == [[[[0.0, smallest, smallest, -1.0], [smallest, 0.0, 0.0, smallest]]]]


def test_the_indexers_keys_are_part_of_the_cache() -> None:
    assert [slot.place for slot in tensors_of(traced().example_inputs[PAST])] == ["0.key", "0.value", "0.indexer"]


@pytest.mark.parametrize(("batch", "past", "length"), [(1, 0, 1), (2, 0, 3), (3, 0, 17), (1, 1, 2), (2, 9, 1)])
def test_steps_with_fewer_and_more_keys_than_are_chosen_equal_the_eager_model(
    batch: int, past: int, length: int
) -> None:
    inputs = cached_inputs(source(), batch=batch, past=past, length=length)
    with torch.no_grad():
        expected = source()(**own_inputs(inputs), use_cache=True)
        actual = traced()(**own_inputs(inputs))
    assert relative_error(actual.logits, expected.logits) < 1e-5
    for slot, tensor in tensors_of(expected.cache).items():
        assert relative_error(tensors_of(actual.cache)[slot], tensor) < 1e-5, slot.place


def test_not_all_keys_are_read() -> None:
    inputs = cached_inputs(source(), batch=1, past=9, length=1)
    models = (source(), model_that_chooses(64))
    with torch.no_grad():
        sparse, whole = (model(**own_inputs(inputs), use_cache=True).logits for model in models)
    assert relative_error(sparse, whole) > 1e-3


@pytest.mark.parametrize(("batch", "past", "length"), [(2, 0, 17), (2, 9, 2)])
def test_blocks_of_keys_are_those_that_the_models_own_loop_chooses(batch: int, past: int, length: int) -> None:
    model = model_of_blocks()
    inputs = cached_inputs(model, batch=batch, past=past, length=length)
    with torch.no_grad(), known_positions(model):
        expected = model(**own_inputs(inputs), use_cache=True)
    with torch.no_grad():
        actual = traced_blocks()(**own_inputs(inputs))
    assert relative_error(actual.logits, expected.logits) < 1e-5


def test_not_all_blocks_are_read() -> None:
    inputs = cached_inputs(model_of_blocks(), batch=1, past=0, length=17)
    with torch.no_grad():
        few, all_of_them = (
            m(**own_inputs(inputs), use_cache=True).logits for m in (model_of_blocks(), tiny_blocks(64))
        )
    assert relative_error(few, all_of_them) > 1e-3


def tiny_blocks(budget: int) -> PreTrainedModel:
    return tiny_decoder("Qwen4ExpForCausalLM", indexer_n_heads=16, indexer_budget=budget)


@functools.cache
def model_of_blocks() -> PreTrainedModel:
    return tiny_blocks(8)


@functools.cache
def traced_blocks() -> TracedModel:
    return trace(model_of_blocks(), task="text-generation-with-past")
