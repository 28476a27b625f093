"""The files of `examples/deploy/`: of their schemas, in agreement with the service, and true to what they promise.

No daemon builds or runs them here. What a container adds is put together from the kernel's own parts instead: another
user without a home or capabilities, a root file system that cannot be written, a process 1 of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import kubernetes_validate
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema.validators import validator_for
from served_exports import decoders
from typer.main import get_command

from gralora_fx.cli import app
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.service.service_routes import OPEN_PATHS

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICE = COMPOSE["services"]["service"]
DEPLOYMENT, FRONT = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
USER = 10001
CONFINED = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=1777 tmpfs "$1"
mount -o remount,ro,bind /
export HOME=/nonexistent TMPDIR="$1"
cd /
shift
exec setpriv --reuid {user} --regid {user} --clear-groups --no-new-privs --bounding-set=-all "$@"
"""


def instruction(name: str) -> Any:
    """Return the arguments of the Dockerfile's last instruction of a name, in the exec form."""
    lines = re.findall(rf"^ *{name} (.*)$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    return json.loads(lines[-1][lines[-1].index("[") :])


def options(arguments: list[str]) -> dict[str, str]:
    """Read the values that a command line of `serve` gives for its options, as `gralora-fx` reads them."""
    command: Any = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    given = command.make_context("serve", list(arguments)).params
    return {name: value for name, value in given.items() if value not in (None, [], ())}


@pytest.mark.quick
def test_the_dockerfile_is_linted() -> None:
    linted = subprocess.run([shutil.which("hadolint") or Path(sys.prefix, "bin", "hadolint"), DEPLOY / "Dockerfile"])
    assert linted.returncode == 0


@pytest.mark.quick
def test_the_compose_file_is_of_its_schema() -> None:
    schema = get_builtin_schema("vendor.compose-spec")
    validator_for(schema)(schema).validate(COMPOSE)


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_the_manifest_is_of_kubernetes_schemas(version: str) -> None:
    for resource in (DEPLOYMENT, FRONT):
        kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.quick
def test_the_files_agree_with_the_service_and_each_other() -> None:
    own = instruction("ENTRYPOINT")
    assert own[:2] == ["gralora-fx", "serve"]
    assert set(CONTAINER) & {"command", "entrypoint"} == set(SERVICE) & {"entrypoint"} == set()
    composed = options(own[2:] + [re.sub(r"\$\{\w+:-(.*)\}", r"\1", each) for each in SERVICE["command"]])
    clustered = options(own[2:] + [each.replace("$(CPUS)", "2") for each in CONTAINER["args"]])
    assert composed == clustered
    assert str(composed["host"]) == "0.0.0.0"
    port, timeout = composed["port"], float(composed["timeout"])
    for settings in (composed, options(own[2:] + instruction("CMD"))):
        assert str(settings["onnx"]) == "/models/onnx"
    targets = {volume["target"]: volume["read_only"] for volume in SERVICE["volumes"]}
    assert targets == {"/models/onnx": True, "/adapters": True}
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in CONTAINER["volumeMounts"]}
    assert mounts == {"/models": True, "/adapters": True, "/tmp": False}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    # ports, and who asks whether it is well
    assert f"EXPOSE {port}\n" in DOCKERFILE
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": port}]
    assert FRONT["spec"]["ports"][0]["targetPort"] == "http"
    assert DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    assert SERVICE["healthcheck"]["test"] == ["CMD", "python", "-c", health_check()]
    probes = [CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert [probe["path"] for probe in probes] == ["/v2/health/ready", "/v2/health/ready", "/v2/health/live"]
    assert {probe["path"] for probe in probes} <= set(OPEN_PATHS)
    # time to end
    slept = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] > slept + timeout
    assert float(SERVICE["stop_grace_period"].removesuffix("s")) > timeout
    # who it is, and what it may
    assert f"USER {USER}:{USER}\n" in DOCKERFILE
    assert SERVICE["user"] == f"{USER}:{USER}"
    assert (POD["securityContext"]["runAsUser"], POD["securityContext"]["runAsNonRoot"]) == (USER, True)
    assert SERVICE["read_only"] is CONTAINER["securityContext"]["readOnlyRootFilesystem"] is True
    assert SERVICE["cap_drop"] == CONTAINER["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert ServiceSettings(Path("onnx"), timeout=timeout).timeout == timeout


def test_the_pool_is_of_the_pods() -> None:
    pool = yaml.safe_load((DEPLOY / "inference-pool.yaml").read_text(encoding="utf-8"))["spec"]
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert pool["selector"]["matchLabels"].items() <= labels.items()
    assert FRONT["spec"]["selector"].items() <= labels.items()
    assert [port["number"] for port in pool["targetPorts"]] == [CONTAINER["ports"][0]["containerPort"]]


def test_the_image_is_built_from_what_is_there() -> None:
    """All that is copied exists and is not ignored; the extras and the versions are the project's."""
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        for path in shlex.split(line)[:-1]:
            assert (ROOT / path).exists(), path
            assert any(path == name or path.startswith(f"{name}/") for name in kept), path
    assert "--constraint 0.1.0.txt --requirement runtime.txt" in DOCKERFILE
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"--build-arg EXTRAS=([\w,]+)", DOCKERFILE)
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))


def health_check() -> str:
    """Return the program of the Dockerfile's health check."""
    (found,) = re.findall(r'HEALTHCHECK [^\n]*\n *CMD \["python", "-c", "(.*)"\]', DOCKERFILE.replace("\\\n", "\n"))
    return str(found)


@pytest.fixture
def confined() -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder that every user may read, and the command line that runs another one as a container would.

    Its own folder `tmp` is the only place that can be written.
    """
    folder = Path(tempfile.mkdtemp(prefix="gralora-fx-deploy-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "tmp").mkdir()
    shell = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", CONFINED.format(user=USER), "sh"]
    command = [*shell, str(folder / "tmp")]
    try:
        probe = subprocess.run([*command, sys.executable, "-c", "import gralora_fx"], capture_output=True, text=True)
        if probe.returncode:
            pytest.skip(f"no process can be confined here, or it cannot read the interpreter: {probe.stderr[-200:]}")
        yield folder, command
    finally:
        shutil.rmtree(folder)


def test_another_user_without_a_home_and_a_read_only_root(confined: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, command = confined
    shutil.copytree(decoders(tmp_path, "data")[0]["data"], folder / "onnx")
    shutil.copytree(tmp_path / "wide", folder / "adapters" / "wide")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    serve = [sys.executable, "-m", "gralora_fx.cli", "serve", "--host", "127.0.0.1", "--port", "0", "--threads", "1"]
    serve += ["--onnx", str(folder / "onnx"), "--adapter-root", str(folder / "adapters")]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen([*command, *serve], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on (http://127\.0\.0\.1:(\d+))", line):
                break
        else:
            pytest.fail("".join(lines))
        url, port = found.groups()
        check = health_check().replace(":8000", f":{port}")
        assert subprocess.run([sys.executable, "-c", check]).returncode == 0
        body = {"lora_name": "new", "lora_path": "wide"}  # converted, so something is written
        for path, fields in (
            ("v1/load_lora_adapter", body),
            ("v1/completions", {"model": "new", "prompt": "Hello", "max_tokens": 4}),
        ):
            asked = Request(f"{url}/{path}", json.dumps(fields).encode(), {"Content-Type": "application/json"})
            with urlopen(asked, timeout=30) as response:
                assert response.status == 200
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (served,) = map(
            int, children
        )  # process 1 of its namespace, which the kernel spares every signal that it ignores
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{served}/status").read_text().splitlines())
        assert status["NSpid"].split()[-1] == "1"
        assert set(status["Uid"].split()) == {str(USER)}
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        os.kill(served, signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(20) == 128 + signal.SIGTERM, rest
        assert "Traceback" not in "".join(lines) + rest
        assert not re.findall(r"(?i)warning|W:onnxruntime", "".join(lines) + rest)
    finally:
        process.stderr.close()
        process.kill()
        process.wait(20)
    assert subprocess.run([sys.executable, "-c", check], stderr=subprocess.DEVNULL).returncode != 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
