"""Adapter files: PEFT's load here, ours load in PEFT, and a damaged one changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import peft_model, perturb_saved_modules, saved_by_peft
from safetensors.torch import load, save_file
from tiny_models import TINY, tiny_model
from torch import Tensor
from traces import fresh, fresh_trace, inputs_of, relative_error, run, traced

from gralora_fx import GraloraConfig, GraloraModel, rewrite
from gralora_fx.core.adapters.adapter_files import WEIGHTS_NAME
from gralora_fx.core.adapters.checkpoint import checkpoint_parameters
from gralora_fx.errors import CheckpointError, ConfigError, RewriteError, TargetError

SIZES = {
    "plain": {"r": 8, "gralora_k": 2, "alpha": 16},
    "hybrid": {"r": 8, "gralora_k": 2, "hybrid_r": 4, "alpha": 24},
}


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, read whole: a mapped file must not be written over."""
    return load(path.read_bytes())


CLASSIFIERS = ("bert", "roberta", "distilbert", "albert", "mpnet")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TINY)
def test_a_peft_checkpoint_gives_pefts_logits(name: str, size: str, tmp_path: Path) -> None:
    theirs = saved_by_peft(name, tmp_path, target_modules="all-linear", **SIZES[size])
    inputs = inputs_of(name)
    model = GraloraModel.from_pretrained(traced(name), tmp_path)
    expected = run(theirs, inputs)
    assert relative_error(run(model, inputs), expected) < 1e-5
    assert relative_error(run(traced(name), inputs), expected) > 1e-3, "the adapter does nothing, so nothing was tested"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_saved_by_peft_loads_with_its_head(name: str, tmp_path: Path) -> None:
    # by name: PEFT cannot load "all-linear" on DistilBERT, whose pre_classifier it takes for a head too
    targets = [site.path for site in traced(name).sites if "classifier" not in site.path]
    theirs = saved_by_peft(name, tmp_path, target_modules=targets, task_type="SEQ_CLS", **SIZES["plain"])
    before = {key: p.detach().clone() for key, p in traced(name).tree.parameters.items()}
    model = GraloraModel.from_pretrained(traced(name), tmp_path)
    inputs = inputs_of(name)
    assert model.plans["default"].saved_modules
    assert relative_error(run(model, inputs), run(theirs, inputs)) < 1e-5
    assert all(torch.equal(before[key], p) for key, p in traced(name).tree.parameters.items())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": r".*layers\.1\..*_proj"}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": 1, "layers_pattern": "h"}),
        ("gpt2", {"target_modules": None}),
        ("bert", {"target_modules": None, "bias": "gralora_only"}),
        ("bert", {"target_modules": None, "bias": "all"}),
        ("opt", {"target_modules": ["fc1"], "bias": "gralora_only"}),
        ("vit", {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}),
        ("t5", {"target_modules": ["q", "wi", "wo"]}),
    ],
)
def test_a_peft_checkpoint_loads_with_any_selection(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_by_peft(name, tmp_path, **SIZES["plain"], **fields)
    model = GraloraModel.from_pretrained(traced(name), tmp_path)
    inputs = inputs_of(name)
    assert relative_error(run(model, inputs), run(theirs, inputs)) < 1e-5


@pytest.mark.parametrize("bias", ["all", "gralora_only"])
def test_trained_biases_round_trip_through_peft(bias: str, tmp_path: Path) -> None:
    theirs = peft_model(tiny_model("bert"), target_modules=["query", "dense"], bias=bias, **SIZES["plain"])
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if key.endswith("bias") and parameter.requires_grad:
                parameter += 0.3
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = GraloraModel.from_pretrained(traced("bert"), tmp_path / "theirs")
    inputs = inputs_of("bert")
    expected = run(theirs, inputs)
    assert relative_error(run(model, inputs), expected) < 1e-5
    model.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path / "ours")).eval()
    assert relative_error(run(loaded, inputs), expected) < 1e-5
    assert set(tensors_of(tmp_path / "ours" / WEIGHTS_NAME)) == set(tensors_of(tmp_path / "theirs" / WEIGHTS_NAME))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "opt", "t5", "vit", "albert", "falcon", "bart"])
def test_our_checkpoint_loads_in_peft_with_the_same_keys_and_logits(name: str, size: str, tmp_path: Path) -> None:
    fields = {"target_modules": "all-linear", **SIZES[size]}
    torch.manual_seed(3)
    model = rewrite(traced(name), GraloraConfig(**fields, init_weights=False))
    model.save_pretrained(tmp_path / "ours")
    inputs = inputs_of(name)
    loaded = peft.PeftModel.from_pretrained(tiny_model(name), str(tmp_path / "ours")).eval()
    assert relative_error(run(loaded, inputs), run(model, inputs)) < 1e-5
    saved_by_peft(name, tmp_path / "theirs", **fields)
    ours, theirs = (tensors_of(tmp_path / side / WEIGHTS_NAME) for side in ("ours", "theirs"))
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}


def test_a_trained_head_of_ours_loads_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = GraloraConfig(r=8, target_modules={"query"}, task_type="SEQ_CLS", init_weights=False)
    model = rewrite(traced("bert"), config)
    with torch.no_grad():
        for parameter in model.adapter("default").copies["classifier"].values():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path)).eval()
    assert relative_error(run(loaded, inputs_of("bert")), run(model, inputs_of("bert"))) < 1e-5
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= set(
        tensors_of(tmp_path / WEIGHTS_NAME)
    )


@pytest.mark.quick
def test_keys_are_pefts() -> None:
    model = rewrite(traced("bert"), GraloraConfig(r=8, hybrid_r=4, target_modules={"layer.0.attention.self.query"}))
    path = "base_model.model.bert.encoder.layer.0.attention.self.query"
    assert {key: tuple(p.shape) for key, p in checkpoint_parameters(model.adapter("default")).items()} == {
        f"{path}.gralora_A": (2, 16, 8),
        f"{path}.gralora_B": (2, 8, 16),
        f"{path}.gralora_A_general.weight": (4, 32),
        f"{path}.gralora_B_general.weight": (32, 4),
    }


def test_a_shorthand_is_saved_written_out(tmp_path: Path) -> None:
    rewrite(traced("llama"), GraloraConfig(r=8)).save_pretrained(tmp_path / "default")
    rewrite(traced("gpt2"), GraloraConfig(r=8, target_modules="all-linear")).save_pretrained(tmp_path / "all")
    default, everything = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("default", "all"))
    assert default["target_modules"] == ["q_proj", "v_proj"]
    assert default["fan_in_fan_out"] is False
    assert "transformer.h.0.attn.c_attn" in everything["target_modules"]
    assert "lm_head" not in everything["target_modules"]
    assert everything["fan_in_fan_out"] is True
    assert everything["inference_mode"] is True


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    model = rewrite(traced("bert"), GraloraConfig(r=8, target_modules={"query", "value", "key"}))
    for side in ("a", "b"):
        model.save_pretrained(tmp_path / side)
    files = ["README.md", "adapter_config.json", WEIGHTS_NAME]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == files


def test_other_adapters_are_saved_in_folders_of_their_name(tmp_path: Path) -> None:
    model = rewrite(traced("bert"), GraloraConfig(r=8, target_modules={"query"}))
    model.add_adapter("other", GraloraConfig(r=4, target_modules={"key"}))
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS_NAME).is_file()
    assert (tmp_path / "other" / WEIGHTS_NAME).is_file()
    model.save_pretrained(tmp_path / "one", adapter_names=["other"])
    assert not (tmp_path / "one" / WEIGHTS_NAME).exists()


def test_pefts_copy_of_the_base_head_is_accepted_and_a_changed_one_is_not(tmp_path: Path) -> None:
    sizes = {"vocab_size": 102}  # a head that k divides
    _, graph = fresh("opt", **sizes)
    theirs = saved_by_peft("opt", tmp_path, sizes=sizes, target_modules=["lm_head", "q_proj"], **SIZES["plain"])
    tensors = tensors_of(tmp_path / WEIGHTS_NAME)
    repeated = [key for key in tensors if "base_layer" in key]
    assert repeated, "PEFT no longer repeats the base's head, so this test has lost its subject"
    model = GraloraModel.from_pretrained(graph, tmp_path)
    assert relative_error(run(model, inputs_of("opt")), run(theirs, inputs_of("opt"))) < 1e-5
    save_file({**tensors, repeated[0]: tensors[repeated[0]] + 1}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=f"unexpected {repeated[0]}"):
        GraloraModel.from_pretrained(graph, tmp_path)


BIASES_TOO = {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"], **SIZES["plain"]}
HEAD = "base_model.model.classifier"


def test_what_peft_repeats_of_a_saved_module_is_compared(tmp_path: Path) -> None:
    theirs = saved_by_peft("bert", tmp_path, **BIASES_TOO)
    tensors = tensors_of(tmp_path / WEIGHTS_NAME)
    repeated = {
        f"{HEAD}.original_module.bias": "the base's classifier.bias",
        f"{HEAD}.modules_to_save.bias": f"{HEAD}.bias",
    }
    assert repeated.keys() <= tensors.keys(), "PEFT no longer repeats them, so this test has lost its subject"
    model = GraloraModel.from_pretrained(traced("bert"), tmp_path)
    assert relative_error(run(model, inputs_of("bert")), run(theirs, inputs_of("bert"))) < 1e-5
    for key, other in repeated.items():
        for tensor in (tensors[key] + 1, torch.zeros(7), tensors[key][:1]):
            save_file({**tensors, key: tensor.contiguous()}, tmp_path / WEIGHTS_NAME)
            with pytest.raises(CheckpointError, match=f"unexpected {key}, whose values are not those of {other}"):
                GraloraModel.from_pretrained(traced("bert"), tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.nowhere.original_module.weight",
        "base_model.model.nowhere.modules_to_save.default.weight",
        f"{HEAD}.modules_to_save.default.nothing",
        "base_model.model.bert.pooler.dense.modules_to_save.default.weight",
    ],
)
def test_what_only_looks_like_pefts_is_refused(key: str, tmp_path: Path) -> None:
    saved_by_peft("bert", tmp_path, **BIASES_TOO)
    save_file({**tensors_of(tmp_path / WEIGHTS_NAME), key: torch.full((2, 2), 666.0)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=f"unexpected {key}"):
        GraloraModel.from_pretrained(traced("bert"), tmp_path)


@pytest.mark.parametrize("form", ["modules_to_save.default.", "modules_to_save.", "modules_to_save.mine."])
def test_a_saved_module_under_its_name_in_the_model_is_loaded(form: str, tmp_path: Path) -> None:
    theirs = saved_by_peft("bert", tmp_path, **{**BIASES_TOO, "bias": "none"})
    tensors = tensors_of(tmp_path / WEIGHTS_NAME)
    renamed = {key.replace("classifier.", f"classifier.{form}"): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / WEIGHTS_NAME)
    model = GraloraModel.from_pretrained(traced("bert"), tmp_path)
    assert relative_error(run(model, inputs_of("bert")), run(theirs, inputs_of("bert"))) < 1e-5


# -- bad files ----------------------------------------------------------------------------------------------------

KEY = "base_model.model.bert.encoder.layer.1.attention.self.query.gralora_A"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    saved_by_peft("bert", directory, target_modules=["query", "key"], **SIZES["hybrid"])
    return directory


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint, to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


@pytest.fixture
def model(checkpoint: Path) -> GraloraModel:
    return GraloraModel.from_pretrained(traced("bert"), checkpoint)


def state(model: GraloraModel) -> tuple[str, list[str], list[str], dict[str, Tensor]]:
    tensors = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    return str(model.graph_module.graph), list(model.configs), model.active_adapters, tensors


def assert_same_state(model: GraloraModel, before: tuple[str, list[str], list[str], dict[str, Tensor]]) -> None:
    after = state(model)
    assert after[:3] == before[:3]
    assert after[3].keys() == before[3].keys()
    assert all(torch.equal(after[3][name], tensor) for name, tensor in before[3].items())


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[KEY]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.bert.pooler.gralora_A"] = torch.zeros(2, 3)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = torch.zeros(2, 16, 6)


def poison(tensors: dict[str, Tensor]) -> None:
    tensors[KEY][0, 0, 0] = float("nan")


def overflow(tensors: dict[str, Tensor]) -> None:
    tensors[KEY][0, 0, 0] = float("inf")


DAMAGES = [
    (drop, f"missing {KEY}"),
    (add, "unexpected base_model.model.bert.pooler.gralora_A"),
    (reshape, rf"{KEY} has shape \[2, 16, 6\] instead of \[2, 16, 8\]"),
    (poison, f"{KEY} holds values that are not finite"),
    (overflow, f"{KEY} holds values that are not finite"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("adapter_name", ["default", "fresh"])
def test_tensors_that_do_not_fit_change_nothing(
    damage: Any, message: str, adapter_name: str, damaged: Path, model: GraloraModel
) -> None:
    tensors = {key: tensor + 1 for key, tensor in tensors_of(damaged / WEIGHTS_NAME).items()}
    damage(tensors)
    save_file(tensors, damaged / WEIGHTS_NAME)
    before = state(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        model.load_adapter(damaged, adapter_name)
    assert str(damaged) in str(caught.value)
    assert_same_state(model, before)


def test_every_problem_of_a_checkpoint_is_named_at_once(damaged: Path, model: GraloraModel) -> None:
    tensors = tensors_of(damaged / WEIGHTS_NAME)
    other = KEY.replace("layer.1", "layer.0")
    drop(tensors)
    add(tensors)
    tensors[other] = tensors[other] * float("nan")
    save_file(tensors, damaged / WEIGHTS_NAME)
    with pytest.raises(CheckpointError) as caught:
        model.load_adapter(damaged, "fresh")
    assert all(part in str(caught.value) for part in (f"missing {KEY}", "unexpected base", f"{other} holds"))


@pytest.mark.parametrize("damage", DAMAGES[:1], ids=["missing"])
def test_a_failed_from_pretrained_leaves_the_trace(damage: Any, damaged: Path) -> None:
    tensors = tensors_of(damaged / WEIGHTS_NAME)
    damage[0](tensors)
    save_file(tensors, damaged / WEIGHTS_NAME)
    source, graph = fresh("bert")
    text = str(graph.graph_module.graph)
    with pytest.raises(CheckpointError, match=f"missing {KEY}"):
        GraloraModel.from_pretrained(graph, damaged)
    assert str(graph.graph_module.graph) == text
    assert all(parameter.requires_grad for parameter in source.parameters())
    assert not hasattr(graph.graph_module, "gralora")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(length: int, damaged: Path, model: GraloraModel) -> None:
    path = damaged / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:length])
    before = state(model)
    with pytest.raises(CheckpointError, match=r"cannot be read .* truncated or not a safetensors file") as caught:
        model.load_adapter(damaged, "fresh")
    assert str(path) in str(caught.value)
    assert_same_state(model, before)


def test_a_pickle_is_refused(damaged: Path, model: GraloraModel) -> None:
    tensors = tensors_of(damaged / WEIGHTS_NAME)
    (damaged / WEIGHTS_NAME).unlink()
    torch.save(tensors, damaged / "adapter_model.bin")
    before = state(model)
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle.*: python -c"):
        model.load_adapter(damaged, "fresh")
    assert_same_state(model, before)


def test_a_pickle_by_the_name_of_a_safetensors_file_is_refused(damaged: Path, model: GraloraModel) -> None:
    torch.save(tensors_of(damaged / WEIGHTS_NAME), damaged / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        model.load_adapter(damaged, "fresh")


def test_a_model_that_is_not_traced_is_named(checkpoint: Path) -> None:
    with pytest.raises(RewriteError, match="cannot load an adapter into a Linear; trace it first"):
        GraloraModel.from_pretrained(torch.nn.Linear(2, 2), checkpoint)  # type: ignore[arg-type]


def test_absent_files_are_named(damaged: Path, model: GraloraModel, tmp_path: Path) -> None:
    (damaged / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match=rf"no {WEIGHTS_NAME} in {damaged}; give the directory"):
        model.load_adapter(damaged, "fresh")
    (damaged / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=rf"no adapter_config.json in {damaged}"):
        model.load_adapter(damaged, "fresh")
    with pytest.raises(CheckpointError, match=r"no directory .*nowhere"):
        model.load_adapter(tmp_path / "nowhere", "fresh")
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        model.load_adapter(Path(__file__), "fresh")


def test_an_adapter_of_another_model_names_what_it_misses(tmp_path: Path, model: GraloraModel) -> None:
    saved_by_peft("llama", tmp_path, target_modules=["q_proj"], **SIZES["plain"])
    before = state(model)
    with pytest.raises(TargetError, match="'q_proj' matches no module"):
        model.load_adapter(tmp_path, "fresh")
    assert_same_state(model, before)


def test_loading_onto_an_existing_name_replaces_its_tensors(checkpoint: Path, model: GraloraModel) -> None:
    inputs = inputs_of("bert")
    expected = run(model, inputs)
    with torch.no_grad():
        for _, parameter in model.adapter("default").named_parameters():
            parameter.zero_()
    assert relative_error(run(model, inputs), expected) > 1e-3
    model.load_adapter(checkpoint, "default")
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("changed", [{"alpha": 1}, {"r": 4}, {"target_modules": ["query"]}], ids=str)
def test_loading_another_configuration_onto_a_name_is_refused(
    changed: dict[str, Any], tmp_path: Path, model: GraloraModel
) -> None:
    fields = {"target_modules": ["query", "key"], **SIZES["hybrid"], **changed}
    saved_by_peft("bert", tmp_path, **fields)
    before = state(model)
    with pytest.raises(ConfigError, match="exists with another configuration; delete it first"):
        model.load_adapter(tmp_path, "default")
    assert_same_state(model, before)


def test_a_half_precision_checkpoint_loads_into_float32_adapters(damaged: Path) -> None:
    tensors = {key: t.to(torch.bfloat16) for key, t in tensors_of(damaged / WEIGHTS_NAME).items()}
    save_file(tensors, damaged / WEIGHTS_NAME)
    model = GraloraModel.from_pretrained(traced("bert"), damaged)
    for key, parameter in checkpoint_parameters(model.adapter("default")).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, tensors[key].float())


def test_perturbing_the_oracle_moves_it() -> None:
    """The helper that every head test relies on does what it says."""
    wrapped = peft_model(tiny_model("bert"), target_modules=["query"], task_type="SEQ_CLS", r=8)
    before = run(wrapped, inputs_of("bert"))
    perturb_saved_modules(wrapped)
    assert relative_error(run(wrapped, inputs_of("bert")), before) > 1e-2


def test_pefts_repeated_biases_of_a_saved_head_are_taken(tmp_path: Path) -> None:
    fields = {"r": 4, "hybrid_r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}
    theirs = saved_by_peft("bert", tmp_path, **fields)
    ours = GraloraModel.from_pretrained(fresh_trace("bert"), tmp_path)
    assert relative_error(run(ours, inputs_of("bert")), run(theirs, inputs_of("bert"))) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int32), "is torch.int32, not a float tensor"),
        (lambda t: t.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, not a float tensor"),
        (lambda t: torch.full_like(t, 1e300, dtype=torch.float64), "holds values that are not finite"),
    ],
    ids=["integer", "float8", "overflow"],
)
def test_tensors_of_another_kind_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    saved_by_peft("bert", tmp_path, r=4, target_modules=["query"])
    tensors = load((tmp_path / WEIGHTS_NAME).read_bytes())
    key = sorted(tensors)[0]
    save_file({**tensors, key: change(tensors[key])}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=message):
        GraloraModel.from_pretrained(fresh_trace("bert"), tmp_path)


def test_an_adapter_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model = rewrite(fresh_trace("bert"), GraloraConfig(r=4, target_modules=["query"]))
    with pytest.raises(CheckpointError, match=r"cannot write .*file"):
        model.save_pretrained(tmp_path / "file")
