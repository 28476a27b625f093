"""Versions: what is outside the tested ranges is named once, and every place that states a range states the same."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from gralora_fx.base.compat.packages import (
    TESTED,
    _warn_if_untested,
    fenced,
    installed_version,
    range_of,
    warn_of_untested,
)
from gralora_fx.errors import VersionError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGES = [package for package in TESTED if package != "python"]


@pytest.fixture(autouse=True)
def _checks_anew() -> Iterator[None]:
    for check in (warn_of_untested, _warn_if_untested):
        check.cache_clear()
    yield
    for check in (warn_of_untested, _warn_if_untested):
        check.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warn_of_untested()  # what is installed is not these tests' matter


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that packages are installed in these versions, and every other in its newest tested one."""

    def version(package: str) -> str:
        return versions.get(package.replace("-", "_"), TESTED[package][1])

    monkeypatch.setattr(importlib.metadata, "version", version)


def warned() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for package in ("torch", "onnxruntime", "torch"):
            with fenced(package):
                pass
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("torch", "2.10.1"),  # below
        ("torch", "2.11.0rc2"),  # a release candidate of the lowest comes before it
        ("torch", "2.16.0"),  # above
        ("torch", "2.16.0.dev2026+cpu"),  # a nightly build
        ("torch", "2.16.0a0+git1a2b3c"),  # someone's own
        ("torch", "3.0"),
        ("torch", "of-the-house"),  # not a version
        ("transformers", "5.25.0.dev0"),
        ("transformers", "4.57.1"),
        ("onnxruntime", "1.23.2"),
        ("onnxruntime", "1.33.0"),
        ("onnx_ir", "1.2"),
        ("peft", "0.20.0"),
    ],
)
def test_a_version_outside_the_tested_range_is_named_once(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    install(monkeypatch, **{package: version})
    name = package.replace("_", "-")
    (message,) = warned()
    assert message.startswith(f"{name} {version} is outside the versions ")
    assert f"({' to '.join(dict.fromkeys(TESTED[name]))})" in message


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("torch", "2.11.0"),
        ("torch", "2.13.0+cpu"),
        ("torch", "2.13.0+cu128"),
        ("torch", "2.14.0.dev20260501+rocm6.4"),
        ("torch", "2.15.1.post1"),
        ("onnxruntime", "1.32.0"),
        ("onnxruntime", "1.32.7"),
    ],
)
def test_a_tested_version_is_not(monkeypatch: pytest.MonkeyPatch, package: str, version: str) -> None:
    install(monkeypatch, **{package: version})
    assert warned() == []


def test_every_package_outside_its_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch="2.16.0", onnxruntime="1.0.0")
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    python, torch, onnxruntime = warned()
    assert python.startswith("python 3.14.0 is outside the versions that gralora-fx was tested with (3.11 to 3.13)")
    assert torch.startswith("torch 2.16.0 ")
    assert onnxruntime.startswith("onnxruntime 1.0.0 ")


def test_another_package_may_bring_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"onnxruntime-gpu": "1.18.0"}

    def version(package: str) -> str:
        if package in found:
            return found[package]
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    assert installed_version("onnxruntime") == "1.18.0"
    assert installed_version("torch") is None
    (message,) = warned()
    assert message.startswith("onnxruntime 1.18.0 is outside ")


def test_the_warning_is_of_the_users_line_and_not_of_the_import(tmp_path: Path) -> None:
    information = tmp_path / "torch-2.16.0.dev2026+cpu.dist-info" / "METADATA"
    information.parent.mkdir()
    information.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.16.0.dev2026+cpu\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import gralora_fx\nprint('imported', flush=True)\ngralora_fx.trace\nimport gralora_fx.run.model\n"
    )
    ran = subprocess.run(
        [sys.executable, script],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    lines = ran.stdout.splitlines()
    (line,) = (number for number, line in enumerate(lines) if "tested with" in line)
    assert lines[:line] == ["imported"]
    assert lines[line].startswith(f"{script}:3: UserWarning: torch 2.16.0.dev2026+cpu is outside the versions ")


@pytest.mark.parametrize("package", ["onnxruntime", "torch", "transformers"])
def test_a_missing_name_is_an_error_with_the_tested_versions(package: str) -> None:
    installed = re.escape(f"{package} {importlib.metadata.version(package)}")
    message = f"{installed} is not a version .*it was tested with {package} {range_of(package)}: install one"
    with pytest.raises(VersionError, match=message), fenced(package):
        importlib.import_module(package)._no_such_name  # noqa: B018


def bounds(requirements: list[str]) -> dict[str, SpecifierSet]:
    parsed = [Requirement(text) for text in requirements]
    return {one.name: one.specifier for one in parsed if one.name != PROJECT["name"]}


DIRECT = bounds([*PROJECT["dependencies"], *(text for texts in EXTRAS.values() for text in texts)])


def lowest(specifier: SpecifierSet) -> str:
    (bound,) = (part.version for part in specifier if part.operator == ">=")
    return bound


@pytest.mark.parametrize("package", PACKAGES)
def test_the_bounds_of_the_project_are_the_tested_versions(package: str) -> None:
    oldest, newest = TESTED[package]
    assert lowest(DIRECT[package]) == oldest
    assert newest in DIRECT[package]


def test_torch_is_capped_at_the_newest_that_was_tested() -> None:
    major, minor = Version(TESTED["torch"][1]).release
    assert f"{major}.{minor + 1}" not in DIRECT["torch"]


def test_the_lowest_python_is_the_lowest_tested() -> None:
    assert PROJECT["requires-python"] == f">={TESTED['python'][0]}"


def test_a_dependency_of_several_extras_has_one_bound() -> None:
    every = [PROJECT["dependencies"], *EXTRAS.values()]
    assert all(bounds(texts)[name] == DIRECT[name] for texts in every for name in bounds(texts))


def test_the_runtime_alone_has_the_projects_bounds() -> None:
    lines = (ROOT / "examples" / "deploy" / "runtime.txt").read_text(encoding="utf-8").splitlines()
    runtime = bounds([line for line in lines if not line.startswith("#")])
    assert all(runtime[name] == DIRECT[name] for name in runtime)
    assert {*bounds(EXTRAS["serve"]), *bounds(EXTRAS["otel"])} <= set(runtime)
    assert runtime.keys().isdisjoint({"torch", "transformers"})


@pytest.mark.parametrize("package", TESTED)
def test_the_page_of_versions_has_every_range(package: str) -> None:
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    name = "Python" if package == "python" else f"`{package}`"
    assert f"| {name} | {range_of(package)} |" in page


CONSTRAINTS = (ROOT / "docs" / "constraints" / f"{PROJECT['version']}.txt").read_text(encoding="utf-8").splitlines()


def environment(requirements: list[str]) -> dict[str, SpecifierSet]:
    """Return the direct dependencies of an installation of the project, those of the extras that it names included."""
    own = [
        extra
        for text in requirements
        if Requirement(text).name == PROJECT["name"]
        for extra in Requirement(text).extras
    ]
    return bounds(requirements) | {name: one for extra in own for name, one in environment(EXTRAS[extra]).items()}


OF_TESTS = environment([*PROJECT["dependencies"], f"{PROJECT['name']}[demo,dev]"])


def test_the_constraints_are_names_and_public_versions() -> None:
    assert [line for line in CONSTRAINTS if not re.fullmatch(r"[\w.-]+==\d[\w.]*", line)] == []


@pytest.mark.parametrize("package", sorted(OF_TESTS))
def test_the_constraints_of_the_release_are_within_the_bounds(package: str) -> None:
    constraints = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in CONSTRAINTS)
    }
    assert constraints[canonicalize_name(package)] in OF_TESTS[package]


@pytest.mark.skipif(Path(sys.prefix).name != ".venv-lowest", reason="make test-lowest")
def test_the_lowest_versions_are_what_is_tested() -> None:
    """But for those of which another package of the environment needs a later one."""
    here = list(importlib.metadata.distributions(path=[sysconfig.get_path("purelib")]))  # Ray brings some of its own
    installed = {canonicalize_name(each.metadata["Name"]): Version(each.version) for each in here}
    needed: dict[str, list[SpecifierSet]] = {}
    for text in (text for each in here if each.metadata["Name"] != PROJECT["name"] for text in each.requires or []):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed.setdefault(canonicalize_name(requirement.name), []).append(requirement.specifier)
    later = {}
    for name, bound in OF_TESTS.items():
        oldest, found = lowest(bound), installed[canonicalize_name(name)]
        if found != Version(oldest) and all(oldest in others for others in needed.get(canonicalize_name(name), [])):
            later[name] = found
    assert later == {}


@pytest.mark.parametrize("package", TESTED)
def test_what_is_installed_is_in_the_tested_range(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed_version(package)
    assert found is not None
    version = Version(found)
    oldest, newest = map(Version, TESTED[package])
    assert oldest <= version
    assert version.release[: len(newest.release)] <= newest.release, "run the tests with it, then raise the range"
