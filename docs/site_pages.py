"""Pages of the site beside those of `docs/`: the README and its neighbours, the examples, the public names.

mkdocs calls the functions whose names begin with `on_` (mkdocs.yml names this file).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from public_names import MODULES, public_names, undocumented

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
AT_THE_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "license.md",
}
GUIDES = {
    "Start": ("getting-started", "troubleshooting", "supported"),
    "Train": ("training", "qlora", "training-internals"),
    "Adapters": ("adapters", "adapter-files", "adapter-methods", "merging", "runtime-adapters", "multi-lora"),
    "Export": ("export", "quantization", "encoders", "images", "decoders", "long-contexts", "onnx-graphs"),
    "Run": ("inference", "execution-providers"),
    "Serve": (
        "serving",
        "http-api",
        "embedding-clients",
        "structured-outputs",
        "tool-calling",
        "batching",
        "prefix-caching",
        "speculative-decoding",
        "speech",
        "deployment",
        "monitoring",
    ),
    "Measured": ("verification", "tested", "performance", "lm-eval"),
    "Project": ("stability", "versions", "architecture", "release"),  # for who depends on it or changes it
}  # the pages of docs/ by what a reader wants to do
_LANGUAGES = {".py": "python", ".yaml": "yaml"}
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]*)(?=[)#])")


def pages() -> dict[str, str]:
    """Return the pages that are made, by their path in the site."""
    made = {name: site_text(source) for source, name in AT_THE_ROOT.items()}
    made["license.md"] = f"# Licence\n\n```text\n{(ROOT / 'LICENSE').read_text(encoding='utf-8')}```\n"
    made |= {f"api/{module}.md": reference(module) for module in MODULES}
    return made | {example_page(path): example(path) for path in examples()}


def examples() -> list[Path]:
    """Return the files of `examples/`: scripts, and those of a deployment."""
    return sorted((ROOT / "examples").glob("*.py")) + sorted((ROOT / "examples").glob("deploy/*"))


def example_page(path: Path) -> str:
    """Return the page of an example in the site."""
    return f"{path.relative_to(ROOT).as_posix().removesuffix('.py')}.md"


def reference(module: str) -> str:
    """Return the page of a module: its purpose, then each public name."""
    about = importlib.import_module(module).__doc__
    return "\n\n".join([f"# {module}", str(about), *(f"::: {module}.{name}" for name in public_names(module))]) + "\n"


def example(path: Path) -> str:
    """Return the page of an example: its text."""
    return f"# {path.name}\n\n```{_LANGUAGES.get(path.suffix, '')}\n{path.read_text(encoding='utf-8')}```\n"


def site_text(source: str) -> str:
    """Return a page of the repository as the site has it: without comments, its links to pages of the site.

    Args:
        source: Its path from the repository's root, such as `README.md` or `docs/export.md`.
    """
    text = re.sub(r"<!--.*?-->\n*", "", (ROOT / source).read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"^```python\n(?=>>> )", "```pycon\n", text, flags=re.MULTILINE)
    return _LINK.sub(lambda match: site_link(match[1], source), text)


def site_link(link: str, source: str) -> str:
    """Return where a link of a page of the repository leads in the site; the link itself if that is not in the site."""
    target = ((ROOT / source).parent / link).resolve()
    if not link or not target.is_relative_to(ROOT):
        return link
    path = target.relative_to(ROOT).as_posix()
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return AT_THE_ROOT.get(path) or (example_page(target) if target in examples() else link)


def navigation(pages: list[str]) -> list[dict[str, Any]]:
    """Return the menu.

    Args:
        pages: The pages of `docs/`; those that `GUIDES` does not name come after the others.
    """
    groups = {title: [f"{name}.md" for name in names if f"{name}.md" in pages] for title, names in GUIDES.items()}
    project = groups.pop("Project")
    grouped = {page for names in groups.values() for page in names}.union(project)
    more = [page for page in pages if page not in grouped]
    return [
        {"Home": "index.md"},
        *({title: names} for title, names in groups.items()),
        *([{"More": more}] if more else []),
        {"API": [{module: f"api/{module}.md"} for module in MODULES]},
        {"Examples": [{path.name: example_page(path)} for path in examples()]},
        {"Project": [*project, "contributing.md", "changelog.md", "security.md", "license.md"]},
    ]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Refuse names without documentation, and set the menu."""
    from mkdocs.exceptions import ConfigurationError

    if problems := undocumented():
        raise ConfigurationError("\n".join(["public names lack documentation:", *problems]))
    config.nav = navigation(sorted(path.name for path in DOCS.glob("*.md")))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page of `docs/` as the site has it."""
    source: Mapping[str, Any] | str | None = page.file.abs_src_path
    return site_text(f"docs/{page.file.src_uri}") if source and Path(str(source)).is_relative_to(DOCS) else markdown
