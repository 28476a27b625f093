"""Threads: whoever runs a model beside one that changes it sees one state from beginning to end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.core.adapters.current_graph import ReadWriteLock
from gralora_fx.errors import GraloraError

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
CONFIG = GraloraConfig(r=4, target_modules="all-linear", init_weights=False)


@pytest.fixture
def model() -> GraloraModel:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())]
    result = rewrite(trace(nn.Sequential(*layers).eval(), (X,)), CONFIG)
    result.add_adapter("b", CONFIG)
    return result


@contextmanager
def reading(model: GraloraModel, legal: list[Tensor], readers: int = 2) -> Iterator[list[object]]:
    """Threads that run the model all the while; what they got besides legal outputs."""
    wrong: list[object] = []
    count = [0]
    is_over = threading.Event()

    def read() -> None:
        with torch.no_grad():
            while not is_over.is_set():
                try:
                    output = model(X)
                except Exception as error:  # noqa: BLE001  # whatever a torn state raises
                    wrong.append(error)
                    continue
                count[0] += 1
                if not any(torch.equal(output, expected) for expected in legal):
                    wrong.append("an output of no state")

    threads = [threading.Thread(target=read) for _ in range(readers)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert count[0] > 0


def output(model: GraloraModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(X)
    return result


def test_a_forward_beside_any_change_gives_an_output_of_one_state(model: GraloraModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    legal = [output(model)]
    model.merge_adapter()
    legal.append(output(model))
    model.unmerge_adapter()
    model.set_adapter("b")
    legal.append(output(model))
    model.set_adapter("default")
    with model.disable_adapter():
        legal.append(output(model))

    def disable_and_enable() -> None:
        with model.disable_adapter():
            pass

    def add_and_delete() -> None:
        model.add_adapter("c", CONFIG)
        model.delete_adapter("c")

    changes: list[Callable[[], object]] = [
        model.merge_adapter,
        model.unmerge_adapter,
        lambda: model.set_adapter("b"),
        add_and_delete,
        model.train,
        lambda: model.set_adapter("default"),
        disable_and_enable,
        lambda: model.load_adapter(tmp_path),
        model.eval,
        lambda: model.load_state_dict(model.state_dict()),
    ]
    with reading(model, legal) as wrong:
        for step in range(300):
            changes[step % len(changes)]()
    assert wrong == []


def test_an_adapter_that_is_loaded_anew_is_the_old_or_the_new_one(model: GraloraModel, tmp_path: Path) -> None:
    parameters = list(model.parameters())
    legal = []
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name, "default")
        legal.append(output(model))
        with torch.no_grad():
            for factors in model.adapter("default").factors.values():
                factors.B.mul_(-2)
    model.load_adapter(tmp_path / "first")
    with reading(model, legal) as wrong:
        for step in range(40):
            model.load_adapter(tmp_path / ("first", "second")[step % 2])
    assert wrong == []
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))  # optimizers hold them


def test_changes_of_several_threads_follow_each_other(model: GraloraModel) -> None:
    expected = output(model)
    errors: list[Exception] = []

    def change() -> None:
        for _ in range(15):
            for step in (
                model.merge_adapter,
                model.unmerge_adapter,
                lambda: model.set_adapter("b"),
                lambda: model.set_adapter("default"),
                lambda: None,
            ):
                try:
                    step()
                except GraloraError:
                    continue  # another thread was first
                except Exception as error:  # noqa: BLE001  # whatever a torn state raises
                    errors.append(error)

    threads = [threading.Thread(target=change) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    if model.merged_adapters:
        model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(output(model), expected)


def test_blocks_of_two_threads_disable_until_the_last_ends(model: GraloraModel) -> None:
    expected = output(model)
    first, second = model.disable_adapter(), model.disable_adapter()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.active_adapters == []
    second.__exit__(None, None, None)
    assert model.active_adapters == ["default"]
    assert torch.equal(output(model), expected)


def test_a_graph_that_someone_holds_is_not_written_by_the_next_merge(model: GraloraModel) -> None:
    model.merge_adapter()
    held = model.graph_module
    with torch.no_grad():
        expected = held(input=X)
    model.unmerge_adapter()
    model.set_adapter("b")
    model.merge_adapter()
    with torch.no_grad():
        assert torch.equal(held(input=X), expected)


def test_a_backward_after_the_next_merge_has_the_weights_of_its_forward(model: GraloraModel) -> None:
    gradients = []
    for is_merged_again in (False, True):
        x = X.clone().requires_grad_()
        model.set_adapter("default")
        model.merge_adapter()
        result = model(x)
        model.unmerge_adapter()
        if is_merged_again:
            model.set_adapter("b")
            model.merge_adapter()
            model.unmerge_adapter()
        result.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_a_writer_waits_for_readers_and_not_for_itself() -> None:
    readers = ReadWriteLock()
    order: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def read() -> None:
        with readers:
            inside.set()
            go_on.wait(10)
            with readers:
                order.append("read")

    thread = threading.Thread(target=read)
    thread.start()
    inside.wait(10)
    threading.Timer(0.05, go_on.set).start()
    with readers, readers.writing(), readers:
        order.append("written")
    thread.join()
    assert order == ["read", "written"]
    assert not readers.is_read
