"""A pass of one's own is one function and one line of a pipeline; a kind of export is one value and one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn
from traces import fresh_trace

from gralora_fx import TracedModel, trace
from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.kinds import decoder, encoder_decoder, flavour, plain
from gralora_fx.exporters.kinds.conversion import Conversion
from gralora_fx.exporters.kinds.flavour import Flavour, Models
from gralora_fx.exporters.translation.export_graphs import graph_to_translate
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.verify.cases import Verification, plain_inputs
from gralora_fx.run import open_export as readings
from gralora_fx.serving import load

CACHED = "text-generation-with-past"
SIZES = {"t5": {"num_layers": 1}}


def count_nodes(model: ir.Model) -> PassResult[ir.Model]:
    """Change nothing."""
    return PassResult(0, summary=len(model.graph))


@pytest.mark.parametrize(
    ("module", "name", "model", "task"),
    [
        (plain, "plain_pipeline", "bert", None),
        (decoder, "decoder_pipeline", "gpt2", CACHED),
        (encoder_decoder, "named_pipeline", "t5", "text2text-generation-with-past"),
    ],
)
def test_a_pass_is_a_line_of_a_pipeline(
    module: Any, name: str, model: str, task: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, pipeline = fresh_trace(model, task=task, **SIZES.get(model, {})), getattr(module, name)
    before = export_onnx(traced, tmp_path / "before", verify=False)

    def longer(*args: Any) -> Any:
        found = pipeline(*args)
        return dataclasses.replace(found, passes=(*found.passes, count_nodes))

    monkeypatch.setattr(module, name, longer)
    after = export_onnx(traced, tmp_path / "after", verify=False, dump=tmp_path / "dump")
    added = [entry.name for entry in after.passes if entry.name == "count_nodes"]
    assert len(added) == len(after.passes) - len(before.passes) == len(list((tmp_path / "after").glob("*.onnx")))
    assert len(list((tmp_path / "dump").glob("*-count_nodes.txt"))) == len(added)
    manifest = json.loads((tmp_path / "after" / "gralora_export.json").read_text())
    assert [entry["name"] for entry in manifest["passes"]] == [entry.name for entry in after.passes]
    for file in (tmp_path / "before").glob("*.onnx*"):
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()


# -- a kind of export: nets of a module of one's own, of ONNX's newest operators, with a note beside the model ---------


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def convert(conversion: Conversion) -> Models:
    model = translate(graph_to_translate(conversion.traced), log=conversion.log, name="doubling")
    model.graph.inputs[0].name, model.graph.outputs[0].name = "x", "output"
    return {"model": model}


def write_note(directory: Path, traced: TracedModel, models: Models) -> None:
    (directory / "note.json").write_text(json.dumps(sorted(models)))


DOUBLING = Flavour(
    "doubling",
    convert=convert,
    verification=Verification(plain_inputs),
    write_files=write_note,
)


def test_a_flavour_is_a_line_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {f"{__name__}:DOUBLING": lambda traced: traced.config is None}
    monkeypatch.setattr(flavour, "FLAVOURS", own | flavour.FLAVOURS)
    traced = trace(Doubling(), (torch.randn(2, 3),))
    assert flavour.flavour_of(traced) is DOUBLING
    report = export_onnx(traced, tmp_path / "onnx")
    assert {entry.pipeline for entry in report.passes} == {"doubling-fx"}
    assert report.verification is not None
    assert report.verification.passed
    assert "note.json" in report.files
    assert "note.json" in json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())["files"]
    assert flavour.flavour_of(fresh_trace("bert")) is plain.PLAIN
    with pytest.raises(ServingError, match="of the kind 'doubling', and this version reads plain, decoder, encod"):
        load(tmp_path / "onnx")
    reading = dataclasses.replace(readings.READINGS[plain.PLAIN.name], name=DOUBLING.name)
    monkeypatch.setitem(readings.READINGS, reading.name, reading)
    assert load(tmp_path / "onnx")(x=torch.ones(2, 3))["output"].tolist() == [[2.0] * 3] * 2


def test_a_flavours_own_inputs_are_those_that_verification_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(model: TracedModel, generator: torch.Generator, quick: bool) -> Any:
        yield "five rows" if quick else "seven rows", {"x": torch.randn(5 if quick else 7, 3, generator=generator)}

    own = dataclasses.replace(DOUBLING, verification=Verification(one))
    monkeypatch.setitem(globals(), "OWN", own)
    monkeypatch.setattr(flavour, "FLAVOURS", {f"{__name__}:OWN": lambda traced: traced.config is None})
    traced = trace(Doubling(), (torch.randn(2, 3),))
    report = export_onnx(traced, tmp_path / "onnx")
    assert report.verification is not None
    assert report.verification.cases == ("five rows",)
    assert verify_onnx(tmp_path / "onnx", traced).cases == ("seven rows",)


@pytest.mark.parametrize(
    ("model", "task", "layout"),
    [
        ("bert", None, CacheLayout.NONE),
        ("gpt2", None, CacheLayout.NONE),
        ("gpt2", CACHED, CacheLayout.DECODER),
        ("t5", "text2text-generation-with-past", CacheLayout.ENCODER_DECODER),
    ],
)
def test_the_layout_of_the_cache_tells_the_flavour(model: str, task: str | None, layout: CacheLayout) -> None:
    traced = fresh_trace(model, task=task, **SIZES.get(model, {}))
    assert traced.cache_layout is layout
    names = {CacheLayout.NONE: "plain", CacheLayout.DECODER: "decoder", CacheLayout.ENCODER_DECODER: "encoder-decoder"}
    assert flavour.flavour_of(traced).name == names[layout]
