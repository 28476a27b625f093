"""The documentation points at what exists: links, paths, folders, options of the command line."""

from __future__ import annotations

import ast
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest
from source_files import FILES, ROOT, nodes, parsed
from test_import_order import ORDER
from typer.main import get_command

from gralora_fx.cli import app

pytestmark = pytest.mark.quick

AT_THE_ROOT = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
PAGES = [*AT_THE_ROOT, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("make demo", "make test")
QUESTIONS = ("What", "Whether", "Which", "Where", "When", "Who", "Why", "How", "Of")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """Return the headings of a page by GitHub's names for them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_paths_of_the_repository_exist(page: Path) -> None:
    named = re.findall(r"`((?:gralora_fx|exporters|tests|benchmarks|examples|docs)/[\w./]*)`", page.read_text("utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


@every_page
def test_names_of_public_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"((?:`\w+`(?:, | and |\s))+)of\s+`(gralora_fx(?:\.\w+)*)`", text)
    names = [(module, name) for listed, module in found for name in re.findall(r"`(\w+)`", listed)]
    assert [(module, name) for module, name in names if not hasattr(import_module(module), name)] == []


@every_page
def test_options_of_commands_exist(page: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, arguments in re.findall(r"gralora-fx ([\w-]+) +(--[^`#\n]*)", page.read_text(encoding="utf-8")):
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", arguments)) <= known, f"gralora-fx {name} {arguments}"


def test_every_option_of_an_export_is_described() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    options = {option for parameter in get_command(app).commands["export"].params for option in parameter.opts}  # type: ignore[attr-defined]
    assert [option for option in sorted(options) if option not in page] == []


def test_the_table_of_options_is_that_of_their_declarations() -> None:
    table = runpy.run_path(str(ROOT / "docs" / "option_table.py"))
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert "| `--precision [fp32\\|fp16\\|bf16]` | `precision` | `fp32` |" in page
    assert table["with_table"](page) == page


def test_the_page_of_decoders_is_what_the_survey_found() -> None:
    from tests.architectures.tiny_decoders import decoder_classes  # it imports transformers

    table = runpy.run_path(str(ROOT / "docs" / "decoder_table.py"))
    page = (ROOT / "docs" / "decoders.md").read_text(encoding="utf-8")
    assert table["with_tables"](page) == page
    assert sorted(re.findall(r"`(\w+(?:Model|LMHead|Decoder|For\w+))`(?= \||,|\.\n)", page)) == list(decoder_classes())


def test_the_page_of_models_that_read_images_is_what_the_survey_found() -> None:
    from tests.architectures.image_prompts import image_classes  # it imports transformers

    table = runpy.run_path(str(ROOT / "docs" / "image_table.py"))
    page = (ROOT / "docs" / "image_models.md").read_text(encoding="utf-8")
    assert table["with_tables"](page) == page
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == list(image_classes())


def test_every_option_of_the_service_is_described() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    options = {
        option
        for parameter in get_command(app).commands["serve"].params  # type: ignore[attr-defined]
        if parameter.param_type_name == "option"
        for option in parameter.opts
    }
    assert [option for option in sorted(options) if f"`{option}" not in page] == []


@pytest.mark.parametrize("folder", ["gralora_fx", "exporters", "benchmarks", "docs", "examples", "tests"])
def test_docstrings_say_what_a_thing_is_or_does(folder: str) -> None:
    """They begin with a noun, a verb or a sentence: "Return the ...", not "What ..." or "Of ..."."""
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    begun = [
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(parsed(file.resolve()))
        if isinstance(node, described) and (ast.get_docstring(node) or "").partition(" ")[0] in QUESTIONS
    ]
    assert begun == []


def test_errors_that_are_explained_are_those_of_the_source() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    constants = (node.value for file in FILES for node in nodes(file) if isinstance(node, ast.Constant))
    texts = "\0".join(value for value in constants if isinstance(value, str))
    assert len(quoted) > 60
    assert [text for text in quoted if text not in texts] == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
        left += {(page.parent / link).resolve() for link in links if "://" not in link} - reached
    assert [page.name for page in PAGES if page.resolve() not in reached] == []


def test_the_two_commands_are_in_the_readmes_first_screen() -> None:
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:15])
    assert all(f"\n{command} " in first for command in COMMANDS)


def folders_of_code() -> list[Path]:
    """Folders that hold modules, below the two packages."""
    modules = [file for root in ("gralora_fx", "exporters") for file in (ROOT / root).rglob("*.py")]
    return sorted(
        {file.parent for file in modules if file.stem != "__init__"} - {ROOT / "gralora_fx", ROOT / "exporters"}
    )


@pytest.mark.parametrize("folder", folders_of_code(), ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_a_folder_has_a_page_that_names_its_files(folder: Path) -> None:
    """Its own, or that of the folder that it is in."""
    page = next(place / "README.md" for place in (folder, *folder.parents) if (place / "README.md").is_file())
    assert page.parent != ROOT
    text = page.read_text(encoding="utf-8")
    assert [file.name for file in folder.glob("*.py") if file.stem != "__init__" and f"`{file.name}`" not in text] == []
    named = re.findall(r"`([a-z0-9_]+\.py)`", text)
    assert [name for name in named if not any(page.parent.rglob(name))] == []
    assert len(text.splitlines()) <= 60


@pytest.mark.parametrize("root", ["gralora_fx", "exporters"])
def test_folders_are_described_in_the_order_of_imports(root: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split(f"| folder of `{root}/`")[1].split("\n\n")[0]
    described = re.findall(r"^\| `(\w+)/` \|", table, re.MULTILINE)
    folders = {path.name for path in (ROOT / root).iterdir() if (path / "__init__.py").is_file()}
    assert set(described) == folders
    prefix = "exporters." if root == "exporters" else ""
    assert described == sorted(described, key=lambda name: ORDER.index(f"{prefix}{name}"))
