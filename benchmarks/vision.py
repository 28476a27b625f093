"""Vision towers at real widths, compared with PyTorch, and the second turn of a chat about an image."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, Idefics3Config, PreTrainedModel, Qwen2_5_VLConfig

from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx import TracedModel, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.features.images.image_rows import given_of
from gralora_fx.serving import OrtModel, load

LAYERS = 4  # of each tower and each decoder: both sides are linear in them
TEXT = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
IMAGE = 4000  # the token of an image
_KINDS: tuple[Literal["int8", "int8-dynamic", "int4"], ...] = ("int8", "int8-dynamic", "int4")
SIDE = 448  # pixels on a side of an image of the windowed tower


def _siglip() -> PreTrainedModel:
    """Return a model of SigLIP so400m's widths, as in Idefics3: tiles of 364 pixels."""
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": LAYERS,
        "patch_size": 14,
        "image_size": 364,
    }
    text = {**TEXT, "model_type": "llama"}
    config = Idefics3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)
    return AutoModelForImageTextToText.from_config(config).eval()


def _windowed() -> PreTrainedModel:
    """Return a model of Qwen2.5-VL's widths: windows of 112 pixels, every fourth layer over the whole image."""
    vision = {
        "depth": LAYERS,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": TEXT["hidden_size"],
        "fullatt_block_indexes": [LAYERS - 1],
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {**TEXT, "rope_parameters": rope}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return AutoModelForImageTextToText.from_config(config).eval()


def run(iterations: int = 9) -> Report:
    """Compare a tower's run with the model's own code, and a second turn with the first."""
    report = Report("vision", f"images: towers of {LAYERS} layers at real widths, fp32, beside PyTorch")
    generator = torch.Generator().manual_seed(0)
    tile = {"pixel_values": torch.randn(1, 3, 364, 364, generator=generator)}
    patches = (SIDE // 14) ** 2
    image = {
        "pixel_values": torch.randn(patches, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, SIDE // 14, SIDE // 14]]),
    }
    for name, make, inputs in (("SigLIP, a tile", _siglip, tile), (f"windowed, {SIDE}x{SIDE}", _windowed, image)):
        progress(f"vision, {name}")
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = make()
            traced = trace(model, task="image-text-to-text-with-past")
            export_onnx(traced, Path(folder, "export"), verify=False)
            exported = load(Path(folder, "export"))
            _compare_tower(report, name, model, exported, inputs, iterations)
            if "image_grid_thw" in inputs:
                _compare_turns(report, exported, inputs, iterations)
            else:
                _compare_kinds(report, traced, exported, inputs, Path(folder), iterations)
    return report


def _compare_kinds(
    report: Report, traced: TracedModel, exported: OrtModel, inputs: dict[str, torch.Tensor], folder: Path, times: int
) -> None:
    """Measure a quantized tower's time, size and error beside the one of floats."""
    feed = {key: value.numpy() for key, value in inputs.items()}
    sessions = {"float": exported.companion_session("vision_encoder")}
    sizes = {"float": _size(folder / "export")}
    for kind in _KINDS:
        progress(f"vision, {kind}")
        export_onnx(traced, folder / kind, quantize="int8", quantize_companions=kind, verify=False)
        sessions[kind], sizes[kind] = load(folder / kind).companion_session("vision_encoder"), _size(folder / kind)
    found = {kind: session.run(["image_features"], feed)[0] for kind, session in sessions.items()}
    expected = found["float"]
    timings = measure(
        [Case.of(kind, partial(session.run, None, feed)) for kind, session in sessions.items()], iterations=times
    )
    rows = []
    for kind, features in found.items():
        error = np.linalg.norm(features - expected, axis=1) / np.linalg.norm(expected, axis=1)
        rows.append(
            {
                **timings.row(kind, "float"),
                "MB": round(sizes[kind] / 1e6, 1),
                "relative error": round(float(error.mean()), 4),
            }
        )
    report.tables.append(Table("SigLIP, quantized", rows))


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("vision_encoder.onnx*"))


def _compare_tower(
    report: Report, name: str, model: Any, exported: OrtModel, inputs: dict[str, torch.Tensor], iterations: int
) -> None:
    session = exported.companion_session("vision_encoder")
    feed = {key: value.numpy() for key, value in inputs.items()}
    own = dict(inputs) if "image_grid_thw" in inputs else {"pixel_values": inputs["pixel_values"][None]}

    def eager() -> None:
        with torch.no_grad():
            model.model.get_image_features(**own)

    cases = [Case.of("vision_encoder.onnx", lambda: session.run(None, feed)), Case.of("PyTorch", eager)]
    timings = measure(cases, iterations=iterations, warmup=2)
    report.tables.append(Table(name, [timings.row(case.name, "PyTorch") for case in cases]))
    ratio = timings.ratio("vision_encoder.onnx", "PyTorch").median_of_pairs
    report.claims.append(Claim(f"{name}: over PyTorch", ratio, at_most=0.9))


def _compare_turns(report: Report, exported: OrtModel, inputs: dict[str, torch.Tensor], iterations: int) -> None:
    """Compare the first token after a prompt with an image: pixels and tokens read, or both cached."""
    session = exported.companion_session("vision_encoder")
    feed = {key: value.numpy() for key, value in inputs.items()}
    decoder = exported.decoder(rows=1, prefix_cache=2**28)
    count = SIDE**2 // 28**2
    before, after = list(range(5, 25)), list(range(30, 50))
    ids = [*before, *[IMAGE] * count, *after]
    places = np.array([False] * len(before) + [True] * count + [False] * len(after))
    salts = iter(range(10**9))
    known: dict[str, Any] = {}

    def turn(features: Callable[[], Any], salt: str) -> None:
        outputs = [{"image_features": features()}]
        given = given_of(places, outputs, feed["image_grid_thw"], 2)
        row = decoder.open(None, given, salt=salt)
        start = decoder.fill(row, ids)
        while start < len(ids):
            part = ids[start : start + 64]
            decoder.step({row: part})
            start += len(part)
        decoder.close(row)

    def read() -> Any:
        known["features"] = session.run(["image_features"], feed)[0]
        return known["features"]

    turn(read, "second")
    cases = [
        Case.of("first turn", lambda: turn(read, f"first {next(salts)}")),
        Case.of("second turn", lambda: turn(lambda: known["features"], "second")),
    ]
    timings = measure(cases, iterations=iterations, warmup=1)
    report.tables.append(Table("first token of a turn", [timings.row(case.name, "first turn") for case in cases]))
    ratio = timings.ratio("second turn", "first turn").median_of_pairs
    report.claims.append(Claim("second turn on the same image, over the first", ratio, at_most=0.2))
