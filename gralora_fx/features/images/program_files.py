"""Files by which other programs read images: what onnxruntime-genai, its processor and transformers.js are told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gralora_fx.features.images.program_graphs import DECODER, EMBEDDING, image_token
from gralora_fx.features.images.tasks_and_inputs import GRID_THW, IMAGE_FEATURES, IMAGES, VISION_ENCODER
from gralora_fx.format.adapter_inputs import is_adapter_tensor
from gralora_fx.format.export_directory import DATA_SUFFIX
from gralora_fx.format.input_names import EMBEDS, IDS

GENAI_PROCESSOR = "genai_processor.json"
# by the configuration's `model_type`: the type by which onnxruntime-genai calls the same graphs in the same way
_TYPES = {"qwen2_vl": "qwen2_5_vl", "qwen2_5_vl": "qwen2_5_vl", "qwen3_5": "qwen3_5", "qwen3_5_moe": "qwen3_5_moe"}
_FILTERS = {0: "NEAREST", 1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}  # by Pillow's numbers


def write_image_files(directory: Path, config: Any, models: Mapping[str, ir.Model], genai: dict[str, Any]) -> None:
    """Tell transformers.js which graphs have weights of their own, and onnxruntime-genai how it reads images.

    onnxruntime-genai reads only texts if it has no type for the model, if there is no processor, or if adapters are
    data, which it does not pass to a model of several graphs.
    """
    if DECODER not in models:
        return
    _tell_transformers_js(directory, models)
    kind, processor = _TYPES.get(config.model_type), _image_processor(directory)
    if kind is None or processor is None or _takes_adapters(models):
        return
    (directory / GENAI_PROCESSOR).write_text(json.dumps(_transforms(processor), indent=2) + "\n", encoding="utf-8")
    described, vision = genai["model"], config.vision_config
    described["type"] = kind
    described |= {name: token for name in _TOKENS if isinstance(token := getattr(config, name, None), int)}
    described["image_token_id"] = image_token(config)
    decoder = described["decoder"]
    decoder["filename"] = f"{DECODER}.onnx"
    decoder["inputs"] = {EMBEDS: EMBEDS, **decoder["inputs"]}
    described["embedding"] = {
        "filename": f"{EMBEDDING}.onnx",
        "inputs": {name: name for name in (IDS, IMAGE_FEATURES)},
        "outputs": {EMBEDS: EMBEDS},
    }
    described["vision"] = {
        "filename": f"{VISION_ENCODER}.onnx",
        "config_filename": GENAI_PROCESSOR,
        "spatial_merge_size": vision.spatial_merge_size,
        "patch_size": vision.patch_size,
        "inputs": {name: name for name in (IMAGES, GRID_THW)},
        "outputs": {IMAGE_FEATURES: IMAGE_FEATURES},
    }


_TOKENS = ("video_token_id", "vision_start_token_id")


def _tell_transformers_js(directory: Path, models: Mapping[str, ir.Model]) -> None:
    """Name the graphs with files of weights, since the others are over those of `model.onnx`."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    files = {name: 1 for name in models if (directory / f"{name}{DATA_SUFFIX}").is_file()}
    config["transformers.js_config"] = {"use_external_data_format": files}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _takes_adapters(models: Mapping[str, ir.Model]) -> bool:
    inputs = (value for name in (DECODER, VISION_ENCODER) for value in models[name].graph.inputs)
    return any(is_adapter_tensor(str(value.name)) for value in inputs)


def _image_processor(directory: Path) -> dict[str, Any] | None:
    """Return what transformers' processor of images is told, by the files that it was saved to; None without one."""
    path, older = directory / "processor_config.json", directory / "preprocessor_config.json"
    if path.is_file():
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Any] | None = fields.get("image_processor")
        if found is not None and not older.exists():  # where transformers.js looks
            found = {**found, "processor_class": fields["processor_class"]}
            older.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return json.loads(older.read_text(encoding="utf-8")) if older.is_file() else None


def _transforms(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the steps from a file to the patches of its image, as onnxruntime-extensions takes them."""
    size = processor["size"]
    patches = {"patch_size": processor["patch_size"], "merge_size": processor["merge_size"]}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("ConvertRGB", {}),  # swaps red and blue, and so does Normalize, as it is told
        (
            "Resize",
            {
                "interpolation": _FILTERS[processor["resample"]],
                "smart_resize": 1,
                "min_pixels": size["shortest_edge"],
                "max_pixels": size["longest_edge"],
                **patches,
            },
        ),
        ("Rescale", {"rescale_factor": processor["rescale_factor"]}),
        ("Normalize", {"mean": processor["image_mean"], "std": processor["image_std"], "qwen2_5_vl": 1}),
        ("PatchImage", {"temporal_patch_size": processor["temporal_patch_size"], **patches}),
    ]
    operations = ({"name": kind.lower(), "type": kind, **({"attrs": given} if given else {})} for kind, given in steps)
    return {"processor": {"name": "image_processor", "transforms": [{"operation": each} for each in operations]}}
