"""Decoders of many architectures, from trace to greedy tokens: the sample of `python -m benchmarks decoders`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from tests.architectures.decoder_check import check_decoder
from tests.architectures.newer_torch import skip_if_torch_is_too_old
from tests.architectures.tiny_decoders import decoder_classes, tiny_decoder

# of parts that training alone has, which an export does not
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* was traced in evaluation mode, so training runs without:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* differs in training:UserWarning"),
    pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning"),
]

FUSED = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    "GPTNeoXForCausalLM",
    "SmolLM3ForCausalLM",
    "MixtralForCausalLM",
    "GptOssForCausalLM",
    "Gemma3nForCausalLM",  # it computes a quantile of the normal distribution, which ONNX cannot
    "PhimoeForCausalLM",  # its routers draw random numbers in training
    "Gemma4UnifiedForConditionalGeneration",  # its mask is made for blocks of images, of which a text has none
    "MossTranscribeDiarizeForConditionalGeneration",  # one table of angles for all rows
)
SLOW_AND_ALIKE = ("MixtralForCausalLM", "PhimoeForCausalLM")  # one layer is as any other, and takes long to trace


@pytest.mark.parametrize("name", FUSED)
def test_tokens_are_the_models_and_every_layer_is_fused(tmp_path: Path, name: str) -> None:
    skip_if_torch_is_too_old(name)
    model = tiny_decoder(name, **({"num_hidden_layers": 1} if name in SLOW_AND_ALIKE else {}))
    result = check_decoder(model, tmp_path / "onnx")
    assert (result.equal, result.answers) == (True, "")
    assert (result.fused, result.plain) == (model.config.get_text_config().num_hidden_layers, {})
    assert result.sites > 2


def test_attention_that_does_not_fuse_is_plain_and_says_why(tmp_path: Path) -> None:
    result = check_decoder(tiny_decoder("DeepseekV3ForCausalLM"), tmp_path / "onnx")
    why = "its keys are not the cached ones and the new ones"  # they are made of a compressed cache
    assert (result.equal, result.answers, result.fused) == (True, "", 0)
    assert result.plain == {f"model.layers.{index}.self_attn": why for index in range(2)}


def test_attention_of_a_models_own_is_exported_as_it_is(tmp_path: Path) -> None:
    result = check_decoder(tiny_decoder("BloomForCausalLM"), tmp_path / "onnx")
    assert (result.equal, result.answers, result.fused) == (True, "", 0)
    assert result.plain == {"every layer": "it computes attention itself, not through transformers' interface"}


@pytest.mark.parametrize(
    ("fields", "key_heads"),
    [({}, 1), ({"new_decoder_architecture": True, "num_kv_heads": 2}, 4)],  # which repeats keys before the cache
    ids=["one head of keys", "new architecture"],
)
def test_recognised_attention_of_a_models_own_is_fused(tmp_path: Path, fields: dict[str, Any], key_heads: int) -> None:
    result = check_decoder(tiny_decoder("FalconForCausalLM", **fields), tmp_path / "onnx")
    assert (result.equal, result.answers) == (True, "")
    assert (result.fused, result.plain) == (2, {})
    nodes = ir.load(tmp_path / "onnx" / "model.onnx").graph
    heads = {node.attributes["kv_num_heads"].as_int() for node in nodes if node.op_type == "GroupQueryAttention"}
    assert heads == {key_heads}


def test_a_context_is_found_under_any_name(tmp_path: Path) -> None:
    result = check_decoder(tiny_decoder("MptForCausalLM"), tmp_path / "onnx")  # it says max_seq_len
    assert result.holds


def test_sizes_that_depend_on_the_data_do_not_stop_a_trace(tmp_path: Path) -> None:
    model = tiny_decoder("JetMoeForCausalLM", num_hidden_layers=1)  # how many tokens an expert is given
    assert check_decoder(model, tmp_path / "onnx").holds


def test_the_list_is_transformers_own() -> None:
    names = decoder_classes()
    assert set(FUSED) < set(names)
    assert len(names) > 150
