"""`gralora_fx.peft`: what a script of PEFT's does, with its import changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import is_peft_model
from peft.optimizers import create_loraplus_optimizer as pefts_loraplus
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import gralora_fx
import gralora_fx.peft as ours
from gralora_fx.errors import CheckpointError, ConfigError, RewriteError, TraceError
from gralora_fx.peft.optimizers import create_loraplus_optimizer

pytestmark = pytest.mark.usefixtures("own_garbage")  # Trainer collects it

TARGETS = ["q_proj", "down_proj"]
IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny Llama."""
    directory = tmp_path_factory.mktemp("base")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def traced(base: Path) -> gralora_fx.TracedModel:
    """Its trace, for tests that leave its weights as they are."""
    return gralora_fx.trace(AutoModelForCausalLM.from_pretrained(base), task="text-generation-with-past")


def script(package: Any, base: Path, output: Path, **settings: Any) -> tuple[Any, Trainer]:
    """Train as PEFT's example of GraLoRA does."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    model = package.get_peft_model(
        model,
        package.GraloraConfig(r=4, target_modules=TARGETS, gralora_k=2, gralora_dropout=0.0, bias="none", alpha=16),
    )
    model.to("cpu")
    tokenizer = tiny_tokenizer()
    rows = [{"input_ids": [5 + (row * step) % 60 for step in range(4 + row % 3)]} for row in range(1, 13)]
    fixed = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(output), per_device_train_batch_size=2, gradient_accumulation_steps=2, **{**fixed, **settings}
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return model, trainer


def logged(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_pefts_example_trains_and_saves_as_there(base: Path, tmp_path: Path) -> None:
    losses = []
    for package in (ours, peft):
        output = tmp_path / package.__name__
        model, trainer = script(package, base, output, num_train_epochs=1, weight_decay=0.01)
        model.save_pretrained(str(output))
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    files = [{file.name for file in (tmp_path / p.__name__).iterdir() if file.is_file()} for p in (ours, peft)]
    assert files[0] == files[1] == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / ours.__name__)
    mine = ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / ours.__name__)
    with torch.no_grad():
        assert torch.allclose(mine(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=1e-5)
        prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
        assert torch.equal(mine.generate(**prompt), theirs.generate(**prompt))
    assert not mine.training
    assert not any(p.requires_grad for p in mine.parameters())


def test_it_is_a_peft_model_to_whoever_asks(base: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(base)
    model = ours.get_peft_model(source, peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, ours.PeftModelForCausalLM)
    assert is_peft_model(model)
    assert isinstance(model.peft_config["default"], gralora_fx.LoraConfig)
    assert isinstance(model.peft_config["default"], ours.PeftConfig)
    assert model.peft_config["default"].base_model_name_or_path == str(base) == model.name_or_path
    assert model.active_peft_config is model.peft_config["default"]
    assert model.get_base_model().config is source.config is model.config
    assert model.prepare_inputs_for_generation(IDS, cache=None)["input_ids"].shape == IDS.shape
    assert isinstance(copy.deepcopy(model), ours.PeftModelForCausalLM)


def test_a_merged_or_unloaded_model_is_the_one_that_was_given(base: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(base)
    fresh = AutoModelForCausalLM.from_pretrained(base)(input_ids=IDS).logits
    config = ours.GraloraConfig(r=4, target_modules=TARGETS, init_weights=False)
    model = ours.get_peft_model(source, config)
    assert model.unload() is source
    assert torch.equal(source(input_ids=IDS).logits, fresh)
    model = ours.get_peft_model(source, config)
    adapted = model(input_ids=IDS).logits
    assert model.merge_and_unload() is source
    assert torch.allclose(source(input_ids=IDS).logits, adapted, atol=1e-5)
    assert not torch.allclose(adapted, fresh, atol=1e-3)


def test_an_adapters_tensors_go_by_pefts_keys(base: Path, traced: gralora_fx.TracedModel) -> None:
    fields = {"r": 4, "target_modules": TARGETS, "modules_to_save": ["lm_head"], "init_weights": False}
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.GraloraConfig(**fields))
    mine = ours.get_peft_model(traced, ours.GraloraConfig(**fields))
    tensors = peft.get_peft_model_state_dict(theirs)
    assert ours.get_peft_model_state_dict(mine).keys() == tensors.keys()
    assert ours.set_peft_model_state_dict(mine, tensors) == ([], [])
    found = ours.get_peft_model_state_dict(mine, state_dict=mine.state_dict())
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    key = next(iter(tensors))
    with pytest.raises(CheckpointError, match=f"missing {key}"):
        ours.set_peft_model_state_dict(mine, {name: tensor for name, tensor in tensors.items() if name != key})


@pytest.mark.parametrize("method", ["GRALORA", "DORA"])
def test_lora_plus_gives_each_tensor_pefts_learning_rate(
    method: str, base: Path, traced: gralora_fx.TracedModel
) -> None:
    settings = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.01}
    rates = []
    for package, create in ((ours, create_loraplus_optimizer), (peft, pefts_loraplus)):
        fields: dict[str, Any] = {"r": 4, "target_modules": TARGETS}
        config = package.LoraConfig(use_dora=True, **fields) if method == "DORA" else package.GraloraConfig(**fields)
        source = traced if package is ours else AutoModelForCausalLM.from_pretrained(base)
        model = package.get_peft_model(source, config)
        names = {id(p): name.rpartition(".layers.")[2].replace(".default", "") for name, p in model.named_parameters()}
        groups = create(model, torch.optim.AdamW, **settings).param_groups
        rates.append({names[id(p)].removesuffix(".weight"): g["lr"] for g in groups for p in g["params"]})
    assert rates[0] == rates[1]
    assert set(rates[0].values()) == {1e-3, 16e-3}


def test_a_base_is_made_ready_for_training(base: Path) -> None:
    source = ours.prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    assert source.dtype == torch.float32
    assert not any(p.requires_grad for p in source.parameters())
    model = ours.get_peft_model(source, ours.LoraConfig(r=4, target_modules=TARGETS))
    assert model.is_gradient_checkpointing
    with pytest.raises(RewriteError, match="prepare the base, then call get_peft_model"):
        ours.prepare_model_for_kbit_training(model)
    with pytest.raises(RewriteError, match="has adapters already; add another one with add_adapter"):
        ours.get_peft_model(model, ours.LoraConfig(r=4, target_modules=TARGETS))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("inject_adapter_in_model", "call get_peft_model"),
        ("PeftMixedModel", "adapters of all methods"),
        ("IA3Config", "GraLoRA, LoRA, DoRA; train another one with peft itself"),
        ("get_eva_state_dict", "Import others from peft itself"),
    ],
)
def test_a_name_that_is_missing_says_what_to_do(name: str, remedy: str) -> None:
    with pytest.raises(ImportError, match=f"gralora_fx.peft has no {name}.*{remedy}"):
        getattr(ours, name)


def test_a_name_that_peft_has_not_either_is_as_of_any_module() -> None:
    assert not hasattr(ours, "pytest_plugins")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: ours.get_peft_model(m, c, mixed=True), "mixed=True is not needed"),
        (
            lambda m, c: ours.get_peft_model(tiny_model("llama").half(), c, autocast_adapter_dtype=False),
            "adapters .* are float32",
        ),
        (lambda m, c: ours.get_peft_model(m, peft.IA3Config(target_modules=TARGETS)), "'IA3'"),
        (lambda m, c: ours.get_peft_model(m, c).save_pretrained("x", save_embedding_layers=True), "modules_to_save"),
        (lambda m, c: ours.get_peft_model(m, c).load_adapter("x", key_mapping={"a": "b"}), "key_mapping"),
        (lambda m, c: ours.PeftModelForCausalLM(tiny_model("llama"), c), "call that"),
        (lambda m, c: ours.LoraConfig(ensure_weight_tying=True), "adapters that stay tied"),
        (
            lambda m, c: create_loraplus_optimizer(
                ours.get_peft_model(m, c), None, lr=1, loraplus_lr_ratio=2, loraplus_lr_embedding=1
            ),
            "adapters of embeddings",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_name(call: Any, message: str, traced: gralora_fx.TracedModel) -> None:
    with pytest.raises((ConfigError, RewriteError), match=message):
        call(traced, ours.GraloraConfig(r=4, target_modules=TARGETS))


# -- runs that go wrong -------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_stops_the_run_before_its_step(base: Path, tmp_path: Path) -> None:
    losses = iter([1.0, 1.0, 1.0, 1.0, float("nan")])

    class Unstable(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * next(losses)

    model = ours.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), ours.GraloraConfig(r=4, target_modules=TARGETS)
    )
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": 2, "logging_steps": 1}
    trainer = Unstable(
        model=model,
        args=TrainingArguments(str(tmp_path), per_device_train_batch_size=1, **settings),
        train_dataset=[{"input_ids": row, "labels": row} for row in [[5, 6, 7]] * 8],
        callbacks=[ours.StopAtNonFinite()],
    )
    with pytest.raises(
        CheckpointError, match=r"step 5: the gradient of .*gralora_.* of step 4\. .* from .*checkpoint-4"
    ):
        trainer.train()
    kept = ours.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "checkpoint-4")
    mine, theirs = ours.get_peft_model_state_dict(model), ours.get_peft_model_state_dict(kept)
    assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items())


def test_damaged_checkpoints_and_those_of_other_sizes_do_not_resume(base: Path, tmp_path: Path) -> None:
    model, trainer = script(ours, base, tmp_path, max_steps=2, save_steps=1)
    weights, config = (tmp_path / "checkpoint-1" / f"adapter_{name}" for name in ("model.safetensors", "config.json"))
    whole, fields = weights.read_bytes(), json.loads(config.read_text())
    before = ours.get_peft_model_state_dict(copy.deepcopy(model))
    for damaged, changed, message in (
        (whole[: len(whole) // 2], {}, r"checkpoint-1.adapter_model\.safetensors"),
        (whole, {"alpha": 32}, "alpha is 32 in .*, but the tensors were saved with 16"),
        (whole, {"target_modules": ["q_proj"]}, "unexpected|another configuration"),
    ):
        weights.write_bytes(damaged)
        config.write_text(json.dumps({**fields, **changed}))
        with pytest.raises((CheckpointError, ConfigError), match=message):
            trainer.train(resume_from_checkpoint=str(weights.parent))
    found = ours.get_peft_model_state_dict(model)
    assert all(torch.equal(found[key], tensor) for key, tensor in before.items())


def test_labels_and_inputs_that_do_not_fit_are_named(traced: gralora_fx.TracedModel) -> None:
    model = ours.get_peft_model(traced, ours.GraloraConfig(r=4, target_modules=TARGETS))
    labels = IDS.clone()
    labels[1, 2] = 500
    with pytest.raises(RewriteError, match=r"the label 500 at \[1, 2\] is none of the 101 classes"):
        model(input_ids=IDS, labels=labels)
    with pytest.raises(TraceError, match="input 'speaker' was not part of the trace, which takes input_ids"):
        model(input_ids=IDS, speaker=IDS)
