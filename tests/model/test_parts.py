"""The verbs of a model, which its parts define: they are documented, and act on the one graph that all parts share."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.core.model.inspection import Inspection
from gralora_fx.core.model.merging import Merging
from gralora_fx.core.model.switching import Switching
from gralora_fx.core.tracing.as_transformers import TransformersView

PARTS = (Switching, Merging, Inspection)
VERBS = [(part, name) for part in PARTS for name in vars(part) if not name.startswith("_")]


@pytest.mark.parametrize(("part", "name"), VERBS, ids=lambda value: getattr(value, "__name__", value))
def test_a_model_has_each_verb_of_its_parts_documented(part: type, name: str) -> None:
    assert getattr(GraloraModel, name) is getattr(part, name)
    assert inspect.getdoc(getattr(GraloraModel, name)) is not None


def test_what_transformers_asks_has_the_signature_and_documentation_of_its_view() -> None:
    for name in ("generate", "get_input_embeddings", "get_output_embeddings", "prepare_decoder_input_ids_from_labels"):
        ours, its = getattr(GraloraModel, name), getattr(TransformersView, name)
        assert inspect.signature(ours) == inspect.signature(its)
        assert inspect.getdoc(ours) is not None


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
