"""An export directory is written whole or not at all, whatever stops the run: a full disk, a signal, a kill."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gralora_fx import trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.artifact.staging import check_file, check_folder, check_output, require_space, staged


def write(folder: Path, text: str) -> None:
    (folder / "gralora_export.json").write_text('{"schema_version": 1}')
    (folder / "model.onnx").write_text(text)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return an earlier export."""
    with staged(tmp_path / "onnx") as folder:
        write(folder, "earlier")
    return tmp_path / "onnx"


def alone(output: Path, text: str = "earlier") -> bool:
    """Return whether an export is whole and nothing is left beside it."""
    return [path.name for path in output.parent.iterdir()] == ["onnx"] and (output / "model.onnx").read_text() == text


def test_an_export_is_replaced_whole(output: Path) -> None:
    with staged(output) as folder:
        write(folder, "new")
        assert (output / "model.onnx").read_text() == "earlier"
    assert alone(output, "new")
    assert output.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_any_end_leaves_an_earlier_export(output: Path, error: BaseException) -> None:
    def end(folder: Path) -> None:
        write(folder, "half")
        raise error

    with pytest.raises(type(error)), staged(output) as folder:
        end(folder)
    assert alone(output)


# -- a full disk -------------------------------------------------------------------------------------------------------


def big(columns: int = 40_000) -> Any:
    module = nn.Sequential(nn.Linear(8, columns, bias=False))
    return trace(module.eval(), (torch.randn(1, 8),))


def test_a_disk_without_room_is_told_before_anything_is_written(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match=r"onnx needs 1,280,000 bytes, but its disk has 1,000 free; make room or"):
        export_onnx(big(), output, verify=False, overwrite=True)
    assert alone(output)


def test_room_is_asked_of_the_nearest_directory_that_exists(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ExportError, match="needs"):
        require_space(tmp_path / "not" / "yet", 1 << 60)


def _export_with_limit(output: str, limit: int) -> None:
    """Export where the system refuses files above a size, as a full disk or a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        export_onnx(big(), output, verify=False, overwrite=True)
    except ExportError as error:
        sys.exit(0 if f"cannot write {output} (" in str(error) and "nothing was changed there" in str(error) else 2)
    sys.exit(1)


def test_a_disk_that_refuses_midway_leaves_an_earlier_export(output: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_export_with_limit, args=(str(output), 100_000))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert alone(output)


def test_a_full_disk_says_how_much_is_free(output: Path) -> None:
    free = f"{shutil.disk_usage(output).free // 10**9}"
    message = rf"cannot write .*onnx \(No space left on device; {free}[0-9,]* bytes are free\); nothing was changed"
    with pytest.raises(ExportError, match=message), staged(output):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert alone(output)


def test_a_rename_that_fails_puts_the_earlier_export_back(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ExportError, match="Input/output error"), staged(output) as folder:
        write(folder, "new")
    assert alone(output)


@pytest.mark.parametrize("output", ["file/onnx", "file/not/yet/onnx"])
def test_an_output_that_cannot_be_made_is_told_first(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"onnx cannot be made, since .*file is not writable; give another output"):
        check_output(tmp_path / output)


# -- an earlier export of another model --------------------------------------------------------------------------------


def test_an_export_of_another_model_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "onnx"
    small = big(4)
    export_onnx(small, path, verify=False)
    export_onnx(small, path, verify=False, precision="fp16")  # the same base and task
    before = (path / "gralora_export.json").read_bytes()
    with pytest.raises(ExportError, match=r"holds an export of another base; give overwrite=True to"):
        export_onnx(big(4), path, verify=False)
    small = dataclasses.replace(small, task="feature-extraction")
    with pytest.raises(ExportError, match="holds an export for the task None, not feature-extraction; give over"):
        export_onnx(small, path, verify=False)
    assert (path / "gralora_export.json").read_bytes() == before
    export_onnx(big(4), path, verify=False, overwrite=True)
    assert (path / "gralora_export.json").read_bytes() != before


# -- an interrupted export ---------------------------------------------------------------------------------------------

RUN = """
import signal, sys, time
from pathlib import Path
import onnx_ir as ir
from gralora_fx import cli
from gralora_fx.exporters import onnx

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores

def stall(folder, *_):
    print("writing", flush=True)
    time.sleep(60)

onnx.write_program_files = stall
sys.argv = ["gralora-fx", "export", "--model", sys.argv[1], "--output", sys.argv[2], "--task", "text-classification",
            "--overwrite"]
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_export_leaves_nothing_half_written(
    output: Path, tmp_path_factory: pytest.TempPathFactory, number: signal.Signals
) -> None:
    from tiny_models import tiny_model

    base = tmp_path_factory.mktemp("base")
    tiny_model("bert", num_hidden_layers=1).save_pretrained(base)
    command = [sys.executable, "-c", RUN, str(base), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(list(output.parent.iterdir())) == 2
        process.send_signal(number)
        assert process.wait(30) != 0
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
        ends = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
        assert lines == ([f"{ends[number]}; nothing was left half written"] if number in ends else [])
    assert (output / "model.onnx").read_text() == "earlier"
    if number == signal.SIGKILL:  # no process can clean up then: the next run does
        assert len(list(output.parent.iterdir())) == 2
        with staged(output) as folder:
            write(folder, "next")
        assert alone(output, "next")
    else:
        assert alone(output)


def test_an_export_that_a_killed_run_was_about_to_replace_is_put_back(output: Path) -> None:
    work = output.parent / ".onnx.gralora-abc"
    work.mkdir()
    output.rename(work / "old")
    with pytest.raises(RuntimeError), staged(output):
        raise RuntimeError
    assert alone(output)


def test_what_another_run_or_the_user_has_beside_it_is_left(output: Path) -> None:
    (output.parent / ".onnx.backup").mkdir()
    with staged(output) as one:
        write(one, "one")
        with staged(output) as two:
            write(two, "two")
        assert (one / "model.onnx").read_text() == "one"
    assert {path.name for path in output.parent.iterdir()} == {"onnx", ".onnx.backup"}
    assert (output / "model.onnx").read_text() == "one"


def test_what_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for check, path, message in (
        (check_folder, 5, "cannot write 5 (.*); give a directory"),
        (check_folder, "", "cannot write '' .it is empty.; give a directory"),
        (check_folder, tmp_path / "file", "cannot write .*file .it is a file, not a directory.; give a directory"),
        (check_file, None, "cannot write None (.*); give the path of a file"),
        (check_file, tmp_path, "cannot write .* .Is a directory.; give the path of a file"),
        (check_output, tmp_path / "link", "link is a link, which cannot be replaced; give another output directory"),
    ):
        with pytest.raises(ExportError, match=message):
            check(path)  # type: ignore[operator]
