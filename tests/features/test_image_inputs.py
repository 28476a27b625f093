"""A text decoder that takes embeddings beside ids: an image of a model that reads them, in exports and their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, LoraConfig, rewrite, trace
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.samples import inputs_for_task
from gralora_fx.errors import ServingError, TraceError
from gralora_fx.exporters import export_adapter, export_onnx, fold_onnx
from gralora_fx.run.model import OrtModel
from gralora_fx.serving import load
from tests.architectures.image_prompts import image_inputs_of, image_prompt, tiny_image_model
from tests.architectures.tiny_decoders import tiny_decoder

TASK = "image-text-to-text-with-past"
TEXT = [5, 6, 7, 8]
NEW = 6


class Exported(NamedTuple):
    """An export with an adapter as data, and the model with the adapter."""

    model: PreTrainedModel
    served: OrtModel
    directory: Path
    prompt: dict[str, Tensor]
    logits: Tensor
    inputs: dict[str, Tensor]


def of_one_prompt(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the features that images put in the place of tokens, without the axis of the batch."""
    axes = {"inputs_embeds": 0, "grid_position_ids": 1, "deepstack_embeds": 1}
    return {name: inputs[name].squeeze(axis) for name, axis in axes.items() if name in inputs}


def answer(model: PreTrainedModel, prompt: dict[str, Tensor]) -> list[int]:
    """Return the greedy tokens of transformers."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    tokens: list[int] = model.generate(**prompt, max_new_tokens=NEW, do_sample=False)[0].tolist()
    return tokens[prompt["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Positions of three axes, and features in several layers, beside the embeddings."""
    directory = tmp_path_factory.mktemp("images")
    model = tiny_image_model("Qwen3VLForConditionalGeneration")
    config = PeftLora(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    traced = trace(model, task=TASK)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(directory / "peft")
    loaded = GraloraModel.from_pretrained(traced, directory / "peft", adapter_name="mine")
    report = export_onnx(loaded, directory / "onnx", adapters="data", verify="quick")
    assert report.verification is not None
    assert report.verification.passed
    prompt = image_prompt(model)
    logits, inputs = image_inputs_of(model, prompt)
    return Exported(model, load(directory / "onnx", threads=1), directory, prompt, logits, inputs)


def test_an_image_is_what_the_model_makes_of_its_pixels(qwen: Exported) -> None:
    outputs = qwen.served(**qwen.inputs, adapter="mine")
    torch.testing.assert_close(outputs.logits[:, -1], qwen.logits[:, -1], rtol=1e-4, atol=1e-4)
    all_given = {**qwen.inputs, "input_ids": None}  # embeddings alone
    assert torch.equal(qwen.served(**all_given, adapter="mine").logits, outputs.logits)


@pytest.mark.quick
def test_the_manifest_and_genai_know_what_is_optional(qwen: Exported) -> None:
    manifest = json.loads((qwen.directory / "onnx" / "gralora_export.json").read_text())
    assert manifest["task"] == TASK
    assert manifest["inputs"]["inputs_embeds"] == ["batch_size", "sequence_length", 32]
    assert manifest["inputs"]["grid_position_ids"] == [3, "batch_size", "sequence_length"]
    session = qwen.served.session
    required = {value.name for value in session.get_inputs() if not value.name.startswith("past_")}
    assert required == {"input_ids", "attention_mask", "position_ids"}
    genai = json.loads((qwen.directory / "onnx" / "genai_config.json").read_text())
    assert set(genai["model"]["decoder"]["inputs"]) & {"input_ids", "inputs_embeds"} == {"input_ids"}


def test_rows_with_images_and_texts_have_their_own_answers(qwen: Exported) -> None:
    ids = qwen.prompt["input_ids"][0].tolist()
    image = of_one_prompt(qwen.inputs)
    text = {"input_ids": torch.tensor([TEXT])}
    expected = [answer(qwen.model, qwen.prompt), answer(qwen.model, text)]
    served = qwen.served
    together = served.generate(
        [ids, TEXT, ids], inputs_embeds=[image, None, image], adapter=["mine", "mine", None], max_new_tokens=NEW
    )
    assert together[:2] == expected
    assert together[2] == served.generate(ids, inputs_embeds=image, max_new_tokens=NEW) != together[0]
    assert served.generate(TEXT, adapter="mine", max_new_tokens=NEW) == together[1]


def test_what_an_image_was_is_not_shared_by_ids(qwen: Exported) -> None:
    ids = qwen.prompt["input_ids"][0].tolist() * 4
    embeds = qwen.inputs["inputs_embeds"].repeat(1, 4, 1).numpy()
    decoder = qwen.served.decoder(rows=1, prefix_cache=10**7, chunk=len(ids))
    for source, known in ((None, False), (None, True), ({"inputs_embeds": embeds}, False), (None, True)):
        row = decoder.open(source=source)
        filled = decoder.fill(row, ids)
        assert (filled > 0) == known
        decoder.step({row: ids[filled:]})
        decoder.close(row)


def test_embeddings_that_do_not_fit_are_refused(qwen: Exported) -> None:
    embeds = qwen.inputs["inputs_embeds"][0]
    ids = qwen.prompt["input_ids"][0].tolist()
    wrong: list[tuple[Any, str]] = [
        (embeds[:3], r"prompt 0 has 9 tokens and inputs_embeds 3"),
        (embeds[:, :5], r"'inputs_embeds' has shape \[1, 9, 5\]"),
        ({"inputs_embeds": embeds, "pixels": embeds}, "unknown pixels; beside ids the model takes inputs_embeds"),
        ({"grid_position_ids": torch.zeros(3, 9, dtype=torch.long)}, "start with inputs_embeds"),
    ]
    for given, message in wrong:
        with pytest.raises(ServingError, match=message):
            qwen.served.generate(ids, inputs_embeds=given, max_new_tokens=1)
    with pytest.raises(ServingError, match="a list of 2, one for each prompt"):
        qwen.served.generate([ids, ids], inputs_embeds=[embeds], max_new_tokens=1)
    with pytest.raises(ServingError, match="input 'input_ids' holds -2"):
        qwen.served(input_ids=torch.tensor([[-2]]), inputs_embeds=embeds[None, :1])


def test_tokens_of_an_image_that_see_each_other(tmp_path: Path) -> None:
    model = tiny_image_model("Gemma3ForConditionalGeneration", num_hidden_layers=1, layer_types=["full_attention"])
    logits, inputs = image_inputs_of(model, prompt := image_prompt(model))
    report = export_onnx(trace(model, task=TASK), tmp_path / "onnx", logits="all", verify=False)
    assert report.rows is not None
    assert "its mask is more than padding and a window" in str(report.rows.reason)
    served = load(tmp_path / "onnx", threads=1)
    torch.testing.assert_close(served(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
    causal = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    assert not torch.allclose(served(**causal).logits, logits, atol=1e-2)
    with pytest.raises(ServingError, match=r"see each other in this model; give token_type_ids.*with inputs_embeds"):
        served.generate(prompt["input_ids"][0].tolist(), inputs_embeds=inputs["inputs_embeds"][0], max_new_tokens=1)
    given = {name: inputs[name][0] for name in ("inputs_embeds", "token_type_ids")}
    assert served.generate(prompt["input_ids"][0].tolist(), inputs_embeds=given, max_new_tokens=NEW) == answer(
        model, prompt
    )
    text = {"input_ids": torch.tensor([TEXT])}
    assert served.generate(TEXT, max_new_tokens=NEW) == answer(model, text)


def test_an_adapter_that_would_begin_to_act_between_tokens_of_one_image_is_refused(tmp_path: Path) -> None:
    model = tiny_image_model("Gemma3ForConditionalGeneration", num_hidden_layers=1, layer_types=["full_attention"])
    _, inputs = image_inputs_of(model, prompt := image_prompt(model))
    fields: dict[str, Any] = {"r": 2, "target_modules": r".*language_model.*q_proj", "init_lora_weights": False}
    ids = prompt["input_ids"][0].tolist()
    adapted = rewrite(
        trace(model, task=TASK), LoraConfig(**fields, alora_invocation_tokens=ids[5:7]), adapter_name="within"
    )
    adapted.add_adapter("after", LoraConfig(**fields, alora_invocation_tokens=ids[6:7]))
    adapted.set_adapter(["within", "after"])
    export_onnx(adapted, tmp_path / "onnx", adapters="data", verify=False)
    served = load(tmp_path / "onnx", threads=1)
    given = {name: inputs[name][0] for name in ("inputs_embeds", "token_type_ids")}
    served.generate(ids, inputs_embeds=given, adapter="after", max_new_tokens=1)
    with pytest.raises(ServingError, match="begins to act at token 5, between tokens that are read at once"):
        served.generate(ids, inputs_embeds=given, adapter="within", max_new_tokens=1)


def test_adapters_of_the_part_that_reads_images_are_named(tmp_path: Path) -> None:
    model = tiny_image_model("LlavaForConditionalGeneration", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    traced = trace(model, task=TASK)
    export_onnx(traced, tmp_path / "base_onnx", verify=False)
    adapted = rewrite(traced, GraloraConfig(r=4, gralora_k=2, target_modules=["q_proj"], init_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    named = r"changes model\.vision_tower\.encoder\.layers\.0\.self_attn\.q_proj too, which the decoder"
    with pytest.warns(UserWarning, match=named):
        export_onnx(adapted, tmp_path / "onnx", adapters="data", verify="quick")
    with pytest.warns(UserWarning, match=named):
        export_adapter(tmp_path / "adapter", tmp_path / "onnx", "again")
    fold = fold_onnx(tmp_path / "base_onnx", tmp_path / "adapter", tmp_path / "folded")
    assert fold.unread == ("model.vision_tower.encoder.layers.0.self_attn.q_proj",)
    _, inputs = image_inputs_of(model, image_prompt(model))
    with torch.no_grad():
        expected = adapted(**inputs)["logits"][:, -1]
    folded = load(tmp_path / "folded", threads=1)(**inputs).logits[:, -1]
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)


def test_images_that_were_not_compared_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="images of VideoLlama3ForConditionalGeneration were not tried"):
        inputs = inputs_for_task(tiny_image_model("VideoLlama3ForConditionalGeneration"), TASK)
    assert (inputs["input_ids"] < 0).any()


@pytest.mark.quick
def test_images_that_come_into_a_text_otherwise_are_refused_by_name() -> None:
    with pytest.raises(TraceError, match=r"GitForCausalLM takes no embeddings.*its images come before the text"):
        trace(tiny_decoder("GitForCausalLM"), task=TASK)
