"""Adapters that change under load: every answer is wholly of one version, bad loads disturb nobody, eight mix."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import peft_model
from safetensors.torch import load_file, save_file
from served_adapters import COUNT, LLAMA, complete, expected, load, loaded, lora, metric, settle, wait_for
from served_exports import chat_tokenizer, decoders
from starlette.testclient import TestClient
from tiny_models import tiny_model

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx, fold_onnx
from gralora_fx.exporters.adapter_export import convert_adapter
from gralora_fx.format.adapter_paths import record_path
from gralora_fx.format.export_directory import MANIFEST_NAME
from gralora_fx.format.manifest import read_manifest
from gralora_fx.service.app import create_app
from gralora_fx.serving import load as load_export

Made = tuple[Path, dict[str | None, Any]]
PROMPTS = ("Hello there", "a", "The capital of France is", "x y z")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a folder with exports and PEFT's adapters, and PEFT's models."""
    folder = tmp_path_factory.mktemp("stress")
    return folder, decoders(folder, "data")[1]


@contextmanager
def service(folder: Path, mode: str) -> Iterator[TestClient]:
    with TestClient(create_app(ServiceSettings(folder / mode, adapter_root=folder))) as client:
        yield client


@contextmanager
def traffic(count: int, ask: Callable[[int], None]) -> Iterator[None]:
    """Threads that ask again and again; what fails in one fails here."""
    is_over = threading.Event()

    def work(index: int) -> int:
        asked = 0
        while not is_over.is_set():
            ask(index)
            asked += 1
        return asked

    with ThreadPoolExecutor(count) as pool:
        workers = [pool.submit(work, index) for index in range(count)]
        try:
            yield
        finally:
            is_over.set()
        assert all(worker.result(60) for worker in workers)


def test_every_answer_is_wholly_of_one_version(made: Made) -> None:
    folder, oracles = made
    answers = {prompt: [expected(oracles[name], prompt) for name in ("small", "wide")] for prompt in PROMPTS}
    seen: set[tuple[int, int]] = set()

    with service(folder, "data") as client:
        loaded(client, "live", "small")

        def ask(index: int) -> None:
            prompt = PROMPTS[index]
            seen.add((index, answers[prompt].index(complete(client, "live", prompt))))

        with traffic(4, ask):
            end = time.monotonic() + 3
            while time.monotonic() < end:
                for path in ("wide", "small", "data/adapters/wide.onnx_adapter", "small"):
                    loaded(client, "live", path, load_inplace=True)
        wait_for(lambda: metric(client, "gralora_fx_adapter_versions") == 3)
        settle(client)
    assert {version for _, version in seen} == {0, 1}


def bad_loads(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Name the faults of each load, with its request."""
    rng = random.Random(0)
    sound = folder / "data" / "adapters" / "wide.onnx_adapter"
    place = folder / "bad"
    place.mkdir()

    def file(name: str, change: Callable[[Path], Any]) -> tuple[str, dict[str, str]]:
        copy = place / f"{name}.onnx_adapter"
        shutil.copy(sound, copy)
        shutil.copy(record_path(sound), record_path(copy))
        change(copy)
        return name, {"lora_path": f"bad/{copy.name}"}

    def peft(name: str, change: Callable[[Path], Any]) -> tuple[str, dict[str, str]]:
        copy = place / name
        shutil.copytree(folder / "wide", copy)
        change(copy)
        return name, {"lora_path": f"bad/{name}"}

    def cut(share: float) -> Callable[[Path], Any]:
        return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(content))

    def tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            weights = path / "adapter_model.safetensors"
            save_file({key: change(value) for key, value in load_file(weights).items()}, weights)

        return write

    def config(**fields: Any) -> Callable[[Path], Any]:
        def write(path: Path) -> None:
            found = path / "adapter_config.json"
            found.write_text(json.dumps({**json.loads(found.read_text()), **fields}))

        return write

    def linked(link: Callable[[Path, Path], None], name: str) -> Callable[[Path], None]:
        def replace(path: Path) -> None:
            target = path / name if path.is_dir() else path
            outside = folder.parent / f"outside-{link.__name__}-{target.name}"
            target.rename(outside)
            link(outside, target)

        return replace

    yield from (file(f"cut{share}", cut(share)) for share in (0, 0.01, 0.5, 0.9, 0.999))
    yield from (file(f"cut-record{share}", lambda path, s=share: cut(s)(record_path(path))) for share in (0, 0.5, 0.99))
    yield from (file(f"flip{index}", flip) for index in range(8))
    yield from (file(f"flip-record{index}", lambda path: flip(record_path(path))) for index in range(4))
    yield file("no-record", lambda path: record_path(path).unlink())
    yield file("symlink", linked(os.symlink, ""))
    yield file("hardlink", linked(os.link, ""))
    yield file("pipe", lambda path: (path.unlink(), os.mkfifo(path)))
    other = dataclasses.replace(read_manifest(folder / "data"), base_fingerprint="0" * 64)
    (place / MANIFEST_NAME).write_text(other.to_json())
    convert_adapter(folder / "wide", place, place, "other")
    yield "another base", {"lora_path": "bad/adapters/other.onnx_adapter"}
    yield from (
        peft(f"peft-cut{s}", lambda path, s=s: cut(s)(path / "adapter_model.safetensors")) for s in (0, 0.5, 0.9)
    )
    yield peft("nan", tensors(lambda value: value * torch.nan))
    yield peft("huge", tensors(lambda value: torch.full_like(value, 1e30)))
    yield peft("misshapen", tensors(lambda value: value[..., :1].contiguous()))
    yield peft("integers", tensors(lambda value: value.to(torch.int32)))
    yield peft("no-config", lambda path: (path / "adapter_config.json").unlink())
    yield peft("no-weights", lambda path: (path / "adapter_model.safetensors").unlink())
    yield peft("pickle", lambda path: (path / "adapter_model.safetensors").rename(path / "adapter_model.bin"))
    yield peft("other-rank", config(r=4))
    yield peft("other-kind", config(peft_type="IA3"))
    yield peft("no-kind", config(peft_type=None))
    yield peft("linked-weights", linked(os.symlink, "adapter_model.safetensors"))
    yield peft("linked-config", linked(os.link, "adapter_config.json"))
    paths = (
        "",
        "..",
        "../x",
        "/etc",
        "/etc/passwd",
        "wide/../../x",
        "none",
        "bad",
        "a\0b",
        "wide/README.md",
        "x" * 5000,
    )
    yield from (("path", {"lora_path": path}) for path in paths)
    yield from (("name", {"lora_name": name, "lora_path": "wide"}) for name in ("", "../a", "a/b", "a\0", "data"))


def test_fifty_bad_loads_leave_good_traffic_untouched(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, oracles = made
    asked = [("small", PROMPTS[0]), ("wide", PROMPTS[1]), (None, PROMPTS[2])]
    answers = [expected(oracles[name], prompt) for name, prompt in asked]
    with service(folder, "data") as client:

        def ask(index: int) -> None:
            name, prompt = asked[index]
            assert complete(client, name or "data", prompt) == answers[index]

        loads = list(bad_loads(folder))
        assert len(loads) >= 50
        with traffic(3, ask):
            for reason, fields in loads:
                response = load(client, **{"name": "wide", "path": "", "load_inplace": True, **_renamed(fields)})
                assert 400 <= response.status_code < 500, (reason, response.text)
                message = response.json()["error"]["message"]
                assert message
                assert str(tmp_path) not in message, (reason, message)
                assert "Traceback" not in message
        assert metric(client, "gralora_fx_adapter_loads_total", outcome="refused") == len(loads)
        assert metric(client, "gralora_fx_adapter_versions") == 2
        assert list(tmp_path.iterdir()) == []  # copies of what was refused


def _renamed(fields: dict[str, str]) -> dict[str, str]:
    return {key.removeprefix("lora_"): value for key, value in fields.items()}


def test_eight_adapters_mix_as_in_their_own_merged_exports(made: Made, tmp_path: Path) -> None:
    folder, _ = made
    base = trace(tiny_model("llama", **LLAMA), task="text-generation-with-past")
    export_onnx(base, tmp_path / "base", verify=False, tokenizer=chat_tokenizer())
    names = [f"adapter{index}" for index in range(8)]
    for index, name in enumerate(names):
        fields = {"r": 2 + 2 * (index % 3), "gralora_k": 2, "alpha": 48, "target_modules": "all-linear"}
        if index % 2:
            lora(seed=10 + index).save_pretrained(str(folder / name))
        else:
            peft_model(tiny_model("llama", **LLAMA), 10 + index, **fields).save_pretrained(str(folder / name))
    with service(folder, "data") as client:
        for name in names:
            loaded(client, name, name)
        asked = [(name, prompt) for prompt in PROMPTS for name in names]
        sequential = [complete(client, *pair) for pair in asked]
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(lambda pair: complete(client, *pair), asked)) == sequential
    assert len(set(sequential)) == len(sequential)
    for name in names:
        fold_onnx(tmp_path / "base", folder / name, tmp_path / name)
        merged = load_export(tmp_path / name)
        own = [answer for (other, _), answer in zip(asked, sequential, strict=True) if other == name]
        ids = [chat_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
        found = [merged.generate(row, max_new_tokens=COUNT) for row in ids]
        assert [chat_tokenizer().decode(row, skip_special_tokens=True) for row in found] == own
