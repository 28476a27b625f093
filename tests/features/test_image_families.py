"""Models that read images, a sample of `python -m benchmarks image-models`: one of each form of what reads pixels."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from gralora_fx import trace
from gralora_fx.errors import ServingError, TraceError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.images import image_inputs, vision_forms
from gralora_fx.features.images.tile_packing import TilePacking
from gralora_fx.serving import load
from tests.architectures.image_check import check_images
from tests.architectures.image_pixels import features_of, pixels_of
from tests.architectures.image_prompts import IMAGE, tiny_image_model

_FORMS = {
    "Gemma3ForConditionalGeneration": ("pixel_values",),  # tokens of an image see each other
    "Gemma4ForConditionalGeneration": ("pixel_values", "image_position_ids"),
    "Idefics2ForConditionalGeneration": ("pixel_values",),  # of any size, padded with a mask
    "LlavaOnevisionForConditionalGeneration": ("pixel_values",),  # tiles laid out as their image
    "MllamaForConditionalGeneration": ("pixel_values", "aspect_ratio_ids"),  # layers attend to images
    "Mistral3ForConditionalGeneration": ("pixel_values",),  # of any size, padded with sizes
    "MuseGlimmerForConditionalGeneration": ("pixel_values", "image_grid_thw"),  # windows, and a table read across
}


@pytest.mark.parametrize("name", _FORMS)
def test_answers_to_images_are_those_of_transformers_for_each_form(name: str, tmp_path: Path) -> None:
    checked = check_images(tiny_image_model(name, max_position_embeddings=512), tmp_path / "export")
    assert (checked.reason, checked.answers) == ("", "")
    assert checked.takes == _FORMS[name]


def test_positions_that_are_counted_in_another_way_leave_the_decoder_alone(tmp_path: Path) -> None:
    checked = check_images(tiny_image_model("HunYuanVLForConditionalGeneration"), tmp_path / "export")
    assert "has other features or positions in HunYuanVLForConditionalGeneration" in checked.reason


@pytest.mark.parametrize(
    ("name", "why"), [("AriaForConditionalGeneration", "pixel_mask"), ("Ovis2ForConditionalGeneration", "indicator")]
)
def test_what_a_processor_gives_beside_pixels_and_places_is_refused(name: str, why: str) -> None:
    """A mask of padding, and tokens around images whose embeddings the model takes from its table of images."""
    with pytest.raises(TraceError, match=why):
        vision_forms.form_of(tiny_image_model(name))


def test_a_model_that_was_found_whole_is_exported_without_a_warning() -> None:
    table = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "image_table.py"))
    whole = {entry["architecture"] for entry in table["entries"]() if entry["result"] == "whole"}
    types = {kind for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items() if name in whole}
    others = {"glmga", "pp_chart2table", "shieldgemma2"}  # other names of a class
    of_images_alone = {"blip", "pp_formulanet", "vision-encoder-decoder"}
    assert types - others - of_images_alone == image_inputs._COMPARED


@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_an_image_is_read_whole_whatever_a_step_reads(chunk: int, gemma: Path) -> None:
    model = tiny_image_model("Gemma3ForConditionalGeneration")
    served = load(gemma, threads=1)
    pixels = pixels_of(model, 0)
    places = [False, False, *[True] * features_of(model, pixels), False]
    ids = np.where(places, IMAGE, 7)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None], token_type_ids=torch.tensor([places]).long(), **pixels).logits[
            0, -1
        ]
    prompts = served.generation.given_prompts
    assert prompts is not None
    decoder = served.decoder(rows=1, chunk=chunk)
    row = decoder.open(None, prompts.given(ids, {"pixel_values": pixels["pixel_values"].numpy()}, None))
    parts = [ids[start : start + chunk].tolist() for start in range(0, len(ids), chunk)]
    *_, last = [decoder.step({row: part})[row] for part in parts]
    torch.testing.assert_close(torch.from_numpy(last), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gemma") / "export"
    model = tiny_image_model("Gemma3ForConditionalGeneration")
    export_onnx(trace(model, task="image-text-to-text-with-past"), directory, verify=False)
    return directory


def test_logits_within_an_image_that_is_read_in_parts_are_refused(tmp_path: Path) -> None:
    model = tiny_image_model("Gemma3ForConditionalGeneration", num_hidden_layers=1, layer_types=["full_attention"])
    export_onnx(trace(model, task="image-text-to-text-with-past"), tmp_path / "onnx", logits="all", verify=False)
    decoder = load(tmp_path / "onnx", threads=1).decoder(rows=1, chunk=2)
    places = np.array([[False, True, True, True]])
    row = decoder.open(None, {"inputs_embeds": np.zeros((1, 4, 32), np.float32), "given_places": places})
    with pytest.raises(ServingError, match="reads a part of tokens that are read at once"):
        decoder.step({row: [5, 6]})


@pytest.mark.parametrize("most", [1, 2, 9])
def test_tiles_are_laid_out_as_transformers_does(most: int) -> None:
    """Images that are wider or higher than their tiles, and larger than the most tiles."""
    model = tiny_image_model("LlavaOnevisionForConditionalGeneration")
    config = model.config
    config.vision_aspect_ratio = f"anyres_max_{most}"
    config.image_grid_pinpoints = [[32, 32], [32, 96], [64, 64], [128, 64]]
    form = vision_forms.form_of(AutoModelForImageTextToText.from_config(config))
    assert form.check(torch.Generator().manual_seed(0)) is None
    packing = TilePacking.of(config.to_dict())
    assert [packing.count(size) for size in ((10, 10), (20, 90), (60, 50), (100, 40))] == [2, 4, 5, 9]
