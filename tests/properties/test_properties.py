"""Properties that hold for every small model and every valid configuration, drawn by hypothesis.

The drawn examples are the same in every run. `EXAMPLES=2000 pytest -n 0 tests/properties` draws so many other ones for
each property, new in every run; a failure prints the smallest model and configuration that show it.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from dense_oracle import Dense, dense, error, meaning, output, text, with_dense
from drawn_configs import adapted, configs, counting_key, exclusions, free_configs, names_for, patterns, sizes, targets
from drawn_nets import Case, cases, examples, net_cases
from hypothesis import given
from hypothesis import strategies as st
from peft_oracle import adapted_paths

from gralora_fx import GraloraConfig, GraloraModel, merge, plan, rewrite

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),  # torch's, where a model is copied
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # PEFT's, of a mixed model
]


@examples(35)
@given(st.data(), cases((torch.float32, torch.float64, torch.bfloat16)))
def test_an_untrained_adapter_changes_no_bit(data: st.DataObject, case: Case) -> None:
    config = replace(data.draw(configs(case.traced), label="config"), init_weights=True)
    assert torch.equal(output(rewrite(case.traced, config), case), output(case.traced, case))


@examples(40)
@given(st.data(), net_cases(), st.booleans())
def test_the_forward_is_that_of_the_dense_update(data: st.DataObject, case: Case, records: bool) -> None:
    model = data.draw(adapted(case))
    expected = output(with_dense(case, [Dense.of(model)]), case)
    if not records:
        assert error(output(model, case), expected) < case.tolerance
        return
    with torch.enable_grad():  # in training the update is added out of place
        actual = model(**{name: value.clone() for name, value in case.inputs.items()})
    assert error(actual.detach(), expected) < case.tolerance


@examples(40)
@given(st.data(), net_cases())
def test_the_update_of_a_site_is_the_dense_one(data: st.DataObject, case: Case) -> None:
    model = data.draw(adapted(case))
    for planned in model.adapted_sites():
        site = planned.site
        expected = dense(model.factors(site.path), planned.scale)
        expected = (expected.T if site.kind == "conv1d" else expected).to(site.weight.dtype)
        assert error(model.delta_weight(site.path), expected) < case.tolerance
        k = planned.k
        blocks = dense(model.factors(site.path), planned.scale).unflatten(0, (k, -1)).unflatten(2, (k, -1))
        assert error(model.block_norms(site.path), blocks.norm(dim=(1, 3))) < case.tolerance


@examples(100)
@given(st.data(), net_cases())
def test_the_plan_takes_what_the_names_say(data: st.DataObject, case: Case) -> None:
    named, paths = data.draw(targets(case.traced))
    excluded, kept = data.draw(exclusions(paths))
    selected = [site for site in case.traced.sites if site.path in kept]
    fields = data.draw(sizes(selected, case.traced))
    transposed = any(site.kind == "conv1d" for site in selected)
    config = GraloraConfig(target_modules=named, exclude_modules=excluded, fan_in_fan_out=transposed, **fields)
    actual_plan = plan(case.traced, config)
    assert [planned.site for planned in actual_plan.selected] == selected
    assert {planned.site.path for planned in actual_plan.rejected}.isdisjoint(kept)
    for planned in actual_plan.selected:
        names = names_for(planned.site, case.traced)
        r, k, alpha = (
            pattern.get(counting_key(pattern, names), usual)
            for pattern, usual in (
                (config.rank_pattern, config.r),
                (config.gralora_k_pattern, config.gralora_k),
                (config.alpha_pattern, config.alpha),
            )
        )
        assert (planned.r, planned.k, planned.scale) == (r, k, alpha / (r + config.hybrid_r))


@pytest.mark.quick
@examples(40)
@given(st.data(), cases())
def test_merged_is_unmerged(data: st.DataObject, case: Case) -> None:
    model = data.draw(adapted(case))
    untie = any(planned.site.tied_with for planned in model.adapted_sites())
    base = {name: (parameter, parameter.detach().clone()) for name, parameter in case.traced.tree.parameters.items()}
    expected, nodes = output(model, case), len(model.nodes())

    merged = merge(model, untie=untie)
    assert error(output(merged, case), expected) < case.tolerance
    if not untie:
        assert text(merged) == text(case.traced)

    model.merge_adapter(safe_merge=True, untie=untie)
    assert error(output(model, case), expected) < case.tolerance
    model.unmerge_adapter()
    assert torch.equal(output(model, case), expected)
    assert len(model.nodes()) == nodes
    for name, (parameter, value) in base.items():
        assert case.traced.tree.parameters[name] is parameter
        assert torch.equal(parameter, value), name

    unloaded = copy.deepcopy(model).merge_and_unload(untie=untie)
    assert error(output(unloaded, case), expected) < case.tolerance
    assert torch.equal(output(model, case), expected), "the copy is not one"


@examples(35)
@given(st.data(), cases((torch.float32, torch.float64, torch.bfloat16)))
def test_unloading_gives_the_base_back(data: st.DataObject, case: Case) -> None:
    tree, graph_module = case.traced.tree, case.traced.graph_module
    trainable = {id(p): data.draw(st.booleans()) for p in tree.parameters.values()} if case.is_net else {}
    for parameter in tree.parameters.values():
        parameter.requires_grad_(trainable.get(id(parameter), True))
    before = text(case.traced), graph_module.code
    in_graph = {name: id(parameter) for name, parameter in graph_module.named_parameters(remove_duplicate=False)}
    expected = output(case.traced, case)
    values = {name: parameter.detach().clone() for name, parameter in tree.parameters.items()}

    model = data.draw(adapted(case))
    assert not any(parameter.requires_grad for parameter in tree.parameters.values())
    if data.draw(st.booleans(), label="with another adapter"):
        model.add_adapter("other", data.draw(configs(case.traced, with_copies=False)))
        model.set_adapter("other" if model.adapter("default").copies else ["other", "default"])
    if data.draw(st.booleans(), label="while merged"):
        model.merge_adapter(untie=True)
    result = model.unload()

    assert (text(result), result.graph_module.code) == before
    assert (text(case.traced), graph_module.code) == before
    again = {name: id(parameter) for name, parameter in result.graph_module.named_parameters(remove_duplicate=False)}
    assert again == in_graph
    assert torch.equal(output(result, case), expected)
    assert result.tree.parameters.keys() == tree.parameters.keys()
    for name, parameter in result.tree.parameters.items():
        assert parameter is tree.parameters[name]
        assert torch.equal(parameter, values[name])
        assert parameter.requires_grad == trainable.get(id(parameter), True), name


@pytest.mark.filterwarnings("ignore:adapter 'default' has .*, which PEFT's GraLoRA does not read")
@examples(35)
@given(st.data(), cases((torch.float32, torch.float64, torch.bfloat16)), st.booleans())
def test_a_saved_adapter_loads_with_every_bit_and_the_same_meaning(
    data: st.DataObject, case: Case, within_peft: bool
) -> None:
    model = data.draw(adapted(case, within_peft))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        again = GraloraModel.from_pretrained(case.traced, directory)
        loads_in_peft = case.is_net and is_for_peft(model, case)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(case.source), directory) if loads_in_peft else None
    assert meaning(again) == meaning(model)
    tensors, saved = (dict(m.adapter("default").named_parameters()) for m in (again, model))
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], parameter) for name, parameter in saved.items())
    assert torch.equal(output(again, case), output(model, case))
    if theirs is None:
        return
    assert adapted_paths(theirs) == {planned.site.path for planned in model.adapted_sites()}
    if case.inputs["x"].ndim in (2, 3) and case.inputs["x"].numel():  # PEFT takes no others
        assert error(output(theirs.eval(), case), output(model, case)) < case.tolerance


def is_for_peft(model: GraloraModel, case: Case) -> bool:
    """Return whether PEFT has everything that an adapter uses."""
    config = model.configs["default"]
    beyond = (config.rank_pattern, config.alpha_pattern, config.gralora_k_pattern)
    kinds = {planned.site.kind for planned in model.adapted_sites()}
    return not any(beyond) and "functional" not in kinds


@examples(120)
@given(free_configs())
def test_a_configuration_is_read_as_it_was_written(config: GraloraConfig) -> None:
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Path(directory, "adapter_config.json").write_text(config.to_json(), encoding="utf-8")
        again = GraloraConfig.from_pretrained(directory)
    assert again == replace(config, exclude_modules=config.exclude_modules or None)
    assert again.to_json() == config.to_json()


@examples(60)
@given(patterns(st.integers(1, 512)))
def test_a_pattern_keeps_its_order_in_a_file(pattern: dict[str, int]) -> None:
    config = GraloraConfig(rank_pattern=pattern, alpha_pattern=pattern, gralora_k_pattern=pattern)
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        again = GraloraConfig.from_pretrained(directory)
    for name in ("rank_pattern", "alpha_pattern", "gralora_k_pattern"):
        assert list(getattr(again, name)) == list(pattern)
