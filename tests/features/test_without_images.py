"""A copy without images: pixels are an input like others, and an export that takes images reads texts."""

from __future__ import annotations

import json
from pathlib import Path

from pruned_tree import copy_without, run_on

from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load
from tests.architectures.image_prompts import tiny_image_model

PROGRAM = """
import json, sys
import torch
from tiny_images import IMAGE_MODELS, image_model
from gralora_fx import trace
from gralora_fx.errors import GraloraError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

def message(run):
    try:
        run()
    except GraloraError as error:
        return str(error)

images = {"pixel_values": torch.randn(2, 3, 32, 32)}
vit = image_model(IMAGE_MODELS["vit"])
traced = trace(vit, images)
export_onnx(traced, "vit")
gap = (load("vit")(**images).logits - vit(**images).logits).abs().max().item()
served = load(sys.argv[1])
print(json.dumps({
    "sizes": traced.signature.image_sizes,
    "gap": gap,
    "text": served.generate([5, 6, 7, 8], max_new_tokens=4),
    "option": message(lambda: trace(vit, images, image_size="dynamic")),
    "task": message(lambda: trace(vit, task="image-classification")),
    "embeddings": message(lambda: served.generate([5], inputs_embeds=torch.zeros(1, 32), max_new_tokens=1)),
}))
"""


def test_what_knows_images_is_missed_by_name_and_all_else_works(tmp_path: Path) -> None:
    export = tmp_path / "onnx"
    traced = trace(tiny_image_model("LlavaForConditionalGeneration"), task="image-text-to-text-with-past")
    export_onnx(traced, export, verify=False)
    expected = load(export).generate([5, 6, 7, 8], max_new_tokens=4)
    (tmp_path / "tree").mkdir()
    told = json.loads(run_on(copy_without(tmp_path / "tree", "images"), PROGRAM, export).splitlines()[-1])
    assert (told["sizes"], told["text"]) == (None, expected)
    assert told["gap"] < 1e-4
    assert told["option"] == "image_size has no effect, since no feature that is installed reads it; leave it out"
    assert told["task"].startswith("unknown task 'image-classification'; take one of feature-extraction")
    assert told["embeddings"] == "inputs_embeds has no effect: no feature that is installed reads it; leave it out"
