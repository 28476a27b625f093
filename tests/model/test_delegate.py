"""The verbs of a model, which its parts define: they are documented, and act on the one graph that all parts share."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.model.adapter_files import AdapterFiles
from gralora_fx.model.inspection import Inspection
from gralora_fx.model.merging import Merging
from gralora_fx.model.switching import Switching

PARTS = (Switching, Merging, AdapterFiles, Inspection)
VERBS = [(part, name) for part in PARTS for name in vars(part) if not name.startswith("_") and name != "description"]


@pytest.mark.parametrize(("part", "name"), VERBS, ids=lambda value: getattr(value, "__name__", value))
def test_a_model_has_each_verb_with_its_signature_and_documentation(part: type, name: str) -> None:
    ours, its = getattr(GraloraModel, name), getattr(part, name)
    assert inspect.signature(ours) == inspect.signature(its)
    assert inspect.getdoc(ours) == inspect.getdoc(its) is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_parts_of_a_copy_share_its_own_graph(copied: object) -> None:
    traced = trace(nn.Sequential(nn.Linear(4, 4)), (torch.ones(2, 4),))
    model = rewrite(traced, GraloraConfig(r=2, target_modules={"0"}, init_weights=False))
    other = copied(model)  # type: ignore[operator]
    other.merge_adapter()
    with torch.no_grad():
        other.adapter("default").factors["0"].A.zero_()
    assert (model.merged_adapters, other.merged_adapters) == ([], ["default"])
    assert other.delta_weight("0").count_nonzero() == 0
    assert model.delta_weight("0").count_nonzero() > 0
    other.unmerge_adapter()
    other.set_adapter([])
    other.delete_adapter("default")
    assert (list(model.configs), list(other.configs)) == (["default"], [])
