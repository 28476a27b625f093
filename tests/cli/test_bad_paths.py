"""Every command with every kind of bad path: one line that names it, no traceback, nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import run
from typer.main import get_command

from gralora_fx.cli import app

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
MODEL, ADAPTER = '{"model_type": "bert", "architectures": ["BertModel"]}', '{"peft_type": "GRALORA", "r": 2}'


def missing(folder: Path) -> Path:
    return folder / "none"


def file(folder: Path) -> Path:
    (folder / "file").write_text("no export")
    return folder / "file"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir(exist_ok=True)
    return folder / "empty"


def other(folder: Path) -> Path:
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "notes.txt").write_text("mine")
    return folder / "other"


def within_file(folder: Path) -> Path:
    return file(folder) / "x"


def link(path: Path, target: Path) -> Path:
    if not os.path.lexists(path):
        path.symlink_to(target)
    return path


def loop(folder: Path) -> Path:
    return link(folder / "loop", folder / "loop")


def within_loop(folder: Path) -> Path:
    return loop(folder) / "x"


def dangling(folder: Path) -> Path:
    return link(folder / "dangling", folder / "gone")


def long_name(folder: Path) -> Path:
    return folder / ("a" * 300)


def long_path(folder: Path) -> Path:
    return folder.joinpath(*["a" * 200] * 30)


def read_only(_: Path) -> Path:
    return Path("/proc/gralora")  # not even root can make it


def unreadable(folder: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may read all")
    (folder / "unreadable").mkdir(mode=0, exist_ok=True)
    return folder / "unreadable"


def zero_byte(folder: Path) -> str:
    return f"{folder}/a\0b"  # no shell passes it on; a caller of `main` may


INPUTS = (
    missing,
    file,
    empty,
    other,
    within_file,
    loop,
    within_loop,
    dangling,
    long_name,
    long_path,
    unreadable,
    zero_byte,
)
OUTPUTS = (
    file,
    other,
    within_file,
    loop,
    within_loop,
    dangling,
    long_name,
    long_path,
    read_only,
    unreadable,
    zero_byte,
)
READ = {"--onnx", "--model", "--adapter", "--adapter-root", "--texts"}
WRITTEN = {"--output", "--html", "--svg", "--dump"}


def options(command: str) -> set[str]:
    """Options of a command that name paths; of `demo`, which is slow, none."""
    names = {param.opts[0] for param in COMMANDS[command].params}
    return set() if command == "demo" else names & (READ | WRITTEN)


def cases() -> Iterator[tuple[str, str, Callable[[Path], Path | str]]]:
    for command in COMMANDS:
        for option in sorted(options(command)):
            for kind in INPUTS if option in READ else OUTPUTS:
                if kind is other and option == "--dump":
                    continue  # which may hold other files
                yield command, option, kind


def test_every_command_that_takes_a_path_is_tried() -> None:
    assert {command for command, *_ in cases()} == set(COMMANDS) - {"demo"}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path | str]:
    """Make paths that are right as far as a look at the files tells."""
    for folder, name, content in (("model", "config.json", MODEL), ("adapter", "adapter_config.json", ADAPTER)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
    (tmp_path / "texts").write_text("a text\n")
    return {
        "--model": tmp_path / "model",
        "--adapter": tmp_path / "adapter",
        "--onnx": tmp_path / "nothing",
        "--output": tmp_path / "output",
        "--texts": tmp_path / "texts",
        "--prompt": "x",
    }


def arguments(command: str, option: str, path: Path | str, places: dict[str, Path | str]) -> list[str]:
    """Return a command line that is right but for one path; `--adapter` of what serves is a pair."""
    params = {param.opts[0]: param for param in COMMANDS[command].params}
    needed = [name for name, param in params.items() if param.required or name in ("--onnx", "--model")]
    chosen = {name: places[name] for name in needed if name in places} | {option: path}
    if params.get("--adapter") is not None and "NAME" in str(params["--adapter"].metavar) and "--adapter" in chosen:
        chosen["--adapter"] = f"name={chosen['--adapter']}"
    if option == "--texts":
        chosen["--quantize"] = "int8"
    return [command, *(str(part) for pair in chosen.items() for part in pair)]


@pytest.mark.parametrize(
    ("command", "option", "kind"),
    [pytest.param(*case, id=f"{case[0]} {case[1]} {case[2].__name__}") for case in cases()],
)
def test_a_bad_path_is_one_line(
    command: str, option: str, kind: Callable[[Path], Path | str], places: dict[str, Path | str], tmp_path: Path
) -> None:
    path = kind(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    printed = run(*arguments(command, option, path, places))
    assert printed.status == 1 or (kind is zero_byte and printed.status == 2), printed  # which the parser may refuse
    lines = [line for line in printed.stderr.splitlines() if not line.endswith(" s")]
    assert len(lines) == 1, printed.stderr
    assert lines[0].startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
