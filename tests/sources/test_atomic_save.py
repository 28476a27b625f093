"""Saving an adapter: whole or not at all, killed at any point, on a full disk, and from two sides at once."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from tiny_models import tiny_model
from torch import nn
from traces import traced

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.core.adapters import adapter_files as adapter_files_module
from gralora_fx.core.adapters.adapter_files import WEIGHTS_NAME, read_adapter
from gralora_fx.core.config import CONFIG_NAME
from gralora_fx.errors import CheckpointError, ConfigError, GraloraError

FORK = multiprocessing.get_context("fork")
FILES = {CONFIG_NAME, WEIGHTS_NAME}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip `fsync`: a process that is killed loses nothing that it has written; only a machine does."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@functools.cache
def version(number: int) -> GraloraModel:
    """Return a model with two adapters whose every value, and whose `alpha`, is the number."""
    graph = trace(Net(), (torch.ones(2, 8),))
    model = rewrite(graph, GraloraConfig(r=4, alpha=number, target_modules=["first"]))
    model.add_adapter("other", GraloraConfig(r=4, alpha=number, target_modules=["second"]))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad or "gralora" in _:
                parameter.fill_(number)
    return model


def number_in(directory: Path) -> int:
    """Read by both of its files which version a directory holds."""
    config, tensors = read_adapter(directory)
    (number,) = {float(value) for tensor in tensors.values() for value in tensor.unique()}
    assert number == config.alpha, "tensors of one save beside the configuration of another"
    return int(number)


def number_in_place(directory: Path) -> int | None:
    """Return the same of the two files in their places, as a program that knows only those sees them."""
    if not (directory / WEIGHTS_NAME).exists():
        return None
    alpha = json.loads((directory / CONFIG_NAME).read_text())["alpha"]
    values = {float(t.flatten()[0]) for t in safetensors.torch.load((directory / WEIGHTS_NAME).read_bytes()).values()}
    assert values == {alpha}, "tensors of one save beside the configuration of another"
    return int(alpha)


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


WHOLE = {"README.md", CONFIG_NAME, WEIGHTS_NAME, "other", f"other/{CONFIG_NAME}", f"other/{WEIGHTS_NAME}"}

# -- kills --------------------------------------------------------------------------------------------------------


def die_at(step: int, save: Callable[[], None]) -> None:
    """Save in a process that ends, without any clean-up, before its operation of this number on the disk."""
    count = 0

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                os._exit(9)
            return operation(*args, **kwargs)

        return run

    for owner, names in ((Path, ("mkdir", "rename", "replace", "unlink", "write_text")), (os, ("rmdir",))):
        for name in names:
            setattr(owner, name, dying(getattr(owner, name)))
    save()
    os._exit(0)


def ended_at(step: int, save: Callable[[], None]) -> int:
    process = FORK.Process(target=die_at, args=(step, save))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def test_a_save_that_ends_at_any_step_has_happened_whole_or_not_at_all(tmp_path: Path) -> None:
    step, seen = 0, []
    while True:
        directory = tmp_path / str(step)
        version(1).save_pretrained(directory)
        (directory / "README.md").write_text("mine")
        code = ended_at(step, lambda directory=directory: version(2).save_pretrained(directory))  # type: ignore[misc]
        numbers = {number_in(directory), number_in(directory / "other")}
        assert len(numbers) == 1, f"one adapter of each save after step {step}"
        seen.append(numbers.pop())
        in_place = {number_in_place(directory), number_in_place(directory / "other")}
        assert in_place <= {1, 2, None}
        assert GraloraConfig.from_pretrained(directory).alpha == seen[-1]
        version(3).save_pretrained(directory)
        assert files_in(directory) == WHOLE
        assert (number_in(directory), number_in_place(directory / "other")) == (3, 3)
        if code == 0:
            break
        step += 1
    assert step > 10, "the save was not cut where it could be"
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


def test_a_first_save_that_ends_at_any_step(tmp_path: Path) -> None:
    step = 0
    while True:
        directory = tmp_path / str(step)
        code = ended_at(step, lambda directory=directory: version(2).save_pretrained(directory))  # type: ignore[misc]
        try:
            assert number_in(directory) == number_in(directory / "other") == 2
        except GraloraError:
            assert code != 0
        version(3).save_pretrained(directory)
        assert files_in(directory) == WHOLE
        if code == 0:
            break
        step += 2
    assert step > 10


def test_a_part_that_is_saved_later_is_not_hidden_by_an_unfinished_save(tmp_path: Path) -> None:
    for step in range(4, 40, 3):
        directory = tmp_path / str(step)
        version(1).save_pretrained(directory)
        code = ended_at(step, lambda directory=directory: version(2).save_pretrained(directory))  # type: ignore[misc]
        GraloraConfig(alpha=5).save_pretrained(tmp_path / "elsewhere")
        version(4).save_pretrained(directory / "other", ["default"])
        assert number_in(directory / "other") == 4
        assert number_in(directory) in (1, 2)
        if code == 0:
            break


def save_for_ever(directory: Path) -> None:
    while True:
        for number in (1, 2, 3):
            version(number).save_pretrained(directory)


def test_random_kills_leave_one_save(tmp_path: Path) -> None:
    draw = random.Random(0)
    directory = tmp_path / "adapter"
    for number in (1, 2, 3):
        version(number).save_pretrained(directory)
    for _ in range(15):
        process = FORK.Process(target=save_for_ever, args=(directory,))
        process.start()
        time.sleep(0.02 + 0.05 * draw.random())
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert number_in(directory) == number_in(directory / "other")
        assert {number_in_place(directory), number_in_place(directory / "other")} <= {1, 2, 3, None}
    version(3).save_pretrained(directory)
    assert files_in(directory) == WHOLE


@pytest.mark.quick
def test_a_configuration_alone_is_replaced_at_once(tmp_path: Path) -> None:
    step = 0
    while True:
        directory = tmp_path / str(step)
        GraloraConfig(alpha=1).save_pretrained(directory)
        code = ended_at(step, lambda directory=directory: GraloraConfig(alpha=2).save_pretrained(directory))  # type: ignore[misc]
        assert GraloraConfig.from_pretrained(directory).alpha in (1, 2)
        assert json.loads((directory / CONFIG_NAME).read_text())["alpha"] in (1, 2)
        GraloraConfig(alpha=3).save_pretrained(directory)
        assert files_in(directory) == {CONFIG_NAME}
        if code == 0:
            break
        step += 1
    assert step > 4


def test_a_folder_of_somebody_else_is_not_taken_for_an_unfinished_save(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    version(1).save_pretrained(directory)
    planted = tmp_path / ".gralora-commit" / "mine"
    version(2).save_pretrained(planted)
    assert number_in(directory) == 2, "a save of the directory above is not looked for, so nothing is tested"
    if os.getuid():
        pytest.skip("only root can give files away")
    os.chown(planted.parent, 12345, -1)
    assert number_in(directory) == 1
    version(3).save_pretrained(directory)
    assert number_in(directory) == 3
    assert files_in(directory) == WHOLE


# -- errors -------------------------------------------------------------------------------------------------------


def no_space(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def no_space_for_the_second(calls: Iterator[int], original: Callable[..., None]) -> Callable[..., None]:
    return lambda *args, **kwargs: original(*args, **kwargs) if next(calls) == 0 else no_space()


def test_a_full_disk_leaves_the_earlier_adapters_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version(1).save_pretrained(tmp_path)
    before = files_in(tmp_path)
    save_file = no_space_for_the_second(iter(range(9)), adapter_files_module.save_file)
    monkeypatch.setattr(adapter_files_module, "save_file", save_file)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device.*; give another directory"):
        version(2).save_pretrained(tmp_path)
    assert files_in(tmp_path) == before
    assert number_in(tmp_path) == number_in(tmp_path / "other") == 1


def test_a_full_disk_leaves_no_new_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_files_module, "save_file", no_space)
    with pytest.raises(CheckpointError, match="No space left on device"):
        version(2).save_pretrained(tmp_path / "new" / "folder")
    assert files_in(tmp_path) == set()


def test_a_configuration_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GraloraConfig(alpha=1).save_pretrained(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot write .* \(No space left on device\); give another directory"):
        GraloraConfig(alpha=2).save_pretrained(tmp_path)
    assert GraloraConfig.from_pretrained(tmp_path).alpha == 1
    assert files_in(tmp_path) == {CONFIG_NAME}


BAD_PATHS = ["\0", "a" * 5000, "x/" * 3000, "", "\ud800", None, 5, b"abc"]


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: repr(path)[:12])
def test_what_is_not_a_path_is_one_clear_error(path: Any) -> None:
    for save, error in ((version(1).save_pretrained, CheckpointError), (GraloraConfig().save_pretrained, ConfigError)):
        with pytest.raises(error, match=r"cannot write .*; give another directory") as caught:
            save(path)
        assert len(str(caught.value)) < 400
        str(caught.value).encode()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.symlink("nowhere", tmp_path / "broken")
    (tmp_path / "taken" / CONFIG_NAME).mkdir(parents=True)
    (tmp_path / "taken2").mkdir()
    (tmp_path / "taken2" / "other").write_text("")
    before = files_in(tmp_path)
    for target in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "broken", tmp_path / "taken"):
        with pytest.raises(CheckpointError, match="cannot write"):
            version(1).save_pretrained(target)
        with pytest.raises(ConfigError, match="cannot write"):
            GraloraConfig().save_pretrained(target)
    with pytest.raises(CheckpointError, match="cannot write"):
        version(1).save_pretrained(tmp_path / "taken2")
    with pytest.raises(CheckpointError, match="cannot write"):
        version(1).save_pretrained("/proc/gralora")
    assert files_in(tmp_path) == before


# -- several at once ----------------------------------------------------------------------------------------------


def test_two_processes_and_a_reader(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    for number in (1, 2, 3):
        version(number).save_pretrained(directory)
    savers = [FORK.Process(target=save_for_ever, args=(directory,)) for _ in range(2)]
    for process in savers:
        process.start()
    try:
        for _ in range(40):
            assert number_in(directory) in (1, 2, 3)
            assert GraloraConfig.from_pretrained(directory / "other").alpha in (1, 2, 3)
    finally:
        for process in savers:
            process.kill()
            process.join(60)
    assert number_in(directory) == number_in(directory / "other")


def test_two_threads(tmp_path: Path) -> None:
    version(1), version(2)
    failures: list[BaseException] = []

    def save(number: int) -> None:
        try:
            for _ in range(10):
                version(number).save_pretrained(tmp_path)
        except BaseException as failure:  # noqa: BLE001  # whatever it is, the test fails
            failures.append(failure)

    threads = [threading.Thread(target=save, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert number_in(tmp_path) == number_in(tmp_path / "other")
    assert files_in(tmp_path) == WHOLE


# -- files of two saves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 2}, "alpha is 2 in adapter_config.json, but the tensors were saved with 1"),
        ({"alpha": 2, "hybrid_r": 4}, "alpha is 2 .*; .*hybrid_r is 4|hybrid_r is 4 .*alpha is 2"),
        ({"alpha_pattern": {"first": 3}}, r"alpha_pattern is \{'first': 3\} in adapter_config.json"),
    ],
    ids=str,
)
def test_a_configuration_of_another_save_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    version(1).save_pretrained(tmp_path, ["default"])
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(tmp_path)
    assert "copy or save both files again, or put the value back" in str(caught.value)


def test_what_a_user_may_edit_loads(tmp_path: Path) -> None:
    version(1).save_pretrained(tmp_path, ["default"])
    path = tmp_path / CONFIG_NAME
    fields = {**json.loads(path.read_text()), "base_model_name_or_path": "mine", "inference_mode": False, "alpha": 1.0}
    path.write_text(json.dumps({**fields, "gralora_dropout": 0.1, "peft_version": "0.21.2"}))
    assert read_adapter(tmp_path)[0].base_model_name_or_path == "mine"


def test_tensors_without_a_record_load_as_ever(tmp_path: Path) -> None:
    version(1).save_pretrained(tmp_path, ["default"])
    for metadata in (None, {"format": "pt"}, {"gralora_config": "3"}, {"gralora_config": '{"alpha": 1, "new": 2}'}):
        safetensors.torch.save_file(read_adapter(tmp_path)[1], tmp_path / WEIGHTS_NAME, metadata=metadata)
        assert read_adapter(tmp_path)[0].alpha == 1
    safetensors.torch.save_file(read_adapter(tmp_path)[1], tmp_path / WEIGHTS_NAME, metadata={"gralora_config": "{"})
    with pytest.raises(CheckpointError, match="has a damaged header"):
        read_adapter(tmp_path)


def test_peft_reads_and_writes_the_files_without_a_warning(tmp_path: Path) -> None:
    model = rewrite(traced("bert"), GraloraConfig(r=8, target_modules={"query"}, init_weights=False))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as file:
        assert set(file.metadata()) == {"format", "gralora_config"}
    assert json.loads((tmp_path / CONFIG_NAME).read_text()).keys() == peft.GraloraConfig().to_dict().keys() - {
        "auto_mapping",
        "peft_version",
    }
    base = tiny_model("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
        theirs.save_pretrained(str(tmp_path))
    assert read_adapter(tmp_path)[0].r == 8
