"""`generate` over a trace, by transformers' own loop, and the names that users of transformers and PEFT know."""

from __future__ import annotations

import copy
import functools
import inspect
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_oracle import same_adapter
from tiny_models import text_batch, tiny_model
from tiny_tokenizers import tiny_tokenizer
from torch import nn
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite, trace
from gralora_fx.core.tracing.as_transformers import check_generation
from gralora_fx.errors import RewriteError, TraceError

DECODER, TRANSLATOR = "text-generation-with-past", "text2text-generation-with-past"
# name: (sizes, task)
GENERATORS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, DECODER),
    "gpt2": ({}, DECODER),
    "mistral": ({"sliding_window": 5}, DECODER),
    "t5": ({"decoder_start_token_id": 0, "num_layers": 1}, TRANSLATOR),
}
Pair = tuple[GraloraModel, peft.PeftModel]


@functools.cache
def pair(name: str) -> Pair:
    sizes, task = GENERATORS[name]
    with tempfile.TemporaryDirectory() as directory:
        return same_adapter(tiny_model(name, **sizes), Path(directory), task=task)


@pytest.fixture(params=GENERATORS)
def generators(request: pytest.FixtureRequest) -> Pair:
    return pair(request.param)


@pytest.fixture
def llamas() -> Pair:
    return pair("llama")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20, "temperature": 1.5, "num_return_sequences": 2},
        {"use_cache": False},
        {"repetition_penalty": 1.3, "min_new_tokens": 3},
    ],
    ids=str,
)
def test_tokens_are_those_of_pefts_generate(generators: Pair, options: dict[str, Any]) -> None:
    batch, tokens = text_batch(padding="left"), []
    for model in generators:
        torch.manual_seed(3)
        tokens.append(model.generate(**batch, max_new_tokens=6, **options))
    assert torch.equal(*tokens)
    assert len({tuple(row) for row in tokens[0][:, -6:].tolist()}) > 1, "rows that are all alike show nothing"


def test_the_prompt_by_position_and_a_configuration(llamas: Pair) -> None:
    ids = text_batch(padding="left")["input_ids"]
    config = transformers.GenerationConfig(max_new_tokens=4, pad_token_id=0)
    ours, theirs = (model.generate(ids, generation_config=config) for model in llamas)
    assert torch.equal(ours, theirs)
    model_copy = copy.deepcopy(llamas[0])
    model_copy.generation_config = transformers.GenerationConfig(max_new_tokens=4, pad_token_id=0)
    assert torch.equal(model_copy.generate(inputs=ids), theirs)


def test_scores_and_a_cache_to_go_on_with(llamas: Pair) -> None:
    batch = text_batch(padding="left")
    ours, theirs = (
        model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, output_scores=True) for model in llamas
    )
    assert all(torch.allclose(left, right, atol=1e-5) for left, right in zip(ours.scores, theirs.scores, strict=True))
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.long)], dim=1)
    more = llamas[0].generate(ours.sequences, attention_mask=mask, cache=ours.cache, max_new_tokens=3)
    assert torch.equal(more, llamas[1].generate(**batch, max_new_tokens=7))
    step = llamas[0](input_ids=more[:, -1:], cache=llamas[0](**batch).past_key_values)
    assert step.logits.shape == (3, 1, 101)


def test_a_streamer_and_the_mode(llamas: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = (copy.deepcopy(model).train() for model in llamas)
    prompt = tiny_tokenizer()("Hello", return_tensors="pt", return_token_type_ids=False)
    text = []
    for model in (ours, theirs):
        model.generate(**prompt, max_new_tokens=5, streamer=transformers.TextStreamer(tiny_tokenizer()))
        text.append(capsys.readouterr().out)
    assert text[0] == text[1] != ""
    assert ours.training
    assert not ours.generate(**prompt, max_new_tokens=2).requires_grad


def test_adapters_switch_what_is_generated(llamas: Pair) -> None:
    ours, theirs = llamas
    batch = text_batch(padding="left")
    with ours.disable_adapter(), theirs.disable_adapter():
        base = ours.generate(**batch, max_new_tokens=8)
        assert torch.equal(base, theirs.generate(**batch, max_new_tokens=8))
    adapted = ours.generate(**batch, max_new_tokens=8)
    assert not torch.equal(base, adapted)
    assert torch.equal(ours.traced.generate(**batch, max_new_tokens=8), base)
    assert torch.equal(merge(ours).generate(**batch, max_new_tokens=8), adapted)
    ours.merge_adapter()
    try:
        assert torch.equal(ours.generate(**batch, max_new_tokens=8), adapted)
    finally:
        ours.unmerge_adapter()


def test_pipelines(llamas: Pair) -> None:
    ours, theirs = (
        transformers.pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), device="cpu")(
            ["Hello", "An"], max_new_tokens=4, do_sample=False
        )
        for model in llamas
    )
    assert ours == theirs


def test_a_trace_without_a_cache_generates_slowly_and_says_so() -> None:
    eager = tiny_model("llama")
    model = rewrite(trace(eager, task="text-generation"), GraloraConfig(r=4, target_modules="all-linear"))
    batch = text_batch(padding="left")
    want = eager.generate(batch["input_ids"], max_new_tokens=4)
    with pytest.warns(UserWarning, match=r"traced without a cache.*task='text-generation-with-past'"):
        assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=4), want)
    with pytest.raises(TraceError, match=r"rows of unequal length need position_ids.*text-generation-with-past"):
        model.generate(**batch, max_new_tokens=4, use_cache=False)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "does not support cache_implementation"),
        ({"prompt_lookup_num_tokens": 3}, "does not support prompt_lookup_num_tokens"),
        ({"generation_config": transformers.GenerationConfig(prefill_chunk_size=2)}, "does not support prefill_chunk"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions was not part of the trace"),
        ({"cache": "cache"}, "takes a DynamicCache, but got a str"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "'inputs_embeds' was not part of the trace"),
        ({"max_new_token": 3}, "max_new_token"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_without_effect_are_refused(llamas: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llamas[0].generate(torch.tensor([[5, 6]]), **{"max_new_tokens": 2, **options})


def test_models_that_do_not_generate_or_in_a_way_of_their_own() -> None:
    model = rewrite(fresh_trace("bert"), GraloraConfig(r=4, target_modules=["query"]))
    assert not model.can_generate()
    with pytest.raises(TraceError, match="BertForSequenceClassification does not generate"):
        model.generate(torch.tensor([[5, 6]]))
    whisper = transformers.WhisperForConditionalGeneration
    with pytest.raises(TraceError, match=r"customises generation \(generate, prepare_inputs_for_generation\)"):
        check_generation(whisper.__name__, whisper, {})
    for alike in (
        transformers.Phi3ForCausalLM,
        transformers.Gemma3ForCausalLM,
        transformers.BartForConditionalGeneration,
    ):
        check_generation(alike.__name__, alike, {})


# -- names ------------------------------------------------------------------------------------------------------------


def test_attributes_are_those_of_pefts_model(llamas: Pair) -> None:
    ours, theirs = llamas
    for name in ("device", "dtype", "main_input_name", "active_adapter", "active_adapters"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert isinstance(ours, peft.PeftModel)
    assert isinstance(ours, GraloraModel)
    assert ours.peft_config == {"default": ours.configs["default"]}
    assert ours.active_peft_config is ours.configs["default"]
    assert ours.get_base_model()._get_name() == theirs.get_base_model()._get_name()
    assert ours.base_model.model._get_name() == theirs.base_model.model._get_name()
    assert ours.get_base_model().config is ours.config
    assert ours.can_generate()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not hasattr(ours, "hf_device_map")
    for flags in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**flags) == theirs.num_parameters(**flags), flags
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    inputs = {"input_ids": text_batch()["input_ids"]}
    assert torch.allclose(ours.get_base_model()(**inputs).logits, theirs.get_base_model()(**inputs).logits, atol=1e-5)


def test_embeddings_are_the_parameters_that_the_graph_reads(llamas: Pair) -> None:
    ours, theirs = llamas
    table, head = ours.get_input_embeddings(), ours.get_output_embeddings()
    assert table.weight is ours.traced.tree.parameters["model.embed_tokens.weight"]
    assert isinstance(table, nn.Embedding)
    assert isinstance(head, nn.Linear)
    assert torch.equal(table(torch.tensor([3])), theirs.get_input_embeddings()(torch.tensor([3])))
    with pytest.raises(TraceError, match="a hook on it would never run"):
        table.register_forward_hook(lambda *_: None)
    vision = rewrite(fresh_trace("vit"), GraloraConfig(r=4, target_modules="all-linear"))
    assert vision.main_input_name == "pixel_values"
    with pytest.raises(TraceError, match=r"is a ViT.*Embeddings"):
        vision.get_input_embeddings()


def test_an_adapters_copy_of_the_embeddings_is_what_is_shown() -> None:
    config = GraloraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = rewrite(pair("llama")[0].traced, config)
    assert model.get_input_embeddings().weight.requires_grad
    assert (
        model.get_input_embeddings().weight
        is dict(model.named_parameters())["graph_module.gralora.default.model.embed_tokens.weight"]
    )


def test_a_copy_has_the_same_class_and_signature(llamas: Pair) -> None:
    again = copy.deepcopy(llamas[0])
    assert isinstance(again, peft.PeftModel)
    signature = list(inspect.signature(again.forward).parameters)
    inputs = ["input_ids", "attention_mask", "position_ids", "past_key_values"]
    assert signature == [*inputs, "labels", "adapter_names", "kwargs"]


def test_a_method_that_a_graph_cannot_follow_says_so(llamas: Pair) -> None:
    with pytest.raises(RewriteError, match="graph"):
        llamas[0].get_layer_status()  # type: ignore[operator]  # PEFT's
