"""Any order of changes of adapters, errors included, drawn by hypothesis."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from dense_oracle import Dense, error, output, text, weight_name, with_dense
from drawn_configs import configs, trained
from drawn_nets import Case, Layer, NetSpec, built, examples
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, fx, nn

from gralora_fx import GraloraModel, merge, rewrite
from gralora_fx.errors import ConfigError, GraloraError, MergeError, RewriteError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),  # torch's, where a model is copied
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # PEFT's, of a mixed model
]

MACHINE_NETS = (
    NetSpec(
        (
            Layer("nested", 4, 8, bias=True),
            Layer("norm", 8, 8, bias=True),
            Layer("conv1d", 8, 4, bias=True),
            Layer("twice", 4, 4, bias=False),
        ),
        rank=2,
        dtype=torch.float64,
        is_exported=True,
    ),
    NetSpec(
        (
            Layer("functional", 4, 8, bias=True),
            Layer("relu", 8, 8, bias=True),
            Layer("tied", 8, 8, bias=True),
            Layer("residual", 8, 8, bias=False),
        ),
        rank=3,
        dtype=torch.float64,
        is_exported=False,
    ),
)
NAMES_OF_ADAPTERS = ("a", "b", "c")


COPIES: dict[str, Callable[[GraloraModel], GraloraModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@dataclass(frozen=True)
class Scaled:
    """A pass that multiplies the result by a parameter of its own."""

    name: str

    def __call__(self, graph_module: fx.GraphModule) -> None:
        graph_module.register_parameter(self.name, nn.Parameter(torch.ones((), dtype=torch.float64)))
        graph = graph_module.graph
        with graph.inserting_before(graph.output_node()):
            scale_result(graph, graph.get_attr(self.name))


def scale_result(graph: fx.Graph, factor: Any) -> None:
    output = graph.output_node()
    result = output.all_input_nodes[0]
    with graph.inserting_before(output):
        output.replace_input_with(result, graph.call_function(torch.mul, (result, factor)))


class ChangesOfAdapters(RuleBasedStateMachine):
    """Every change of adapters in any order, beside a plain account of what is active and what it means."""

    @initialize(spec=st.sampled_from(MACHINE_NETS), data=st.data())
    def rewrite_a_net(self, spec: NetSpec, data: st.DataObject) -> None:
        net, net_trace = built(spec)
        x = torch.randn(3, 2, 4, dtype=spec.dtype, generator=torch.Generator().manual_seed(1))
        self.case = Case(net, net_trace, {"x": x if spec.rank == 3 else x[0]}, is_net=True)
        self.base = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        self.model = rewrite(net_trace, data.draw(configs(net_trace), label="config"), adapter_name="a")
        trained(self.model, "a")
        self.expected = {"a": Dense.of(self.model, "a")}
        self.active, self.merged, self.trainable = ["a"], list[str](), {"a"}
        self.factors = list[float]()  # by which the model's passes multiply the result
        self.add(data)

    # what is done

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        name = self.draw_name(data, set(NAMES_OF_ADAPTERS) - set(self.expected))
        config = data.draw(configs(self.case.traced), label="config")
        biases = config.bias != "none" and any(other.bias != "none" for other in self.model.configs.values())
        if biases and data.draw(st.integers(0, 3)):
            config, biases = replace(config, bias="none"), False
        fault = ConfigError if name in self.expected or biases else MergeError if self.merged else None
        if self.attempt(fault, lambda: self.model.add_adapter(name, config)):
            trained(self.model, name, seed=len(self.expected))
            self.note_added(name, Dense.of(self.model, name))

    @rule(data=st.data(), weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3))
    def add_weighted(self, data: st.DataObject, weights: list[float]) -> None:
        name = self.draw_name(data, set(NAMES_OF_ADAPTERS) - set(self.expected))
        names = self.draw_names(data, {other for other, meant in self.expected.items() if not meant.copies}) or ["a"]
        weights = weights[: len(names)]
        fault: type[GraloraError] | None = None
        if not set(names) <= set(self.expected) or any(self.expected[other].copies for other in names):
            fault = RewriteError
        elif name in self.expected:
            fault = ConfigError
        elif self.merged:
            fault = MergeError
        if self.attempt(fault, lambda: self.model.add_weighted_adapter(names, weights, name)):
            updates: dict[str, Tensor] = {}
            for other, weight in zip(names, weights, strict=True):
                for path, update in self.expected[other].updates.items():
                    updates[path] = updates.get(path, torch.zeros_like(update)) + weight * update
            self.note_added(name, Dense(updates, {}))
            dense = Dense.of(self.model, name)
            assert dense.updates.keys() == updates.keys()
            assert not dense.copies
            assert all(error(dense.updates[path], update) < 1e-9 for path, update in updates.items())

    @rule(data=st.data())
    def set_active(self, data: st.DataObject) -> None:
        names = self.draw_names(data, set(self.expected))
        unique = list(dict.fromkeys(names))
        fault: type[GraloraError] | None = None
        if not set(names) <= set(self.expected):
            fault = RewriteError
        elif self.merged:
            fault = MergeError
        elif self.claims_something_twice(unique):
            fault = RewriteError
        if self.attempt(fault, lambda: self.model.set_adapter(names)):
            self.active, self.trainable = unique, set(unique)

    @rule(data=st.data(), untie=st.sampled_from([True, True, False]))
    def merge_some(self, data: st.DataObject, untie: bool) -> None:
        waiting = [name for name in self.active if name not in self.merged]
        names = None if data.draw(st.booleans()) else list(dict.fromkeys(self.draw_names(data, set(waiting))))
        chosen = waiting if names is None else names
        paths = {path for name in {*chosen, *self.merged} & set(self.expected) for path in self.expected[name].updates}
        is_tied = any(self.case.traced.site(path).tied_with for path in paths)
        fault: type[GraloraError] | None = None
        if not set(chosen) <= set(self.expected):
            fault = GraloraError  # a RewriteError, or a MergeError for what was named before
        elif not chosen or not set(chosen) <= set(waiting) or (is_tied and not untie):
            fault = MergeError
        if self.attempt(fault, lambda: self.model.merge_adapter(names, untie=untie)):
            self.merged = [*self.merged, *chosen]

    @rule()
    @precondition(lambda self: self.merged)
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []

    @rule(data=st.data())
    @precondition(lambda self: len(self.expected) == len(NAMES_OF_ADAPTERS))
    def delete(self, data: st.DataObject) -> None:
        name = self.draw_name(data, set(self.expected) - set(self.active))
        is_free = name in self.expected and name not in self.active
        if self.attempt(None if is_free else RewriteError, lambda: self.model.delete_adapter(name)):
            del self.expected[name]
            self.trainable.discard(name)

    @rule(mode=st.booleans())
    def switch_mode(self, mode: bool) -> None:
        self.model.train(mode)

    @rule(factor=st.sampled_from([0.5, -2.0]))
    @precondition(lambda self: len(self.factors) < 2)
    def add_pass(self, factor: float) -> None:
        name = next(name for name in ("one", "two") if not hasattr(self.model.graph_module, name))
        self.model.add_pass(Scaled(name))
        with torch.no_grad():
            self.model.get_parameter(f"graph_module.{name}").fill_(factor)
        self.factors.append(factor)

    @rule(recompiles=st.booleans())
    @precondition(lambda self: len(self.factors) < 2)
    def edit_by_hand(self, recompiles: bool) -> None:
        scale_result(self.model.graph_module.graph, 3.0)
        if recompiles:
            self.model.graph_module.recompile()
        for lost in (copy.deepcopy, pickle.dumps, merge, lambda model: model.add_pass(print)):
            with pytest.raises(GraloraError):  # merge names tied weights, or that nothing is active, first
                lost(self.model)
        self.model.adopt_edits()
        self.factors.append(3.0)

    @rule()
    @precondition(lambda self: self.factors)
    def remove_last_pass(self) -> None:  # an edit may be of nodes that an earlier pass has made
        self.model.remove_pass(self.model._state.state.passes[-1])
        self.factors.pop()

    @rule(how=st.sampled_from(sorted(COPIES)), in_block=st.booleans())
    def go_on_with_a_copy(self, how: str, in_block: bool) -> None:
        if not in_block:
            self.model = COPIES[how](self.model)
            return
        with self.model.disable_adapter():
            copied = COPIES[how](self.model)
        self.model = copied

    @rule()
    @precondition(lambda self: self.active)
    def merge_a_copy(self) -> None:
        if any(self.case.traced.site(path).tied_with for name in self.active for path in self.expected[name].updates):
            return
        with self.model.disable_adapter():
            before = output(self.model, self.case)
        merged = merge(self.model, self.active).eval()
        assert error(output(merged, self.case), self.meant(self.active)) < 1e-9
        with self.model.disable_adapter():
            assert torch.equal(output(self.model, self.case), before)

    @rule(data=st.data(), inside=st.lists(st.sampled_from(["delete", "switch mode", "nested block"]), max_size=2))
    def disable_for_a_while(self, data: st.DataObject, inside: list[str]) -> None:
        active, merged = self.active, self.merged
        with self.model.disable_adapter():
            self.active, self.merged = [], []
            self.attempt(MergeError, self.model.merge_adapter)
            self.attempt(MergeError, self.model.unmerge_adapter)
            self.attempt(RewriteError, lambda: self.model.set_adapter(active))
            for what in inside:
                if what == "delete":
                    self.delete(data)
                elif what == "switch mode":
                    self.switch_mode(not self.model.training)
                else:
                    with self.model.disable_adapter():
                        self.check_invariants_of_a_block()
            self.check_invariants_of_a_block()
        self.active, self.merged = ([name for name in names if name in self.expected] for names in (active, merged))

    # what holds after each step

    @invariant()
    def the_output_is_that_of_the_dense_updates(self) -> None:
        if self.is_random():
            return
        assert error(output(self.model, self.case), self.meant(self.active)) < 1e-9

    @invariant()
    def the_graph_lints_and_no_node_is_dead(self) -> None:
        graph = self.model.graph_module.graph
        graph.lint()
        assert [node for node in graph.nodes if not node.users and node.op not in ("output", "placeholder")] == []

    @invariant()
    def only_active_adapters_have_nodes(self) -> None:
        assert self.model.active_adapters == self.active
        assert self.model.merged_adapters == self.merged
        assert self.model.configs.keys() == self.expected.keys()
        for name in self.expected:
            calls = sum(len(self.case.traced.site(path).calls) for path in self.expected[name].updates)
            inserted = {
                (mark["site"], mark["call"])
                for node in self.model.nodes(adapter_name=name)
                if "call" in (mark := node.meta["custom"]["gralora"])
            }
            assert len(inserted) == (calls if name in self.active and name not in self.merged else 0)

    @invariant()
    def only_what_was_set_trains_and_the_base_keeps_every_bit(self) -> None:
        for name in self.expected:
            flags = {parameter.requires_grad for _, parameter in self.model.adapter(name).named_parameters()}
            assert flags == {name in self.trainable}
        for name, parameter in self.case.source.named_parameters():
            assert torch.equal(parameter, self.base[name])
            assert not parameter.requires_grad

    # within

    def meant(self, names: list[str]) -> Tensor:
        dense = with_dense(self.case, [self.expected[name] for name in names])
        return output(dense, self.case) * math.prod(self.factors)

    def check_invariants_of_a_block(self) -> None:
        self.the_output_is_that_of_the_dense_updates()
        self.only_active_adapters_have_nodes()
        self.only_what_was_set_trains_and_the_base_keeps_every_bit()
        names = [node.name for node in self.model.graph_module.graph.nodes]
        assert self.factors or names == [node.name for node in self.case.traced.graph_module.graph.nodes]

    def claims_something_twice(self, names: list[str]) -> bool:
        """Return whether an adapter trains a copy of what another one adapts or copies too."""
        parameters = dict(self.case.source.named_parameters(remove_duplicate=False))
        copied = [base for name in names for base in self.expected[name].copies]
        adapted_elsewhere = [
            weight_name(self.case.traced.site(path), parameters) in self.expected[name].copies
            for name in names
            for other in names
            if other != name
            for path in self.expected[other].updates
        ]
        return len(copied) > len(set(copied)) or any(adapted_elsewhere)

    def draw_name(self, data: st.DataObject, sensible: set[str]) -> str:
        """Return a name of which a change is to be made; now and then one of which it cannot be."""
        pool = sorted(sensible) if sensible and data.draw(st.integers(0, 7)) else list(NAMES_OF_ADAPTERS)
        return data.draw(st.sampled_from(pool))

    def draw_names(self, data: st.DataObject, sensible: set[str]) -> list[str]:
        pool = sorted(sensible) if sensible and data.draw(st.integers(0, 7)) else list(NAMES_OF_ADAPTERS)
        names = data.draw(st.permutations(pool))
        return names if data.draw(st.booleans()) else data.draw(st.lists(st.sampled_from(pool), max_size=3))

    def is_random(self) -> bool:
        """Return whether two runs may differ."""
        dropouts = [self.model.configs[name].gralora_dropout for name in self.active if name not in self.merged]
        return self.model.training and any(dropouts)

    def note_added(self, name: str, meant: Dense) -> None:
        if not self.expected:
            self.active, self.trainable = [name], {name}
        self.expected[name] = meant

    def attempt(self, fault: type[GraloraError] | None, change: Callable[[], object]) -> bool:
        """Make a change, or see it refused and nothing changed; whether it was made."""
        if fault is None:
            change()
            return True
        before = self.snapshot()
        with pytest.raises(fault):
            change()
        assert self.snapshot() == before
        return False

    def snapshot(self) -> Any:
        parameters = self.model.named_parameters(remove_duplicate=False)
        return (
            text(self.model),
            self.model.graph_module.code,
            repr(self.model),
            {name: (id(parameter), parameter.requires_grad) for name, parameter in parameters},
            None if self.is_random() else output(self.model, self.case).tolist(),
        )


def test_any_order_of_changes_keeps_output_and_graph_right() -> None:
    run_state_machine_as_test(ChangesOfAdapters, settings=examples(60, stateful_step_count=15))
