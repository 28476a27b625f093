"""The API reference has every public name, and every public name has its documentation."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from gralora_fx import errors

pytestmark = pytest.mark.quick

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "public_names.py"))


@pytest.fixture(scope="module")
def site() -> Any:
    """Return the module that makes the site's pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(DOCS), *sys.path])
        return importlib.import_module("site_pages")


def test_every_public_name_and_parameter_is_described(names: dict[str, Any]) -> None:
    assert names["undocumented"]() == []


def test_what_is_not_described_is_named(names: dict[str, Any]) -> None:
    def undescribed(width: int, **_: object) -> None:
        """Draw."""

    class Plain:
        """A class.

        Attributes:
            size: Its size.
        """

        def turn(self, angle: float, speed: float) -> None:  # noqa: D417
            """Turn.

            Args:
                angle: How far, in degrees.
                axis: Around what.
            """

        def stop(self) -> None: ...

    found = [*names["problems"]("draw", undescribed), *names["problems"]("Plain", Plain)]
    assert found == [
        "draw does not describe width under Args",
        "Plain.turn does not describe speed under Args",
        "Plain.turn describes axis, which it does not take",
        "Plain.stop has no docstring",
    ]


@pytest.mark.parametrize("module", ["gralora_fx", "gralora_fx.exporters", "gralora_fx.serving", "gralora_fx.errors"])
def test_a_module_has_a_page_with_every_public_name(module: str, site: Any) -> None:
    page = site.pages()[f"api/{module}.md"]
    described = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", page, re.MULTILINE)
    if module == "gralora_fx.errors":
        raised = [name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")]
        assert set(raised) <= set(described)
    else:
        assert described == importlib.import_module(module).__all__


def test_the_pages_of_the_repository_lead_to_each_other_in_the_site(site: Any) -> None:
    assert site.site_link("../README.md", "docs/export.md") == "index.md"
    assert site.site_link("docs/export.md", "README.md") == "export.md"
    assert site.site_link("examples/quickstart.py", "README.md") == "examples/quickstart.md"
    assert site.site_link("export.md", "docs/adapters.md") == "export.md"
    made = site.pages()
    for name, text in made.items():
        assert "<!--" not in text, name
    pages = {path.name for path in DOCS.glob("*.md")} | set(made)
    menu = [
        page for entry in site.navigation(sorted(path.name for path in DOCS.glob("*.md"))) for page in leaves(entry)
    ]
    assert sorted(menu) == sorted(pages)


def test_comments_that_set_a_page_up_are_not_in_the_site(site: Any) -> None:
    text = site.site_text("docs/export.md")
    assert "getfixture" not in text
    assert "```pycon\n>>> " in text


def leaves(entry: Any) -> list[str]:
    """Return the pages of a menu's entry."""
    if isinstance(entry, str):
        return [entry]
    inner = entry.values() if isinstance(entry, dict) else entry
    return [page for part in inner for page in leaves(part)]


def test_methods_of_the_base_model_are_functions_of_the_reference() -> None:
    griffe = pytest.importorskip("griffe", reason="pip install 'gralora-fx[docs]'")
    extensions = griffe.load_extensions(DOCS / "derived_signatures.py")
    package = griffe.load("gralora_fx", search_paths=[DOCS.parent], extensions=extensions)
    model = package["core.model.gralora_model.GraloraModel"]
    for name in ("generate", "get_input_embeddings", "get_output_embeddings", "prepare_decoder_input_ids_from_labels"):
        method = model.all_members[name]
        assert method.is_function, name
        assert method.parameters[0].name == "self", name
        assert method.docstring, name
