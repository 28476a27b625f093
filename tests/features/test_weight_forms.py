"""A form of stored weights is a feature: without the folder its bases are refused, and another folder adds a form."""

from __future__ import annotations

import pytest
from pruned_tree import copy_without, run_on

RECORD = """
signs = ["weight_scale"]

[parts]
"weight forms" = "form:Whole"
"stored weights" = "form:unpacked"
rounding = "form:rounded"
"""
FORM = """
from dataclasses import asdict, dataclass, replace

import numpy as np

from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.packed_tensors import PackedTensor
from gralora_fx.base.sources.safetensors_files import StoredTensor


@dataclass(frozen=True)
class Whole(BaseQuantization):
    sign = "weight_scale"
    title, texts, metavar, help = "whole numbers", "whole", "whole", "Round to whole numbers."
    fields, extra = "a WholeConfig", "train"
    compute_dtype: str = "float32"
    skip_modules: tuple[str, ...] | None = None

    @classmethod
    def of_text(cls, text):
        return cls() if text == "whole" else None

    @classmethod
    def of_fields(cls, fields):
        return cls() if fields.get("quant_method", fields.get("form")) == "whole" else None

    def has_weights_of(self, other):
        return isinstance(other, Whole)

    def to_dict(self):
        return {"form": "whole"}


@dataclass(frozen=True)
class WholeTensor(PackedTensor):
    numbers: StoredTensor
    scale: float

    def floats(self, start, stop):
        numbers = np.empty(stop - start, np.int8)
        self.numbers.read_into(numbers, start)
        return numbers * np.float32(self.scale)


def unpacked(tensors, directory, told):
    scales = {key.removesuffix("_scale"): tensor for key, tensor in tensors.items() if key.endswith("_scale")}
    found = {key: tensor for key, tensor in tensors.items() if not key.endswith("_scale")}
    for key, scale in scales.items():
        t = found[key]
        found[key] = WholeTensor(t.file, 0, 4 * t.numel, key, "F32", t.shape, Whole(), t, float(scale.array()[0]))
    return found


def rounded(weight, quantization, name):
    scale = np.float32(np.abs(weight).max() / 127)
    return np.rint(weight / scale).astype(np.float32) * scale
"""
PROGRAM = """
import json, sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from gralora_fx.loading import load_model

base, packed = Path("base"), Path("packed")
tiny_model("llama").save_pretrained(base)
rounded = load_model(base, base_quantization="whole")
packed.mkdir()
fields = json.loads((base / "config.json").read_text())
(packed / "config.json").write_text(json.dumps(fields | {"quantization_config": {"quant_method": "whole"}}))
tensors = {}
for key, tensor in load_file(base / "model.safetensors").items():
    tensors[key] = tensor
    if key.endswith("_proj.weight"):
        scale = tensor.abs().max() / 127
        tensors |= {key: (tensor / scale).round().to(torch.int8), f"{key}_scale": scale.reshape(1)}
save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
read = load_model(packed)
print(read.config.base_quantization, rounded.config.base_quantization)
print(all(torch.equal(value, read.state_dict()[key]) for key, value in rounded.state_dict().items()))
"""
REFUSED = """
import json
from pathlib import Path

from tiny_models import tiny_model
from gralora_fx.errors import GraloraError
from gralora_fx.loading import load_model

base = Path("refused")
tiny_model("llama").save_pretrained(base)
for name, rounding in ((base, "nf4"), (base, None)):
    try:
        load_model(name, base_quantization=rounding)
    except GraloraError as error:
        print(error)
    path = base / "config.json"
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run both programs in one process, without the folders of forms and with one of another; return their output."""
    tree = copy_without(tmp_path_factory.mktemp("forms"), "group_quantized", "llm_int8", "nf4")
    folder = tree / "gralora_fx" / "features" / "whole"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "feature.toml").write_text(RECORD)
    (folder / "form.py").write_text(FORM)
    return run_on(tree, PROGRAM + REFUSED).splitlines()


def test_a_folder_adds_a_form_in_which_bases_are_read_and_to_which_they_are_rounded(lines: list[str]) -> None:
    assert lines[:2] == ["{'form': 'whole'} {'form': 'whole'}", "True"]


def test_bases_in_few_bits_are_refused_without_their_folders(lines: list[str]) -> None:
    asked, stored = lines[2:]
    assert asked == "base_quantization='nf4' is not available; take whole"
    assert stored.startswith("refused is quantized by bitsandbytes, which is not read (of quantized bases, whole num")
