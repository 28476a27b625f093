"""Memory that is used again: never while a tensor, a view or an array of it is alive."""

from __future__ import annotations

import torch

from gralora_fx.base.sources.reused_memory import ReusedMemory

HALVES = [torch.randn(40, 50).bfloat16() for _ in range(8)]


def test_memory_is_used_again_once_nothing_reads_it() -> None:
    memory = ReusedMemory()
    places = set()
    for half in HALVES:
        values = memory.cast(half)
        assert torch.equal(values, half.float())
        places.add(values.data_ptr())
        del values
    assert len(places) == 1


def test_what_is_alive_keeps_its_values() -> None:
    memory = ReusedMemory()
    alive = [memory.cast(half) for half in HALVES[:3]]
    views = [memory.cast(half)[3:].t() for half in HALVES[3:6]]
    array = memory.cast(HALVES[6]).numpy()
    memory.cast(HALVES[7])
    assert all(torch.equal(values, half.float()) for values, half in zip(alive, HALVES, strict=False))
    assert all(torch.equal(view.t(), half[3:].float()) for view, half in zip(views, HALVES[3:], strict=False))
    assert torch.equal(torch.from_numpy(array), HALVES[6].float())


def test_a_smaller_tensor_gets_the_memory_of_a_larger_one() -> None:
    memory = ReusedMemory()
    first = memory.cast(HALVES[0]).data_ptr()
    smaller = memory.cast(HALVES[1][:7])
    assert smaller.data_ptr() == first
    assert torch.equal(smaller, HALVES[1][:7].float())


def test_floats_are_not_copied() -> None:
    values = torch.randn(3)
    assert ReusedMemory().cast(values) is values
