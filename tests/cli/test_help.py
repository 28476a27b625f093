"""Help: an example first, whole sentences, what is required, a placeholder for each value, one name for one thing."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any

import pytest
import typer
from running import run
from terminals import in_terminal, plain_lines
from typer.main import get_command

from gralora_fx.cli import app

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
LONGEST = 55  # letters of a command's sentence
JARGON = re.compile(r"\b(fold|site|trace|tensor|provider|decoder|hybrid|digest|quantiz)", re.IGNORECASE)
VERBS = re.compile(  # with which the help of an option begins
    "(Accept|Add|Allow|Answer|Apply|Ask|Cache|Cancel|Compare|Compute|Continue|Draw|Expect|Export|Give|Guess|Keep|Leave|Let|Listen"
    "|Log|Merge|Measure|Multiply|Print|Put|Read|Refuse|Replace|Return|Round|Run|Serve|Set|Shorten|Show|Skip|Spend|Start"
    "|Store|Take|Train|Transcribe|Use|Wait|Write) .*[.]",
)
every_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.mark.quick
@every_command
def test_required_options_are_in_the_usage_and_come_first(command: str) -> None:
    text = run(command, "--help").stdout
    required = [param for param in COMMANDS[command].params if param.required]
    usage, _, rest = text[text.index("Usage: ") :].partition("\n")
    assert all(f"{param.opts[0]} {param.metavar}" in usage for param in required)
    sections = re.findall(r"^(\w[\w ]*):$", rest, re.MULTILINE)
    assert not required or sections[0] == "Required"
    assert len(set(sections)) == len(sections)


@every_command
def test_no_type_of_the_parser_is_shown(command: str) -> None:
    text = run(command, "--help").stdout
    assert not re.search(r"\b(INTEGER|FLOAT|BOOLEAN)\b|<\w|\brange\b|x>=", text)
    shown = [param for param in COMMANDS[command].params if param.param_type_name == "option" and not param.is_flag]
    assert [param.opts[0] for param in shown if not param.metavar] == []


@every_command
def test_a_thing_has_one_name(command: str) -> None:
    """Commands that read an export take --onnx, those that write take --output; older names are options still."""
    params = {param.opts[0]: param for param in COMMANDS[command].params}
    assert ("--onnx" in params) == (command in ("export-adapter", "fold", "verify", "serve", "generate"))
    writes = ("export", "fold", "to-lora", "merge", "demo")
    assert ("--output" in params) == (command in writes)
    assert not {"--base", "--name", "--directory"} & set(params)
    text = run(command, "--help").stdout
    older = {name for param in params.values() for name in param.opts[1:] if name.startswith("--")}
    assert not [name for name in older if re.search(rf"{name}\b(?!-)", text) and name not in params]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "--output", "{empty}"), "no gralora_export.json in {empty}, which is empty"),
        (("serve", "{empty}"), "no gralora_export.json in {empty}, which is empty"),
        (("generate", "{empty}", "--prompt", "x"), "no gralora_export.json in {empty}, which is empty"),
    ],
)
def test_older_names_go_on_working(tmp_path: Any, arguments: tuple[str, ...], message: str) -> None:
    places = {"empty": tmp_path / "empty", "new": tmp_path / "new"}
    places["empty"].mkdir()
    printed = run(*(argument.format(**places) for argument in arguments))
    assert printed.status == 1
    assert printed.stderr.splitlines()[-1].startswith(f"error: {message.format(**places)}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("verify",),
            "missing --onnx DIR; for example: gralora-fx verify --onnx onnx --model BASE --adapter ADAPTER; ",
        ),
        (
            ("serve",),
            "missing --onnx DIR, the directory of an export; for example: gralora-fx serve --onnx onnx --port 8000; ",
        ),
        (("serve", "a", "--onnx", "b"), "give --onnx b or a; gralora-fx serve --help lists the options"),
        (("serve", "a", "b"), "unexpected argument b; gralora-fx serve --help lists the options"),
        (("export", "--modle", "x"), "did you mean --model?; gralora-fx export --help lists"),
        (("serve", "a", "--port", "x"), "--port: it must be a valid integer"),
        (("serve", "a", "--port", "70000"), "--port: "),
        (("serve", "a", "--port"), "Option '--port' requires an argument; gralora-fx serve --help lists"),
        (("exprot",), "No such command 'exprot'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    printed = run(*arguments)
    assert printed.status == 2
    assert message in printed.error


def test_the_program_alone_lists_its_commands_each_with_a_whole_sentence() -> None:
    text = run().stdout
    for command in COMMANDS:
        summary = COMMANDS[command].help.partition("\n")[0]
        assert f"  {command:<16}{summary}\n" in text
        assert re.fullmatch(r"[A-Z][^.]*\.", summary)
        assert len(summary) <= LONGEST
        assert not JARGON.search(summary)
    assert "..." not in text


@every_command
def test_the_help_leads_with_an_example_that_the_command_takes(command: str) -> None:
    first = run(command, "--help").stdout.splitlines()[0]
    program, name, *arguments = shlex.split(first.removeprefix("Example: "))
    assert (program, name) == ("gralora-fx", command)
    given, rest, _ = COMMANDS[command].make_parser(typer.Context(COMMANDS[command])).parse_args(args=arguments)
    assert rest == []
    required = {param.name for param in COMMANDS[command].params if param.required}
    assert required <= set(given)


@every_command
def test_the_help_of_an_option_is_a_whole_sentence(command: str) -> None:
    text = " ".join(run(command, "--help").stdout.split())
    for param in COMMANDS[command].params:
        if param.param_type_name != "option" or param.hidden:
            continue
        sentence = param.help.partition("  [default: ")[0].strip()
        assert VERBS.fullmatch(sentence), f"{param.name}: begin with a verb, and end the sentence: {sentence}"
        assert " ".join(param.help.split()) in text, (param.name, text)


@pytest.mark.parametrize("columns", [60, 80])
def test_a_terminal_cuts_nothing_and_breaks_no_name(columns: int) -> None:
    """In a narrow one lines are wrapped, between words."""
    for arguments in ((), ("serve", "--help")):
        code = "import sys; from gralora_fx.cli import main; sys.argv = ['gralora-fx', *sys.argv[1:]]; main()"
        shown = in_terminal([sys.executable, "-c", code, *(arguments or ("--help",))], columns)
        assert max(map(len, plain_lines(shown)[1:])) <= columns  # the example is there to be pasted
        wide = run(*arguments).stdout
        assert shown.split() == wide.split()


SINGLE = [
    (command, param)
    for command in COMMANDS
    for param in COMMANDS[command].params
    if param.param_type_name == "option" and not (param.multiple or param.is_flag)
]


@pytest.mark.parametrize(("command", "param"), SINGLE, ids=[f"{command} {param.opts[0]}" for command, param in SINGLE])
def test_an_option_of_one_value_is_given_once(command: str, param: Any) -> None:
    """The last of several values would count in silence, although `verify` takes several adapters."""
    found = run(command, param.opts[0], "1", param.opts[-1], "2")
    assert found.status == 2
    assert found.error.startswith(f"{param.opts[0]}: it is given twice, and {command} takes one; gralora-fx {command}")
