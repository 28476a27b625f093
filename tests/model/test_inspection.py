"""Questions to a traced or rewritten model, by site and adapter."""

from __future__ import annotations

import pytest
import torch
from traces import traced

from gralora_fx import GraloraConfig, GraloraModel, rewrite
from gralora_fx.errors import RewriteError, TargetError

QUERY, VALUE, KEY = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value", "key"))


@pytest.fixture
def model() -> GraloraModel:
    torch.manual_seed(0)
    first = GraloraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"], init_weights=False)
    result = rewrite(traced("bert"), first)
    result.add_adapter(
        "wide", GraloraConfig(r=8, gralora_k=4, hybrid_r=2, target_modules=["query"], init_weights=False)
    )
    return result


def test_a_site_by_its_path(model: GraloraModel) -> None:
    assert model.site(QUERY) is traced("bert").site(QUERY)
    assert model.site(QUERY).in_features == 32
    with pytest.raises(TargetError, match=r"there is no linear layer at '.*quer'; nearest: .*self.query"):
        traced("bert").site(QUERY[:-1])


def test_sites_of_an_adapter_and_adapters_of_a_site(model: GraloraModel) -> None:
    assert [entry.site.path for entry in model.adapted_sites("wide")] == [QUERY, QUERY.replace(".0.", ".1.")]
    assert [(entry.site.path, entry.k) for entry in model.adapted_sites()][:3] == [(QUERY, 2), (QUERY, 4), (VALUE, 2)]
    assert model.adapters_at(QUERY) == ("default", "wide")
    assert model.adapters_at(VALUE) == ("default",)
    assert model.adapters_at(KEY) == ()
    with pytest.raises(TargetError, match="there is no linear layer at 'nowhere'"):
        model.adapters_at("nowhere")
    with pytest.raises(RewriteError, match="no adapter 'absent'; there are default, wide"):
        model.adapted_sites("absent")


def test_nodes_that_serve_a_site_or_an_adapter(model: GraloraModel) -> None:
    assert model.nodes(adapter_name="wide") == ()  # it waits
    model.set_adapter(["default", "wide"])
    everything = model.nodes()
    assert set(model.nodes(QUERY)) == {n for n in everything if n.meta["custom"]["gralora"]["site"] == QUERY}
    both = model.nodes(QUERY, "default"), model.nodes(QUERY, "wide")
    assert set(both[0]) | set(both[1]) == set(model.nodes(QUERY))
    assert not set(both[0]) & set(both[1])
    assert {str(node.target) for node in model.nodes("classifier")} == {
        "gralora.default.classifier.weight",
        "gralora.default.classifier.bias",
    }
    assert model.nodes(KEY) == ()
    model.merge_adapter(["wide"])
    assert model.nodes(adapter_name="wide") == ()
    with pytest.raises(RewriteError, match="no adapter 'absent'"):
        model.nodes(adapter_name="absent")


def test_tensors_and_updates(model: GraloraModel) -> None:
    assert model.factors(QUERY) is model.factors(QUERY, "default")
    assert model.factors(QUERY, "wide").sizes == (8, 4, 2)
    one, other = model.delta_weight(QUERY, "default"), model.delta_weight(QUERY, "wide")
    assert torch.equal(model.delta_weight(QUERY), one)
    model.set_adapter(["default", "wide"])
    assert torch.allclose(model.delta_weight(QUERY), one + other, atol=1e-6)
    blocks = model.delta_weight(QUERY, "wide").reshape(4, 8, 4, 8).transpose(1, 2)
    assert torch.allclose(model.block_norms(QUERY, "wide").float(), blocks.norm(dim=(2, 3)), atol=1e-6)
    assert torch.allclose(model.block_norms(QUERY).float(), (one + other).norm().reshape(1, 1), atol=1e-5)
    with pytest.raises(RewriteError, match="2 adapters are active; name one of"):
        model.factors(QUERY)
    with pytest.raises(RewriteError, match=r"adapter 'wide' has no tensors at '.*value'"):
        model.factors(VALUE, "wide")
    with pytest.raises(RewriteError, match=r"no adapter of \['wide'\] adapts '.*value'"):
        model.delta_weight(VALUE, "wide")


def test_an_update_is_stored_as_the_weight_is() -> None:
    model = rewrite(
        traced("gpt2"), GraloraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_weights=False)
    )
    site = model.adapted_sites("default")[0].site
    assert model.delta_weight(site.path).shape == site.weight.shape == (32, 96)
