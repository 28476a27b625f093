"""A merged model remembers what was folded into it, and an export of it says so, as one of the adapted model does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, merge, rewrite, trace
from gralora_fx.exporters import export_onnx


def base() -> TracedModel:
    torch.manual_seed(0)
    return trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), (torch.randn(2, 8),))


def adapted(traced: TracedModel, r: int = 4, name: str = "default") -> GraloraModel:
    config = GraloraConfig(r=r, target_modules="all-linear", init_weights=False)
    return rewrite(traced, config, adapter_name=name)


def adapters(model: Any, tmp_path: Path) -> dict[str, Any]:
    export_onnx(model, tmp_path / "onnx", verify=False, overwrite=True)
    entries: dict[str, Any] = json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())["adapters"]
    return entries


@pytest.mark.parametrize("route", ["merge", "merge_and_unload", "merged, then unloaded"])
def test_an_export_after_merging_names_the_adapter_as_one_before(tmp_path: Path, route: str) -> None:
    model = adapted(base())
    expected = adapters(model, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    file = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert expected["default"]["sha256"] == hashlib.sha256(file).hexdigest()
    if route == "merged, then unloaded":
        model.merge_adapter()
    merged = merge(model) if route == "merge" else model.merge_and_unload()
    assert adapters(merged, tmp_path) == expected


def test_several_merges_are_all_remembered(tmp_path: Path) -> None:
    first = adapted(base())
    second = adapted(merge(first), r=2)
    third = adapted(merge(second), r=6, name="third")
    entries = adapters(third, tmp_path)
    assert {name: entry["config"]["r"] for name, entry in entries.items()} == {"default": 4, "default_2": 2, "third": 6}
    assert adapters(merge(third), tmp_path) == entries
    assert adapters(third.merge_and_unload(), tmp_path) == entries


def test_only_what_was_folded_is_remembered(tmp_path: Path) -> None:
    model = adapted(base())
    model.add_adapter("other", GraloraConfig(r=2, target_modules="all-linear", init_weights=False))
    assert list(merge(model, "other").merged_adapters) == ["other"]
    model.set_adapter(["default", "other"])
    assert set(merge(model).merged_adapters) == {"default", "other"}
    assert adapters(model.merge_and_unload(adapter_names="other"), tmp_path).keys() == {"other"}
    assert adapters(adapted(base()).unload(), tmp_path) == {}


def test_passes_keep_what_was_folded_and_training_on_does_not_change_it() -> None:
    model = adapted(base())
    merged = merge(model)
    before = dict(merged.merged_adapters)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert merged.with_pass(lambda graph_module: None).merged_adapters == before
    assert merge(model).merged_adapters != before


def test_tensors_that_are_written_after_they_were_folded_have_no_digest_and_it_is_said() -> None:
    """An optimizer, for one, may hold an adapter's tensors longer than the model does."""
    model = adapted(base())
    held = list(model.parameters())
    merged = model.merge_and_unload()
    with torch.no_grad():
        for parameter in held:
            parameter.add_(1)
    with pytest.warns(UserWarning, match="tensors of adapter 'default' were changed after it was folded"):
        entries = dict(merged.merged_adapters)
    assert entries["default"]["sha256"] is None
    assert entries["default"]["config"]["r"] == 4
