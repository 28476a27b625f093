"""Streamed int4 exports that end before they are done, and go on from what they kept."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_once import made_once
from tiny_models import tiny_model

from gralora_fx.core.loading.bases import load_traced
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.quantize import kept_work, round_in_order, saved_tensors

DONE = 5  # layers that are rounded before the end


def save_base(directory: Path) -> None:
    tiny_model("llama").save_pretrained(directory / "base", max_shard_size="20KB")
    export_onnx(load_traced(str(directory / "base"), None, None, with_cache=True), directory / "onnx", quantize="int4")


@pytest.fixture
def base() -> Path:
    """Return a model, and its export in memory."""
    return made_once("resumed", save_base)


def export(base: Path, output: Path, **options: Any) -> None:
    streamed = load_traced(str(base / "base"), None, None, with_cache=True, stream=True)
    export_onnx(streamed, output, quantize="int4", **options)


def end_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> list[str]:
    """Let rounding end after some layers; the result lists the layers that are rounded until then."""
    rounded: list[str] = []
    original = round_in_order.quantize_blocks

    def quantized(matrix: Any, form: Any, inputs: Any, name: str) -> Any:
        if len(rounded) == count:
            raise error
        rounded.append(name)
        return original(matrix, form, inputs, name)

    monkeypatch.setattr(round_in_order, "quantize_blocks", quantized)
    return rounded


def begun(base: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """Begin an export that is killed; the result is its finished layers."""
    with monkeypatch.context() as patched:
        rounded = end_after(patched, DONE, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(base, output, **options)
    return rounded


def is_same(base: Path, output: Path) -> bool:
    names = ("model.onnx", "model.onnx_data")
    return all((base / "onnx" / name).read_bytes() == (output / name).read_bytes() for name in names)


def kept(output: Path) -> list[Path]:
    return sorted(output.with_name(f".{output.name}.gralora_work").glob("*.npz"))


def test_a_killed_export_goes_on_at_its_layer(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = begun(base, tmp_path / "onnx", monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == [".onnx.gralora_work"]
    for name in ("verify.drawn_texts.draw_texts", "quantize.calibration.measure_sensitivities"):  # kept too
        monkeypatch.setattr(f"gralora_fx.exporters.{name}", None)
    rest = end_after(monkeypatch, -1, KeyboardInterrupt())
    export(base, tmp_path / "onnx")
    assert not set(first) & set(rest)
    assert is_same(base, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_what_is_damaged_is_computed_again(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(base, tmp_path / "onnx", monkeypatch)
    texts, cut, flipped = kept(tmp_path / "onnx")[:3]
    texts.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-40])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged") as warned:
        export(base, tmp_path / "onnx")
    assert len([one for one in warned if "is damaged" in str(one.message)]) == 3
    assert is_same(base, tmp_path / "onnx")


def test_what_was_made_with_other_options_is_not_used(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(base, tmp_path / "onnx", monkeypatch, bits=6)
    rounded = end_after(monkeypatch, -1, KeyboardInterrupt())
    export(base, tmp_path / "onnx")
    assert len(rounded) > DONE
    assert is_same(base, tmp_path / "onnx")


def test_a_full_disk_is_one_error_and_the_next_export_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, written = np.savez, []

    def full(file: Any, **arrays: Any) -> None:
        if len(written) == DONE:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        original(file, **arrays)

    with monkeypatch.context() as patched:
        patched.setattr(kept_work.np, "savez", full)
        with pytest.raises(
            ExportError, match=r"No space left on device; .* bytes are free\); make room and export again"
        ):
            export(base, tmp_path / "onnx")
    assert len(kept(tmp_path / "onnx")) == DONE
    export(base, tmp_path / "onnx")
    assert is_same(base, tmp_path / "onnx")


def test_a_lack_of_memory_names_the_layer_and_the_next_export_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2097152000 bytes.")
    with monkeypatch.context() as patched:
        end_after(patched, DONE, lack)
        with pytest.raises(ExportError, match=r"not enough memory to round model.layers.0.\S+ \(DefaultCPUAlloc"):
            export(base, tmp_path / "onnx")
    assert kept(tmp_path / "onnx")


def test_an_error_that_would_come_again_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_after(monkeypatch, DONE, ExportError("a weight is not finite"))
    with pytest.raises(ExportError, match="not finite"):
        export(base, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_gradients_are_the_same_where_activations_are_in_a_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_tensors, "_LEAST", 1)
    export(base, tmp_path / "onnx", verify=False)
    assert is_same(base, tmp_path / "onnx")
