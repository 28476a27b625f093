"""Encoder-decoders traced with a cache: encoder and decoder in one graph, for first steps and for those after them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from traces import relative_error
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from gralora_fx import GraloraConfig, TracedModel, merge, rewrite, trace
from gralora_fx.core.tracing.inputs.cached_steps import decoder_step
from gralora_fx.core.tracing.inputs.signature import own_inputs
from gralora_fx.errors import TraceError
from gralora_fx.format.input_names import PAST

NAMES = ("t5", "bart", "whisper")
ONE_LAYER = {"encoder_layers": 1, "decoder_layers": 1}
SIZES: dict[str, dict[str, Any]] = {
    "t5": {"num_layers": 1, "decoder_start_token_id": 0},
    "bart": {},
    "whisper": ONE_LAYER,
}


@functools.cache
def source(name: str) -> PreTrainedModel:
    return tiny_model(name, **SIZES[name])


def task(name: str) -> str:
    return ("automatic-speech-recognition" if name == "whisper" else "text2text-generation") + "-with-past"


@functools.cache
def traced(name: str) -> TracedModel:
    return trace(source(name), task=task(name))


def read(name: str, batch: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Make the encoder's inputs: texts of unequal length, padded on the right, or features."""
    generator = torch.Generator().manual_seed(batch)
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator)}
    ids = torch.randint(3, 100, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "length", "past", "new"), [(1, 1, 0, 1), (1, 20, 9, 1), (3, 9, 0, 6), (2, 7, 5, 4)])
def test_calls_of_every_size_equal_the_eager_model(name: str, batch: int, length: int, past: int, new: int) -> None:
    inputs = decoder_step(source(name), read(name, batch, length), past=past, length=new)
    with torch.no_grad():
        expected, actual = source(name)(**own_inputs(inputs), use_cache=True), traced(name)(**own_inputs(inputs))
    assert relative_error(actual.logits, expected.logits) < 1e-5
    for part in ("self_attention_cache", "cross_attention_cache"):
        pairs = zip(getattr(actual[PAST], part).layers, getattr(expected[PAST], part).layers, strict=True)
        for ours, theirs in pairs:
            assert torch.allclose(ours.keys, theirs.keys, atol=1e-5)
            assert torch.allclose(ours.values, theirs.values, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_steps_one_by_one_with_the_cache_given_back_are_the_whole_at_once(name: str) -> None:
    ids, cache, logits = torch.randint(3, 100, (3, 6)), None, []
    with torch.no_grad():
        whole = source(name)(**read(name), decoder_input_ids=ids).logits
        for position in range(6):
            step = ids[:, position : position + 1]
            result = traced(name)(**read(name), decoder_input_ids=step, past_key_values=cache)
            cache = result[PAST]
            logits.append(result.logits)
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.get_seq_length() == 6
    assert relative_error(torch.cat(logits, dim=1), whole) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_encoder_and_decoder_are_rewritten_trained_and_merged_alike(name: str) -> None:
    torch.manual_seed(0)
    model = rewrite(traced(name), GraloraConfig(r=4, alpha=4, init_weights=False, target_modules="all-linear"))
    paths = [site.path for site in model.sites]
    assert any("encoder" in path for path in paths)
    assert any("decoder" in path for path in paths)
    inputs: dict[str, Any] = {**read(name), "decoder_input_ids": torch.randint(3, 100, (3, 5))}
    with torch.no_grad():
        adapted = model(**inputs).logits
        assert relative_error(merge(model)(**inputs).logits, adapted) < 1e-5
        assert relative_error(adapted, source(name)(**inputs).logits) > 1e-2
    loss = model(**read(name), labels=torch.randint(3, 100, (3, 5))).loss
    loss.backward()
    parameters = dict(model.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in parameters.items() if n.endswith("gralora_A"))


def test_no_cache_of_the_encoders_output_is_left_in_the_graph() -> None:
    graph = traced("bart").graph_module.graph
    assert not [node for node in graph.nodes if "lift_fresh" in str(node.target) or "detach" in str(node.target)]
    assert sum(node.target is torch.ops.aten.cat.default for node in graph.nodes) == 4  # keys and values, two layers


def test_one_row_may_be_the_example() -> None:
    bart = tiny_model("bart", **ONE_LAYER)
    example = decoder_step(bart, read("bart", batch=1, length=4), past=1, length=1)
    model = trace(bart, example, task=task("bart"))
    inputs = decoder_step(bart, read("bart"), past=4, length=2)
    with torch.no_grad():
        expected = bart(**own_inputs(inputs)).logits
        assert relative_error(model(**own_inputs(inputs)).logits, expected) < 1e-5


def test_a_task_that_does_not_fit_is_refused() -> None:
    with pytest.raises(TraceError, match=r"'text2text-generation-with-past' is not one of LlamaForCausalLM"):
        trace(tiny_model("llama"), task="text2text-generation-with-past")


def test_a_model_of_texts_is_not_one_of_speech() -> None:
    with pytest.raises(
        TraceError, match=r"takes input_features or .*, but BartForConditionalGeneration takes input_ids"
    ):
        trace(source("bart"), task="automatic-speech-recognition-with-past")


def test_a_cache_of_another_kind_is_not_taken() -> None:
    example = traced("bart").example_inputs
    assert isinstance(example[PAST], EncoderDecoderCache)
    assert isinstance(example[PAST].cross_attention_cache, DynamicCache)
    assert len(example[PAST].cross_attention_cache.layers) == 0
