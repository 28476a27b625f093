"""Text from exported decoders: greedy tokens are those of the PyTorch model, by this engine and by others."""

from __future__ import annotations

import gc
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from genai_client import genai_tokens
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, merge, rewrite, trace
from gralora_fx.core.operators.attention import Attention
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.generate import prompt_answers
from gralora_fx.run.model import OrtModel
from gralora_fx.run.sessions.run_options import available_threads
from gralora_fx.serving import load
from tests.architectures.tiny_decoders import tiny_decoder

PROMPTS = [[5, 9, 12, 40, 3], [7, 31, 4], [60, 61, 62, 63, 64, 65, 66]]
SIZES: dict[str, Any] = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


def decoder(name: str) -> PreTrainedModel:
    return tiny_model(name, **SIZES)


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt", "gemma3", "phi3", "qwen3", "mistral"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, OrtModel]:
    """Return a merged model in PyTorch, and its export."""
    name = request.param
    torch.manual_seed(0)
    traced = trace(decoder(name), task="text-generation-with-past")
    fields = {"target_modules": "all-linear", "fan_in_fan_out": name == "gpt2"}
    model = rewrite(traced, GraloraConfig(r=4, alpha=4, init_weights=False, **fields))
    path = tmp_path_factory.mktemp(name) / "onnx"
    report = export_onnx(model, path)
    assert report.verification is not None
    assert report.verification.passed
    return merge(model), load(path)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Tokens of the PyTorch model, one step at a time."""
    ids, cache, tokens = torch.tensor([prompt]), None, []
    for _ in range(count):
        with torch.no_grad():
            result = model(input_ids=ids, past_key_values=cache)
        cache, token = result.past_key_values, int(result.logits[0, -1].argmax())
        if token == 2:
            break
        tokens.append(token)
        ids = torch.tensor([[token]])
    return tokens


def test_greedy_tokens_are_pytorchs(served: tuple[Any, OrtModel]) -> None:
    model, ort = served
    expected = [greedy(model, prompt, 16) for prompt in PROMPTS]
    assert [ort.generate(prompt, max_new_tokens=16) for prompt in PROMPTS] == expected
    assert ort.generate(PROMPTS, max_new_tokens=16) == expected  # rows of unequal length, padded and run together


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # with a window too
def test_a_prompt_read_in_pieces_is_the_prompt(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = trace(decoder(name), task="text-generation-with-past")
    export_onnx(traced, tmp_path / "onnx")
    prompt = torch.randint(3, 100, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    monkeypatch.setattr(prompt_answers, "_CHUNK", 16)
    assert load(tmp_path / "onnx").generate(prompt, max_new_tokens=8) == greedy(traced.eval(), prompt, 8)


def test_onnxruntime_genai_gives_the_same_tokens(served: tuple[Any, OrtModel]) -> None:
    _, ort = served
    for prompt in PROMPTS:
        assert genai_tokens(ort.directory, prompt, 16) == ort.generate(prompt, max_new_tokens=16)


def test_the_graph_has_the_ecosystems_names_and_one_attention_a_layer(served: tuple[Any, OrtModel]) -> None:
    import onnx

    _, ort = served
    names = list(ort.input_names)
    assert names[:2] == ["input_ids", "attention_mask"]
    assert names[-4:] == [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert list(ort.output_names) == ["logits", *(f"present.{n}.{kind}" for n in (0, 1) for kind in ("key", "value"))]
    graph = onnx.load(str(ort.directory / "model.onnx"), load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("GroupQueryAttention") == 2
    axes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert axes["input_ids"] == ["batch_size", "sequence_length"]
    assert axes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert axes["past_key_values.0.key"][0] == "batch_size"
    assert axes["past_key_values.0.key"][2] == "past_sequence_length"
    assert axes["present.0.key"][2] == "total_sequence_length"
    assert axes["logits"][1] == 1


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    path = tmp_path_factory.mktemp("llama") / "onnx"
    export_onnx(trace(decoder("llama"), task="text-generation-with-past"), path, logits="all")
    return load(path)


def test_sampling_follows_its_seed(llama: OrtModel) -> None:
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "top_k": 0}
    first, again, other = (llama.generate(PROMPTS[0], seed=seed, **options) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert llama.generate(PROMPTS[0], **{**options, "top_k": 1}) == llama.generate(PROMPTS[0], max_new_tokens=12)


def test_streaming_gives_the_same_tokens_piece_by_piece(llama: OrtModel) -> None:
    whole = llama.generate(PROMPTS[0], max_new_tokens=9)
    pieces = list(llama.generate(PROMPTS[0], max_new_tokens=9, stream=True))
    assert [token for piece in pieces for token in piece] == whole
    assert len(pieces) >= len(whole)


def test_all_logits_are_given_on_request(llama: OrtModel) -> None:
    model, ids = decoder("llama"), torch.tensor([PROMPTS[0]])
    cache = {name: torch.zeros(1, 2, 0, 8) for name in llama.input_names if name.startswith("past")}
    outputs = llama(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(5)[None], **cache)
    with torch.no_grad():
        assert torch.allclose(outputs.logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([5, 101], {}, "prompt 0 holds token 101, outside the vocabulary of 101 tokens"),
        ([[5], [-1]], {}, "prompt 1 holds token -1"),
        ([[5], []], {}, "prompt 1 is empty; give at least one token"),
        ([], {}, "there is no prompt; give at least one"),
        (
            [5] * 60,
            {"max_new_tokens": 5},
            "prompt 0 has 60 tokens and max_new_tokens=5, more than the context of 64; give max_new_tokens=4 or",
        ),
        ([[5], [5] * 64], {}, "prompt 1 has 64 tokens, more than the context of 64; shorten it"),
        ("a text", {}, "the export holds no tokenizer; give token ids"),
        ([5], {"stop": "."}, "stop strings need a tokenizer"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 on, but got 0"),
        ([5], {"top_p": 0}, r"top_p must be in \(0, 1\], but got 0"),
        ([5], {"temperature": 0}, "temperature must be above 0, but got 0; take do_sample=False"),
        ([5], {"beams": 2}, "unknown option beams; there are stop, stream, adapter, max_"),
        ([5], {"token_type_ids": [0]}, "unknown option token_type_ids; there are stop, stream, adapter, max_"),
        (
            [5],
            {"temperature": 0.7},
            "temperature has no effect where the likeliest token is taken; give do_sample=True",
        ),
        ([5], {"top_k": 5, "seed": 1}, "top_k, seed have no effect .* give do_sample=True, or leave them out"),
        ([5], {"top_p": None}, r"top_p must be in \(0, 1\], but got None"),
        ([5], {"temperature": float("nan")}, "temperature must be above 0, but got nan"),
        ([5], {"temperature": "hot"}, "temperature must be above 0, but got 'hot'"),
        ([5], {"do_sample": "yes"}, "do_sample must be True or False, but got 'yes'"),
        ([5], {"do_sample": True, "seed": -1}, "seed must be a whole number from 0 on, but got -1"),
        ([5], {"do_sample": True, "seed": 10**5000}, "seed must be 2147483647 at most"),
        ([5], {"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ([5], {"stream": 1}, "stream must be True or False"),
        ([5], {"stop": None}, "stop must be a string or a list of strings, but got None"),
        ([5], {"stop": [b"."]}, "stop must be a string or a list of strings"),
        ([5.5], {}, "a prompt is text, a list of messages or a list of token ids, but got 5.5"),
        ([True], {}, "a prompt is text, a list of messages or a list of token ids, but got True"),
        ([[5, "a"]], {}, r"a prompt is text, .* but got \[5, 'a'\]"),
        ([[5], None], {}, "a prompt is text, .* but got None"),
        (
            [{"role": "user", "contents": "a"}],
            {},
            r"a message of a chat has a 'role' and its 'content', but got",
        ),
        ([{"rol": "user", "content": "a"}], {}, "a message of a chat has a 'role' and its 'content'"),
        (5, {}, "prompts are a text, a list of messages, a list of token ids or a list of these, but got 5"),
        (b"text", {}, "prompts are a text, .* but got b'text'"),
        ({"input_ids": [5]}, {}, r"pass a tokenizer's result by name: generate\(\*\*tokenizer"),
        (torch.ones(1, 1, 1, dtype=torch.long), {}, "token ids have one or two axes and values, but got tensor"),
        (torch.ones(2, dtype=torch.long, device="meta"), {}, "token ids have one or two axes and values"),
        (torch.ones(1, 3), {}, "a prompt is text, a list of messages or a list of token ids, but got tensor"),
        (None, {}, "give prompts, or input_ids and attention_mask"),
        ([5], {"input_ids": [5]}, "prompts and input_ids are both given; give one of them"),
        ([5], {"attention_mask": [1]}, "give prompts, or input_ids and attention_mask"),
        (None, {"input_ids": [[5, 6]], "attention_mask": [[1]]}, r"attention_mask must have the shape of input_ids"),
        (None, {"input_ids": [[5]], "attention_mask": [[2]]}, "attention_mask must be 1 where a position counts"),
        (None, {"input_ids": [[5]], "attention_mask": [[1.0]]}, "attention_mask must be 1 where a position counts"),
        (None, {"input_ids": [[5], [7]], "attention_mask": [[1], [0]]}, "prompt 1 is empty"),
        (None, {"input_ids": [[5.0]]}, "input_ids must be whole numbers of one or two axes"),
        (None, {"input_ids": "abc"}, "input_ids must be a tensor, an array or lists, but got 'abc'"),
    ],
)
def test_bad_input_is_named(llama: OrtModel, prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        llama.generate(prompts, **options)


def test_an_export_without_a_cache_cannot_generate(tmp_path: Path) -> None:
    export_onnx(trace(decoder("llama")), tmp_path / "onnx")
    with pytest.raises(ServingError, match=r"this export \(task 'text-generation'\) has no cache"):
        load(tmp_path / "onnx").generate([5])


def test_an_attention_that_cannot_be_fused_is_plain_and_named(tmp_path: Path) -> None:
    traced = trace(decoder("llama"), task="text-generation-with-past")

    def scale_the_keys(graph_module: torch.fx.GraphModule) -> None:
        node, attention = next(Attention.all_in(graph_module.graph))
        with graph_module.graph.inserting_before(node):
            scaled = graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (attention.key, 2.0))
        scaled.meta["val"] = attention.key.meta["val"]
        replace(attention, key=scaled).write(node)

    report = export_onnx(traced.with_pass(scale_the_keys), tmp_path / "onnx")
    assert report.attention is not None
    assert report.attention.fused == 1
    plain = {"model.layers.0.self_attn": "its keys are not the cached ones and the new ones"}
    assert report.attention.plain == plain
    assert read_manifest(tmp_path / "onnx").attention == {"fused": 1, "plain": plain}
    assert "attention: 1 layers fused, 1 not\n  model.layers.0.self_attn: its keys are not" in report.details
    assert len(load(tmp_path / "onnx").generate([[5, 9, 12], [7]], max_new_tokens=6)) == 2  # a cache that grows


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    """Return an export with a tokenizer."""
    path = tmp_path_factory.mktemp("speaking") / "onnx"
    traced = trace(decoder("llama"), task="text-generation-with-past")
    export_onnx(traced, path, tokenizer=tiny_tokenizer(), verify=False)
    return load(path)


def sampling(speaking: OrtModel) -> dict[str, Any]:
    """Options that make twelve plain letters of the prompt "abc", all of them different."""
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 12}
    seeds = (seed for seed in range(100) if len(set(speaking.generate("abc", seed=seed, **options)) - {"\ufffd"}) == 12)
    return {**options, "seed": next(seeds)}


def test_texts_are_those_of_their_tokens(speaking: OrtModel) -> None:
    options = sampling(speaking)
    text = speaking.generate("abc", **options)
    ids = speaking.generate(speaking.tokenizer("abc")["input_ids"], **options)
    assert text == speaking.tokenizer.decode(ids, skip_special_tokens=True)
    assert list(speaking.generate("abc", stream=True, **options)) == list(text)


def test_what_a_tokenizer_gives_is_generated_from(speaking: OrtModel) -> None:
    """Padded on either side or not at all, as tensors, arrays or lists; the answers are those of the texts."""
    texts, tokenizer = ["abc", "hello", "x"], speaking.tokenizer
    expected = [speaking.generate(tokenizer(text)["input_ids"], max_new_tokens=6) for text in texts]
    assert speaking.generate(**tokenizer(texts), max_new_tokens=6) == expected
    for side in ("left", "right"):
        tokenizer.padding_side = side
        for kind in (None, "np", "pt"):
            encoded = tokenizer(texts, padding=True, return_tensors=kind)
            assert speaking.generate(**encoded, max_new_tokens=6) == expected
    assert speaking.generate(**tokenizer("abc"), max_new_tokens=6) == expected[0]
    assert speaking.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=6) == expected[:1]
    pieces = list(speaking.generate(**tokenizer(["abc"]), max_new_tokens=6, stream=True))
    assert [token for (piece,) in pieces for token in piece] == expected[0]


@pytest.mark.parametrize("prompt", ["a\ud800", ["abc", "\udfff"]])
def test_what_the_tokenizer_does_not_take_is_named(speaking: OrtModel, prompt: Any) -> None:
    with pytest.raises(ServingError, match="the tokenizer does not take the prompt"):
        speaking.generate(prompt)


def test_a_chat_needs_a_template_and_is_not_repeated(speaking: OrtModel) -> None:
    with pytest.raises(ServingError, match=r"no chat template: .*/v1/completions") as error:
        speaking.generate([{"role": "user", "content": "a secret"}])
    assert "secret" not in str(error.value)


def test_a_stop_string_that_is_not_text_is_refused(speaking: OrtModel) -> None:
    with pytest.raises(ServingError, match="has a lone surrogate, which no text has"):
        speaking.generate("abc", stop=["a", "b\ud800"])


def test_several_threads_get_their_own_answers(llama: OrtModel) -> None:
    expected = [llama.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: llama.generate(prompt, max_new_tokens=12), PROMPTS * 4))
    assert answers == expected * 4


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not count threads")
@pytest.mark.usefixtures("own_garbage")
@pytest.mark.parametrize("threads", [1, 3, None])
def test_calls_and_generation_start_no_more_threads_than_that(llama: OrtModel, threads: int | None) -> None:
    """One pool, in which the caller's thread works too."""
    load(llama.directory, threads=threads).generate([5], max_new_tokens=1)  # what a process starts once
    gc.collect()
    counts = [len(os.listdir("/proc/self/task"))]
    model = load(llama.directory, threads=threads)
    counts.append(len(os.listdir("/proc/self/task")))
    model.generate([5], max_new_tokens=1)
    counts.append(len(os.listdir("/proc/self/task")))
    expected = (threads or available_threads()) - 1
    assert [after - before for before, after in itertools.pairwise(counts)] == [expected, 0]


def test_generation_on_another_provider(llama: OrtModel) -> None:
    with pytest.warns(UserWarning, match="AzureExecutionProvider takes no node of this model"):
        other = load(llama.directory, ["AzureExecutionProvider", "CPUExecutionProvider"])
    assert other.generate(PROMPTS, max_new_tokens=6) == llama.generate(PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize("count", [5, 12])
def test_what_is_streamed_is_the_answer_before_the_stop_string(speaking: OrtModel, count: int) -> None:
    options = sampling(speaking)
    text = speaking.generate("abc", **options)
    options["max_new_tokens"] = count
    stop = text[4:7]  # with five tokens it has only begun when the answer is full
    expected = text[:4] if count == 12 else text[:5]
    assert speaking.generate("abc", stop=stop, **options) == expected
    pieces = list(speaking.generate("abc", stop=stop, stream=True, **options))
    assert "".join(pieces) == expected
    assert pieces[:4] == list(text[:4])


def test_an_empty_stop_string_is_refused(speaking: OrtModel) -> None:
    with pytest.raises(ServingError, match="a stop string is empty, and would end every answer at once"):
        speaking.generate("abc", stop=["x", ""])


# -- one step at a time, by calls ---------------------------------------------------------------------


def test_a_model_is_called_with_its_own_cache(llama: OrtModel) -> None:
    """Mask, positions and an empty cache may be left out; the next step takes the cache that was given."""
    source, ids = decoder("llama"), torch.tensor([PROMPTS[0]])
    first = llama(input_ids=ids[:, :3])
    cache = {name.replace("present", "past_key_values"): t for name, t in first.items() if name.startswith("present")}
    second = llama(input_ids=ids[:, 3:], **cache)
    with torch.no_grad():
        expected = source(ids).logits
    assert torch.allclose(torch.cat([first.logits, second.logits], dim=1), expected, atol=1e-5)


def past(length: int, batch: int = 1, heads: int = 2, layers: int = 2) -> dict[str, Any]:
    kinds = [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    return {name: torch.zeros(batch, heads, length, 8) for name in kinds}


IDS = torch.tensor([[5, 9]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"input_ids": IDS, "attention_mask": torch.ones(1, 3), **past(4)},
            "input 'attention_mask' is float32, but the model takes int64",
        ),
        (
            {"input_ids": IDS, "attention_mask": [[1, 1, 1]], **past(4)},
            r"'attention_mask' has shape \[1, 3\], but 4 cached and 2 new positions need \[1, 6\]; give a mask over",
        ),
        (
            {"input_ids": IDS, "attention_mask": [[1, 1, 1]]},
            r"'attention_mask' has shape \[1, 3\], but 0 cached and 2 new positions need \[1, 2\]",
        ),
        (
            {"input_ids": IDS, "attention_mask": [1, 1]},
            r"'attention_mask' has shape \[2\], but the model takes \['batch_size', 'total_sequence_length'\]",
        ),
        (
            {"input_ids": IDS, "attention_mask": [[1, 1], [1, 1]]},
            "'attention_mask' has batch_size 2, but 'input_ids' has 1",
        ),
        ({"input_ids": IDS, **past(4, batch=3)}, "has batch_size .*, but .* has "),
        (
            {"input_ids": IDS, **past(4, heads=3)},
            r"'past_key_values.0.key' has shape \[1, 3, 4, 8\], but the model takes \['batch_size', 2, ",
        ),
        ({"input_ids": IDS, **past(4, layers=1)}, "input 'past_key_values.1.key' is missing"),
        ({"input_ids": IDS, **past(4, layers=3)}, "unknown input past_key_values.2.key, past_key_values.2.value"),
        (
            {"input_ids": IDS, **past(4), "past_key_values.1.value": torch.zeros(1, 2, 5, 8)},
            "'past_key_values.1.value' has past_sequence_length 5, but 'past_key_values.0.key' has 4",
        ),
        ({"input_ids": [[5, -1]]}, "'input_ids' holds -1, but ids are 0 or more; mask padding instead"),
        ({"input_ids": [[5, 101]]}, "'input_ids' holds token 101, outside the vocabulary of 101 tokens"),
        ({"input_ids": IDS, "position_ids": [[-1, 0]]}, "'position_ids' holds -1, but ids are 0 or more"),
        ({"attention_mask": [[1]]}, r"'input_ids' is missing; the model takes .*position_ids, past_key_values\.\.\.$"),
        ({"input_ids": IDS, "attention_mask": [[1, 2]]}, "'attention_mask' must be 1 where a position counts and 0"),
    ],
)
def test_bad_steps_are_named(llama: OrtModel, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        llama(**inputs)


def test_a_context_that_no_file_names_is_assumed_aloud(tmp_path: Path) -> None:
    export_onnx(
        trace(tiny_decoder("BloomForCausalLM"), task="text-generation-with-past"), tmp_path / "onnx", verify=False
    )
    model = load(tmp_path / "onnx")
    with pytest.raises(ServingError, match=r"more than the context of 2048, which is assumed since config\.json names"):
        model.generate(input_ids=[[5] * 2048], max_new_tokens=1)
    decoder = model.decoder(rows=1, capacity=2100, chunk=2090)
    row = decoder.open()
    assert decoder.step({row: [5] * 2090})[row].shape == (decoder.limits.vocabulary,)
