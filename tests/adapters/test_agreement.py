"""An adapter's configuration and tensors are of one adapter, for whatever reads both; PEFT's own files always are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft_oracle import adapted_paths, peft_model, perturb_saved_modules
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from traces import fresh, inputs_of, relative_error, run

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, TracedModel, rewrite
from gralora_fx.core.adapters.stored_adapter import open_adapter
from gralora_fx.core.loading.bases import load_base
from gralora_fx.errors import CheckpointError, GraloraError
from gralora_fx.exporters import export_adapter, export_onnx, fold_onnx, merge_checkpoint, to_lora
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot

METHODS: dict[str, dict[str, Any]] = {
    "gralora": {"r": 4, "gralora_k": 2},
    "lora": {"method": "LORA", "r": 4},
    "rslora": {"method": "LORA", "r": 4, "use_rslora": True},
}


class Places:
    """A base, its exports, and an adapter of each method at queries and values."""

    def __init__(self, root: Path) -> None:
        self.root = root
        tiny_model("llama").save_pretrained(root / "base")
        self.traced: TracedModel = fresh("llama")[1]
        export_onnx(self.traced, root / "merged", verify=False)
        own = rewrite(fresh("llama")[1], GraloraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="own")
        export_onnx(own, root / "data", adapters="data", verify=False)
        for name, fields in METHODS.items():
            wrapped = peft_model(tiny_model("llama"), target_modules=["q_proj", "v_proj"], **fields)
            wrapped.save_pretrained(str(root / name))

    def readers(self, adapter: Path, out: Path) -> dict[str, Callable[[], Any]]:
        """Whatever reads a saved adapter."""
        (out / "root").mkdir(parents=True)
        shutil.copytree(adapter, out / "root" / "sent")
        (out / "taken").mkdir()
        served = AdapterRoot.of(out / "root")
        model = rewrite(fresh("llama")[1], GraloraConfig(r=2, target_modules=["k_proj"]))
        return {
            "export_adapter": lambda: export_adapter(adapter, self.root / "data", "new", overwrite=True),
            "load_lora_adapter": lambda: served.copy("sent", "sent", self.root / "data", out / "taken"),
            "fold": lambda: fold_onnx(self.root / "merged", adapter, out / "folded"),
            "merge": lambda: merge_checkpoint(self.root / "base", adapter, out / "model"),
            "to_lora": lambda: to_lora(adapter, out / "lora", rank=2),
            "from_pretrained": lambda: GraloraModel.from_pretrained(fresh("llama")[1], adapter),
            "load_adapter": lambda: model.load_adapter(adapter, "new"),
            "export": lambda: load_base(str(self.root / "base"), str(adapter), None),
        }


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("agreement"))


def edited(adapter: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(adapter, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return target


@pytest.mark.parametrize("method", METHODS)
def test_what_peft_saved_is_read_by_all(places: Places, method: str, tmp_path: Path) -> None:
    for read in places.readers(places.root / method, tmp_path / "out").values():
        read()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["no_such_proj"], "no_such_proj"),
        (["q_proj", "v_proj", "no_such_proj"], "no_such_proj"),
        (["q_proj", "v_proj", "layers.7.self_attn.q_proj"], "layers.7.self_attn.q_proj"),
        (["q_proj", "v_proj", "k_proj"], "k_proj"),
    ],
)
def test_names_of_no_layer_are_refused(
    places: Places, method: str, targets: list[str], named: str, tmp_path: Path
) -> None:
    """By all where no name is met; where some are, whoever has the model tells by its layers whether tensors miss."""
    adapter = edited(places.root / method, tmp_path / "adapter", target_modules=targets)
    (places.root / "data" / "adapters" / "new.onnx_adapter").unlink(missing_ok=True)
    with_model = () if len(targets) == 1 else ("from_pretrained", "load_adapter", "export")
    for name, read in places.readers(adapter, tmp_path / "out").items():
        if name not in with_model:
            with pytest.raises(CheckpointError, match=f"target_modules names '{named}', and no layer of that name"):
                read()
    assert not (places.root / "data" / "adapters" / "new.onnx_adapter").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["root", "taken"]


@pytest.mark.parametrize("method", METHODS)
def test_names_beside_those_of_layers_are_a_warning_where_the_model_is_known(
    places: Places, method: str, tmp_path: Path
) -> None:
    """PEFT saves such a list as it was given, and loads it."""
    targets = ["q_proj", "v_proj", "no_such_proj"]
    adapter = edited(places.root / method, tmp_path / "adapter", target_modules=targets)
    model = rewrite(fresh("llama")[1], GraloraConfig(r=2, target_modules=["k_proj"]))
    with pytest.warns(UserWarning, match="no_such_proj"):
        ours = GraloraModel.from_pretrained(fresh("llama")[1], adapter)
    with pytest.warns(UserWarning, match="no_such_proj"):
        model.load_adapter(adapter, "new")
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(adapter)).eval()
    inputs = inputs_of("llama")
    assert relative_error(run(ours, inputs), run(theirs, inputs)) < 1e-5


SELECTING = {
    "a name is left out": {"target_modules": ["q_proj"]},
    "another expression": {"target_modules": r".*\.self_attn\.(q|k)_proj"},
    "an expression of no layer": {"target_modules": "q_proj"},
    "one layer": {"layers_to_transform": [0]},
    "another layer": {"layers_to_transform": 7},
    "another container": {"layers_to_transform": [0, 1], "layers_pattern": "blocks"},
    "an exclusion": {"exclude_modules": ["v_proj"]},
    "saved": {"modules_to_save": ["self_attn"]},
    "rank": {"r": 8},
}


@pytest.mark.parametrize("method", ["gralora", "lora"])
@pytest.mark.parametrize("case", SELECTING)
def test_tensors_that_the_configuration_does_not_describe_are_refused_by_all(
    places: Places, method: str, case: str, tmp_path: Path
) -> None:
    adapter = edited(places.root / method, tmp_path / "adapter", **SELECTING[case])
    for name, read in places.readers(adapter, tmp_path / "out").items():
        if name == "export":
            continue  # after the base is loaded, by from_pretrained
        with pytest.raises(GraloraError, match=r"proj|layers|self_attn"):
            read()


@pytest.mark.parametrize("method", ["gralora", "lora"])
@pytest.mark.parametrize("targets", ["all-linear", r".*_proj"])
def test_layers_that_are_selected_and_have_no_tensors(
    places: Places, method: str, targets: str, tmp_path: Path
) -> None:
    """Only the model tells; `to_lora` has none."""
    adapter = edited(places.root / method, tmp_path / "adapter", target_modules=targets)
    readers = places.readers(adapter, tmp_path / "out")
    for name in ("export_adapter", "load_lora_adapter", "fold", "merge"):
        with pytest.raises(CheckpointError, match=r"no tensors of .*_proj.*, which the configuration selects"):
            readers[name]()
    for name in ("from_pretrained", "load_adapter"):
        with pytest.raises(CheckpointError, match="missing base_model"):
            readers[name]()


@pytest.mark.parametrize("method", ["gralora", "lora"])
def test_a_layer_without_its_tensors(places: Places, method: str, tmp_path: Path) -> None:
    adapter = edited(places.root / method, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if "layers.1.self_attn.v_proj" not in key}
    save_file(tensors, file, metadata={"format": "pt"})
    readers = places.readers(adapter, tmp_path / "out")
    for name in ("export_adapter", "load_lora_adapter", "fold", "merge"):
        with pytest.raises(CheckpointError, match=r"no tensors of model\.layers\.1\.self_attn\.v_proj, which"):
            readers[name]()


def test_a_rank_for_no_layer(places: Places, tmp_path: Path) -> None:
    """An error where PEFT does not have the field, a warning where it ignores the key."""
    for name, fields in {"rank_pattern": {"zz": 8}, "alpha_pattern": {"zz": 8}}.items():
        ours = edited(places.root / "gralora", tmp_path / f"gralora-{name}", **{name: fields})
        with pytest.raises(CheckpointError, match=f"{name} key 'zz' applies to no layer that has tensors"):
            to_lora(ours, tmp_path / f"a-{name}", rank=2)
        theirs = edited(places.root / "lora", tmp_path / f"lora-{name}", **{name: fields})
        with pytest.warns(UserWarning, match=f"{name} key 'zz' applies to no layer that has tensors, and is ignored"):
            to_lora(theirs, tmp_path / f"b-{name}", rank=2)
    indices = edited(places.root / "lora", tmp_path / "indices", layers_to_transform=[0, 1, 7])
    with pytest.warns(UserWarning, match=r"layers_to_transform \[7\] applies to no layer"):
        to_lora(indices, tmp_path / "c", rank=2)


WIDE = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "an expression": {"target_modules": r".*\.1\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "None": {"target_modules": None},
    "layers": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "layers of a container": {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "saved": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"0.*q": 3}},
    "exclusions": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "every one excluded": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"],
    },
    "within saved": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["self_attn"]},
    "excluded names": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*v_proj"},
}
LORA_ONLY = ("layers", "patterns", "exclusions", "every one excluded", "excluded names")


@pytest.mark.filterwarnings("ignore:.* applies to no adapted layer")
@pytest.mark.filterwarnings("ignore:.* applies to no layer that has tensors, and is ignored, as PEFT does")
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, m) for name in WIDE for m in ("gralora", "lora") if m == "lora" or name not in LORA_ONLY],
)
def test_whatever_peft_saves_agrees_with_itself_and_with_the_layers(
    places: Places, name: str, method: str, tmp_path: Path
) -> None:
    wrapped = peft_model(tiny_model("llama"), **{**METHODS[method], **WIDE[name]})
    perturb_saved_modules(wrapped)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    config = wrapped.peft_config["default"]
    layers = {path for path, module in tiny_model("llama").named_modules() if isinstance(module, torch.nn.Linear)}
    assert adapted_paths(wrapped) == {path for path in layers if check_target_module_exists(config, path)}
    with open_adapter(tmp_path / "adapter") as stored:
        assert set(stored.sites) == adapted_paths(wrapped)
    fold_onnx(places.root / "merged", tmp_path / "adapter", tmp_path / "folded")
    merge_checkpoint(places.root / "base", tmp_path / "adapter", tmp_path / "model")
    GraloraModel.from_pretrained(fresh("llama")[1], tmp_path / "adapter")


@pytest.mark.parametrize("kind", [GraloraConfig, LoraConfig])
def test_what_is_saved_here_names_what_was_adapted(kind: Any, tmp_path: Path) -> None:
    """Names that the model does not have are left out, so that every reader takes it."""
    with pytest.warns(UserWarning, match="no_such"):
        model = rewrite(fresh("llama")[1], kind(r=4, target_modules=["q_proj", "no_such"]))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    GraloraModel.from_pretrained(fresh("llama")[1], tmp_path / "adapter")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).target_modules == {"q_proj"}
