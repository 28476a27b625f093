"""Public objects print a line or a table, never the values of a model's weights."""

from __future__ import annotations

import torch
from torch import nn
from traces import fresh_trace

from gralora_fx import GraloraConfig, LoraConfig, plan, rewrite, trace

LONGEST = 200


def test_objects_print_no_tensors() -> None:
    traced = fresh_trace("gpt2")  # its head is tied
    for config in (
        GraloraConfig(r=8, target_modules=["c_attn"], modules_to_save=["ln_f"]),
        LoraConfig(r=4, target_modules=["c_attn"]),
    ):
        planned = plan(traced, config)
        model = rewrite(traced, planned)
        installed = model.adapter("default")
        site = planned.selected[0]
        objects = [traced, traced.tree, traced.sites[0], site, planned.rejected[0], planned, installed, model.plans]
        objects += [installed.update(site.site.path), model.adapted_sites()[0], model.site(site.site.path)]
        for value in objects:
            for text in (repr(value), str([value])):
                assert "tensor(" not in text.lower()
                assert "parameter containing" not in text.lower()
                assert len(text) < 2 * LONGEST, text
        for value in (model, *traced.sites, traced.sites, planned.selected, planned.rejected):
            assert "containing" not in str(value)
            assert "tensor(" not in str(value)


def test_a_site_is_one_line() -> None:
    site = fresh_trace("gpt2").site("lm_head")
    assert repr(site) == (
        f"LinearSite('lm_head', 'linear', in_features=32, out_features={site.out_features}, calls=1, "
        "tied_with=('transformer.wte.weight',))"
    )
    network = trace(nn.Sequential(nn.Linear(4, 6)), (torch.randn(2, 4),))
    assert str(network.sites) == "(LinearSite('0', 'linear', in_features=4, out_features=6, calls=1),)"


def test_a_plan_is_one_line_or_a_table() -> None:
    traced = fresh_trace("bert")
    planned = plan(traced, LoraConfig(r=4, target_modules=["query"]))
    total = str(planned).splitlines()[-1]
    assert repr(planned) == f"RewritePlan(LoraConfig, {total})"
    assert len(str(planned).splitlines()) == len(traced.sites) + 2
