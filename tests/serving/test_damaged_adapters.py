"""Two hundred damaged, altered and foreign adapter files: each is refused, and the session goes on as it was."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapters_as_data import KINDS, Exports, copy_export, output_of, saved

from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_adapter
from gralora_fx.format.adapter_paths import record_path
from gralora_fx.run.sessions.adapter_file import AdapterRecord, read_record, read_tensors, tensors_sha256, write_tensors
from gralora_fx.serving import OrtModel, load

KIND = KINDS["llama"]
Tensors = dict[str, np.ndarray]
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Sound:
    """An export, and an adapter of it that loads."""

    model: OrtModel
    file: Path

    def copied(self, folder: Path) -> Path:
        folder.mkdir()
        for path in (self.file, record_path(self.file)):
            shutil.copy(path, folder)
        return folder / self.file.name

    def rewritten(self, edit: Callable[[Tensors], object], **fields: Any) -> Damage:
        """Other tensors, or another record, with every digest as it should be then."""

        def damage(file: Path) -> None:
            manifest, record = self.model.manifest, read_record(file)
            assert manifest.adapter_inputs is not None
            tensors = read_tensors(file, record, manifest.adapter_inputs, manifest.base_fingerprint, ServingError)
            edit(tensors)
            write_tensors(file, tensors)
            written = replace(
                record,
                shapes={name: tuple(array.shape) for name, array in tensors.items()},
                sha256=tensors_sha256(tensors),
                file_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
                size=file.stat().st_size,
            )
            record_path(file).write_text(replace(written, **fields).to_json())

        return damage


@pytest.fixture(scope="module")
def sound(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    root = tmp_path_factory.mktemp("sound")
    copy_export(exports.adapted("llama", 2), root / "onnx")
    saved(KIND, root / "adapter", r=4, hybrid_r=2, gralora_k=2, target_modules=["q_proj", "o_proj"])
    file = export_adapter(root / "adapter", root / "onnx", "a")
    outside = root / "a.onnx_adapter"
    for path in (file, record_path(file)):
        path.rename(root / path.name)
    return Sound(load(root / "onnx"), outside)


# -- ways to damage a file ---------------------------------------------------------------------------------------------


def flip(suffix: str, seed: int) -> Damage:
    """Another bit somewhere in the tensors or in the record."""

    def damage(file: Path) -> None:
        path, draw = file.with_suffix(suffix), random.Random(seed)
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)

    return damage


def cut(suffix: str, share: float) -> Damage:
    """Return the beginning of a file."""

    def damage(file: Path) -> None:
        path = file.with_suffix(suffix)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def record(**fields: Any) -> Damage:
    """Other fields in the record; one that is None is left out."""

    def damage(file: Path) -> None:
        path = record_path(file)
        found = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))

    return damage


def in_place(path_of: Callable[[Path], Path], make: Callable[[Path], object]) -> Damage:
    """Something else where a file was."""

    def damage(file: Path) -> None:
        path = path_of(file)
        path.unlink()
        make(path)

    return damage


def swapped(file: Path) -> None:
    """Tensors and record in each other's place."""
    other = record_path(file)
    file.rename(file.with_name("kept"))
    other.rename(file)
    file.with_name("kept").rename(other)


def altered_tensors(sound: Sound) -> Iterator[Damage]:
    """Files that are whole and have digests that fit, but whose tensors are not the export's."""
    site = "model.layers.1.self_attn.o_proj"
    shapes = {
        "gralora_A": [(2, 16, 3), (2, 16, 6), (2, 8, 8), (1, 32, 4), (2, 64), (128,), (2, 16, 4, 1)],
        "gralora_B": [(2, 4, 8), (4, 4, 16), (2, 2, 16), (64, 2)],
        "gralora_A_general": [(32, 3), (16, 4), (2, 32), (64,), (32, 2, 1)],
        "gralora_B_general": [(2, 16), (32, 2), (3, 32), (64,), (0, 32)],
    }
    for field, others in shapes.items():
        name = f"{site}.{field}"
        for shape in others:
            yield sound.rewritten(lambda t, n=name, s=shape: t.update({n: np.ones(s, np.float32)}))
        for dtype in (np.float16, np.float64, np.int32, ml_dtypes.bfloat16):
            yield sound.rewritten(lambda t, n=name, d=dtype: t.update({n: t[n].astype(d)}))
        for value in (np.nan, np.inf, -np.inf):
            yield sound.rewritten(
                lambda t, n=name, v=value: t.update(
                    {n: np.where(np.arange(t[n].size) == 5, v, t[n].flat).reshape(t[n].shape).astype(np.float32)}
                )
            )
        yield sound.rewritten(lambda t, n=name: t.pop(n))
        yield sound.rewritten(lambda t, n=name: t.update({f"{n}x": t.pop(n)}))
        yield sound.rewritten(lambda t, n=name: t.update({n.replace("o_proj", "z_proj"): t.pop(n)}))
        yield sound.rewritten(lambda t, n=name: t.update({n.upper(): t[n]}))
    for name in ("logits", "input_ids", "model.embed_tokens.weight", "x.gralora_A", ""):
        yield sound.rewritten(lambda t, n=name: t.update({n: np.ones((2, 2), np.float32)}))
    yield sound.rewritten(lambda t: t.clear(), sites=(site,))


def altered_records(sound: Sound) -> Iterator[Damage]:
    """Yield records of another base, other blocks, other layers, or of no meaning."""
    text = read_record(sound.file)
    keep: Callable[[Tensors], object] = lambda tensors: None  # noqa: E731
    wrong: list[dict[str, Any]] = [
        {"base_fingerprint": "0" * 64},
        {"k": 4},
        {"k": 1},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"sites": text.sites[:-1]},
        {"sites": ()},
        {"sites": (*text.sites, "model.layers.0.mlp.up_proj")},
        {"sites": (*text.sites, "model.layers.9.self_attn.q_proj")},
        {"sites": tuple(site.replace("o_proj", "v_proj") for site in text.sites)},
        {"file_sha256": "0" * 64},
        {"size": text.size + 1},
        {"size": 0},
        {"r": 2},
        {"hybrid_r": 64},
        {"shapes": {name: (1, *shape) for name, shape in text.shapes.items()}},
    ]
    yield from (sound.rewritten(keep, **fields) for fields in wrong)
    for field in AdapterRecord.__dataclass_fields__:
        if getattr(text, field) is not None:
            yield record(**{field: None})
        yield record(**{field: [1.5]})
    yield from (record(**fields) for fields in ({"schema_version": 2}, {"k": True}, {"k": 0}, {"r": -1}, {"more": 1}))
    yield record(shapes={"a": "b"})
    for content in ("", "[]", "null", "{}", "[" * 100_000, '{"schema_version": 1}', "\ud800"):
        yield lambda file, c=content: record_path(file).write_bytes(c.encode("utf-8", "surrogatepass"))


def elsewhere() -> Iterator[Damage]:
    """Files that are missing, in each other's place, or something else."""
    yield lambda file: record_path(file).unlink()
    yield lambda file: file.unlink()
    yield swapped
    yield lambda file: shutil.copy(record_path(file), file)
    yield lambda file: shutil.copy(file, record_path(file))
    yield in_place(lambda file: file, Path.mkdir)
    yield in_place(record_path, Path.mkdir)
    yield in_place(lambda file: file, lambda path: path.symlink_to("/nowhere"))
    yield in_place(lambda file: file, Path.touch)
    yield in_place(lambda file: file, lambda path: path.write_bytes(bytes(4096)))


def damages(sound: Sound) -> list[Damage]:
    """Two hundred of them."""
    found = [*altered_tensors(sound), *altered_records(sound), *elsewhere()]
    found += [cut(suffix, share) for suffix in (".onnx_adapter", ".json") for share in (0.1, 0.5, 0.9, 0.999)]
    flips = (flip((".onnx_adapter", ".json")[seed % 2], seed) for seed in range(1000))
    return found + [next(flips) for _ in range(200 - len(found))]


# -- what must hold ----------------------------------------------------------------------------------------------------


def test_two_hundred_damaged_adapters_are_refused(sound: Sound, tmp_path: Path) -> None:
    model = sound.model
    model.load_adapter("sound", sound.file)
    before = {name: output_of(model, KIND, name) for name in (None, "sound")}
    cases, refused = damages(sound), []
    assert len(cases) == 200
    for index, damage in enumerate(cases):
        file = sound.copied(tmp_path / str(index))
        damage(file)
        try:
            model.load_adapter("damaged", file)
        except ServingError as error:
            refused.append(index)
            assert "\n" not in str(error).strip()  # noqa: PT017
        else:
            model.unload_adapter("damaged")
        assert list(model.adapters.loaded) == ["sound"]
        if index % 20 == 0:
            for name, expected in before.items():
                assert output_of(model, KIND, name).equal(expected)
    assert [index for index in range(200) if index not in refused] == []
    for name, expected in before.items():
        assert output_of(model, KIND, name).equal(expected)


@pytest.mark.parametrize("path", ["a", "a.onnx", "missing.onnx_adapter", "\0.onnx_adapter", 3, None])
def test_what_is_not_an_adapter_file_is_refused(sound: Sound, path: Any) -> None:
    with pytest.raises(ServingError):
        sound.model.load_adapter("other", sound.file.parent / path if isinstance(path, str) else path)


def test_the_message_names_every_problem(sound: Sound, tmp_path: Path) -> None:
    file = sound.copied(tmp_path / "wrong")
    site = "model.layers.0.self_attn.q_proj"

    def edit(tensors: Tensors) -> None:
        tensors[f"{site}.gralora_B"] = tensors[f"{site}.gralora_B"].astype(np.float16)
        tensors[f"{site}.gralora_A_general"] = np.full((32, 2), np.nan, np.float32)

    sound.rewritten(edit)(file)
    with pytest.raises(ServingError) as error:
        sound.model.load_adapter("other", file)
    assert f"{site}.gralora_B is float16 instead of float32" in str(error.value)
    assert f"{site}.gralora_A_general holds values that are not finite" in str(error.value)
