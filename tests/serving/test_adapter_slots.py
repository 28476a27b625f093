"""Adapters of open rows in buffers: what a stack holds, how wide it is, and when large adapters run apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gralora_fx.format.adapter_inputs import AdapterInputs, AdapterSite
from gralora_fx.run.engine.adapter_slots import AdapterSlots, RowStacks
from gralora_fx.run.engine.adapters import LoadedAdapter, Stack
from gralora_fx.run.sessions.ort_values import as_tensor

INPUTS = AdapterInputs("data", 2, "float32", (AdapterSite("up", 4, 6), AdapterSite("head", 4, 4, "whole", True)))


def adapter(name: str, rank: int) -> LoadedAdapter:
    generator = np.random.default_rng(len(name) * 100 + rank)
    shapes = {key: shape for site in INPUTS.sites for key, shape in site.shapes(2, rank, rank).items()}
    tensors = {key: generator.random([int(n) for n in shape], np.float32) for key, shape in shapes.items()}
    record: Any = None
    return LoadedAdapter(name, record, tensors)


def in_stack(stack: Stack, adapter: LoadedAdapter) -> dict[str, Any]:
    return {name: as_tensor(value)[stack.ids[adapter]].numpy() for name, value in stack.values.items()}


def check(stack: Stack, used: Sequence[LoadedAdapter]) -> None:
    """Each adapter is what a stack made anew has, and there is no room for others."""
    assert sorted(stack.ids.values()) == list(range(1 + len(used)))
    fresh = Stack.of(used, INPUTS)
    for each in used:
        for name, array in in_stack(stack, each).items():
            expected = in_stack(fresh, each)[name]
            assert array.sum() == pytest.approx(expected.sum(), rel=1e-6)
            if array.shape == expected.shape:
                assert np.array_equal(array, expected)
    assert all(value.shape()[0] == 1 + len(used) for value in stack.values.values())
    assert all(not as_tensor(value)[0].any() for value in stack.values.values())


@pytest.mark.quick
def test_slots_hold_what_is_used_without_gaps() -> None:
    one, two, three, wide = adapter("a", 4), adapter("b", 2), adapter("c", 4), adapter("d", 8)
    slots = AdapterSlots(INPUTS, 4)
    for used in ([one], [one, two], [two], [two, three, one], [wide, two], [one, three], [], [two]):
        check(slots.stack_of(used), used)


@pytest.mark.quick
def test_an_adapter_is_written_once_and_stays() -> None:
    one, two = adapter("a", 4), adapter("b", 4)
    slots = AdapterSlots(INPUTS, 3)
    values = slots.stack_of([one, two]).values
    one.tensors["up.gralora_A"][...] = 9  # type: ignore[index]  # nobody does this but a test
    assert slots.stack_of([two, one]).values is values
    assert not (in_stack(slots.stack_of([two, one]), one)["up.gralora_A"] == 9).any()


@pytest.mark.quick
def test_buffers_become_narrow_again() -> None:
    small, wide = adapter("a", 2), adapter("d", 16)
    slots = AdapterSlots(INPUTS, 2)
    slots.stack_of([small, wide])
    assert slots.stack_of([small]).values["up.gralora_A"].shape()[-1] == 2


@pytest.mark.quick
@pytest.mark.parametrize(("weights", "parts"), [(0, [3, 1]), (10**9, [4])])
def test_large_adapters_run_apart_where_that_reads_less(weights: int, parts: list[int]) -> None:
    used = [adapter(name, 2) for name in "abc"] + [adapter("d", 64)]
    stacks = RowStacks(INPUTS, 8, weights).of([None, *used, used[0]])
    assert [len(stack.ids) - 1 for stack in stacks] == parts
    for each in used:
        (stack,) = (stack for stack in stacks if each in stack.ids)
        assert as_tensor(stack.values["up.gralora_A"]).shape[-1] in (2, 64)
    assert len(RowStacks(INPUTS, 8, 0).of([None])) == 1
