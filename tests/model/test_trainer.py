"""transformers' own Trainer over a rewritten model, unchanged and with its defaults: what it does with PEFT's model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from peft_oracle import same_adapter
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from transformers import PreTrainedModel, Trainer, TrainingArguments

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.core.model import model_class
from gralora_fx.errors import CheckpointError, RewriteError, TraceError

pytestmark = pytest.mark.usefixtures("own_garbage")

# one layer, and no dropout
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"n_layer": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1, "dropout_rate": 0.0, "decoder_start_token_id": 0},
}
# kind: (architecture, another head, task)
KINDS: dict[str, tuple[str, str | None, str | None]] = {
    "sequences": ("bert", None, None),
    "tokens": ("bert", "BertForTokenClassification", None),
    "answers": ("bert", "BertForQuestionAnswering", None),
    "text": ("gpt2", None, None),
    "cached text": ("llama", None, "text-generation-with-past"),
    "translation": ("t5", None, "text2text-generation-with-past"),
}


def source(kind: str, **overrides: Any) -> PreTrainedModel:
    name, head, _ = KINDS[kind]
    model = tiny_model(name, **{"num_labels": 2 if kind == "answers" else 4, **SIZES[name], **overrides})
    if head is None:
        return model
    torch.manual_seed(0)
    other: PreTrainedModel = getattr(transformers, head)(model.config)
    return other.eval()


def rows(kind: str, count: int = 12, length: int = 8) -> list[dict[str, Any]]:
    """Examples of unequal lengths, padded, with a column that no model takes."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for index in range(count):
        pad = index % 3
        ids = torch.randint(3, 100, (length - pad,), generator=generator).tolist()
        row: dict[str, Any] = {
            "input_ids": ids + [0] * pad,
            "attention_mask": [1] * len(ids) + [0] * pad,
            "title": 7,
        }
        padding = [-100] * pad
        row |= {
            "sequences": {"labels": ids[0] % 4},
            "tokens": {"labels": [token % 4 for token in ids] + padding},
            "answers": {"start_positions": 1 + index % 4, "end_positions": 5},
            "text": {"labels": ids + padding},
            "cached text": {"labels": ids + padding},
            "translation": {"labels": ids[: 4 - pad] + padding},
        }[kind]
        batches.append(row)
    return batches


def arguments(directory: Path, **fields: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **fields})


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[GraloraModel, peft.PeftModel]]:
    """Return copies of one pair of models for each kind, ours and PEFT's with the same adapter."""
    pairs: dict[str, tuple[GraloraModel, peft.PeftModel]] = {}

    def pair(kind: str) -> tuple[GraloraModel, peft.PeftModel]:
        if kind not in pairs:
            pairs[kind] = same_adapter(source(kind), tmp_path_factory.mktemp("adapter"), task=KINDS[kind][2])
        ours, theirs = pairs[kind]
        return copy.deepcopy(ours), copy.deepcopy(theirs)

    return pair


def trained(model: Any, directory: Path, kind: str, **fields: Any) -> Trainer:
    trainer = Trainer(
        model=model, args=arguments(directory, **fields), train_dataset=rows(kind), eval_dataset=rows(kind)[:5]
    )
    trainer.train()
    return trainer


# -- the defaults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_evaluation_and_prediction_are_pefts(kind: str, pair_of: Any, tmp_path: Path) -> None:
    ours, theirs = (
        trained(model, tmp_path / str(index), kind, eval_strategy="steps", eval_steps=2)
        for index, model in enumerate(pair_of(kind))
    )
    assert ours.label_names == theirs.label_names
    assert logged(ours) == pytest.approx(logged(theirs), rel=1e-4)
    assert logged(ours, "eval_loss") == pytest.approx(logged(theirs, "eval_loss"), rel=1e-4)
    mine, pefts = (trainer.predict(rows(kind)[:5]).predictions for trainer in (ours, theirs))
    for left, right in zip(*([p if isinstance(p, tuple) else (p,) for p in (mine, pefts)]), strict=True):
        is_text = torch.tensor([row["attention_mask"] for row in rows(kind)[:5]]).bool()
        kept = is_text if kind == "cached text" else slice(None)  # values at padding have no meaning
        assert torch.allclose(torch.tensor(left)[kept], torch.tensor(right)[kept], atol=1e-4)


# not GPT-2, whose class does not name its loss: transformers counts a label too many there, for PEFT's model too
@pytest.mark.parametrize("kind", ["tokens", "cached text", "translation"])
def test_accumulated_batches_are_one_large_batch(kind: str, pair_of: Any, tmp_path: Path) -> None:
    ours, _ = pair_of(kind)
    losses = []
    for batch, steps in ((12, 1), (3, 4)):
        kept = GradientKeeper()
        settings = {"max_steps": 1, "per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        trainer = Trainer(
            model=copy.deepcopy(ours),
            args=arguments(tmp_path, max_grad_norm=0.0, **settings),
            train_dataset=rows(kind),
            callbacks=[kept],
        )
        trainer.train()
        losses.append((kept.gradients, logged(trainer)))
    (large, loss), (accumulated, total) = losses
    assert total == pytest.approx(loss, rel=1e-5)
    for name, gradient in large.items():
        assert torch.allclose(accumulated[name], gradient, rtol=1e-4, atol=1e-6), name


class GradientKeeper(transformers.TrainerCallback):
    """Keeps the gradients of the last step."""

    gradients: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("problem", "labels"), [("regression", 1), ("multi_label_classification", 4)])
def test_losses_that_are_means_are_weighed_by_the_count(problem: str, labels: int) -> None:
    model = rewrite(
        trace(source("sequences", num_labels=labels, problem_type=problem)),
        GraloraConfig(r=4, target_modules=["query"]),
    )
    inputs = {"input_ids": torch.arange(12).reshape(4, 3) + 5, "labels": torch.rand(4, labels)}
    halves = [{name: value[half] for name, value in inputs.items()} for half in (slice(0, 1), slice(1, 4))]
    whole = model(**inputs).loss
    parts = [model(**half, num_items_in_batch=torch.tensor(4 * labels)).loss for half in halves]
    assert torch.allclose(sum(parts), whole)


def test_a_loss_that_takes_no_count_says_so(pair_of: Any) -> None:
    traced = pair_of("sequences")[0].traced
    traced = replace(
        traced, loss_function=lambda pooled_logits, labels: torch.nn.functional.cross_entropy(pooled_logits, labels)
    )
    model = rewrite(traced, GraloraConfig(r=4, target_modules=["query"]))
    assert not model.accepts_loss_kwargs
    with pytest.raises(RewriteError, match="takes no num_items_in_batch; leave it out"):
        model(torch.tensor([[5, 6]]), labels=torch.tensor([1]), num_items_in_batch=1)


@pytest.mark.parametrize("kind", ["sequences", "cached text", "translation"])
def test_label_smoothing_is_pefts(kind: str, pair_of: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    losses = []
    for model in pair_of(kind):
        examples, collator = rows(kind), None
        if kind == "translation":
            for row in examples:
                row["labels"] = [label for label in row["labels"] if label != -100]
            collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, max_steps=2, label_smoothing_factor=0.1),
            train_dataset=examples,
            data_collator=collator,
        )
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_generation_within_evaluation_is_pefts(pair_of: Any, tmp_path: Path) -> None:
    tokenizer, predictions = tiny_tokenizer(), []
    examples = [{n: row[n] for n in ("input_ids", "attention_mask", "labels")} for row in rows("translation")[::3]]
    for model in pair_of("translation"):
        settings = arguments(tmp_path, max_steps=1).to_dict()
        settings = {
            name: settings[name] for name in ("output_dir", "max_steps", "use_cpu", "report_to", "save_strategy")
        }
        trainer = transformers.Seq2SeqTrainer(
            model=model,
            args=transformers.Seq2SeqTrainingArguments(
                **settings, predict_with_generate=True, generation_max_length=6, disable_tqdm=True
            ),
            train_dataset=examples,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
            processing_class=tokenizer,
        )
        trainer.train()
        predictions.append(trainer.predict(examples).predictions.tolist())
    assert predictions[0] == predictions[1]


def test_text_collated_by_transformers(pair_of: Any, tmp_path: Path) -> None:
    losses = []
    for model in pair_of("cached text"):
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, max_steps=2, train_sampling_strategy="group_by_length"),
            train_dataset=[{"input_ids": row["input_ids"][: 5 + i % 3]} for i, row in enumerate(rows("text"))],
            data_collator=transformers.DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        )
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bfloat16_is_near_float32(pair_of: Any, tmp_path: Path) -> None:
    full, half = (trained(pair_of("sequences")[0], tmp_path, "sequences", bf16=bf16) for bf16 in (False, True))
    assert logged(half) == pytest.approx(logged(full), rel=0.03)
    assert logged(half) != logged(full)


def test_a_module_of_ones_own_trains_with_the_labels_of_its_forward(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(torch.relu(self.query(x)))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    sample = {"x": torch.randn(4, 8), "labels": torch.tensor([0, 1, 0, 1])}
    model = rewrite(trace(Net(), sample), GraloraConfig(r=4, target_modules=["query"]))
    data = [{"x": torch.full((8,), float(index)), "labels": index % 2} for index in range(8)]
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.label_names == ["labels"]
    assert trainer.evaluate()["eval_loss"] != before


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_adapters_two_files_and_training_resumes(pair_of: Any, tmp_path: Path) -> None:
    whole, _ = pair_of("sequences")
    want = trained(whole, tmp_path / "whole", "sequences", max_steps=6)
    half, again = pair_of("sequences")[0], pair_of("sequences")[0]
    trained(half, tmp_path / "run", "sequences", max_steps=6, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "run/checkpoint-3"
    weights = {file.name for file in checkpoint.iterdir() if file.suffix in (".safetensors", ".bin", ".json")}
    state = {"training_args.bin", "trainer_state.json"}
    assert weights - state == {"adapter_config.json", "adapter_model.safetensors"}
    trainer = Trainer(
        model=again, args=arguments(tmp_path / "run", max_steps=6, save_steps=3), train_dataset=rows("sequences")
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert logged(trainer) == logged(want)
    for (name, left), right in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_the_best_weights_are_loaded_and_peft_reads_what_is_saved(pair_of: Any, tmp_path: Path) -> None:
    model, _ = pair_of("sequences")
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trained(model, tmp_path / "run", "sequences", **settings, **best)
    first, last = logged(trainer, "eval_loss")
    assert first > last, "the best weights, by this measure, are not the last"
    assert trainer.evaluate()["eval_loss"] == first
    trainer.save_model(str(tmp_path / "out"))
    trainer.create_model_card()
    theirs = peft.PeftModel.from_pretrained(source("sequences"), str(tmp_path / "out")).eval()
    inputs = {name: torch.tensor([row[name] for row in rows("sequences")]) for name in ("input_ids", "attention_mask")}
    assert torch.allclose(model.eval()(**inputs).logits, theirs(**inputs).logits, atol=1e-5)


def test_an_adapter_of_another_name_resumes_from_its_folder(pair_of: Any, tmp_path: Path) -> None:
    traced = pair_of("sequences")[0].traced
    config = GraloraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"], init_weights=False)
    torch.manual_seed(0)
    model = rewrite(traced, config, adapter_name="news")
    trained(model, tmp_path, "sequences", save_strategy="steps", save_steps=2)
    assert {file.name for file in (tmp_path / "checkpoint-2/news").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    other = rewrite(traced, config, adapter_name="news")
    trainer = Trainer(model=other, args=arguments(tmp_path), train_dataset=rows("sequences"))
    trainer.train(resume_from_checkpoint=True)
    before = GraloraModel.from_pretrained(traced, tmp_path / "checkpoint-4/news")
    kept, loaded = model.adapter("news").named_parameters(), other.adapter("news").named_parameters()
    assert all(torch.equal(left, right) for (_, left), (_, right) in zip(kept, loaded, strict=True))
    assert before.active_adapters == ["default"]


def test_what_accelerate_gives_when_it_saves(pair_of: Any, tmp_path: Path) -> None:
    model, _ = pair_of("sequences")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    )
    accelerator.backward(prepared(torch.tensor([[5, 6]]), labels=torch.tensor([1])).loss)
    stale = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    unwrapped = accelerator.unwrap_model(prepared)
    options = {"is_main_process": accelerator.is_main_process, "save_function": accelerator.save}
    with pytest.raises(CheckpointError, match=r"other values of graph_module\.gralora\.default"):
        unwrapped.save_pretrained(tmp_path / "stale", state_dict=stale, **options)
    assert not (tmp_path / "stale").exists()
    unwrapped.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    unwrapped.save_pretrained(tmp_path / "kept", state_dict=accelerator.get_state_dict(prepared), **options)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in (tmp_path / "kept").iterdir()} == files
    with pytest.raises(CheckpointError, match="writes a pickle"):
        unwrapped.save_pretrained(tmp_path, safe_serialization=False)


# -- what a graph cannot do -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"every_n_layers": 2}])
def test_trainer_checkpoints_without_another_loss(options: Any, pair_of: Any, tmp_path: Path) -> None:
    plain = trained(pair_of("sequences")[0], tmp_path / "plain", "sequences")
    model = pair_of("sequences")[0]
    fields = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}
    again = trained(model, tmp_path / "checkpoints", "sequences", **fields)
    assert model.is_gradient_checkpointing
    assert logged(again) == logged(plain)


def test_noise_on_embeddings_is_refused(pair_of: Any, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"a hook on it would never run; .*neftune_noise_alpha"):
        trained(pair_of("sequences")[0], tmp_path, "sequences", neftune_noise_alpha=5.0)


def test_without_peft_labels_and_losses_are_found_all_the_same(
    monkeypatch: pytest.MonkeyPatch, pair_of: Any, tmp_path: Path
) -> None:
    traces = {kind: pair_of(kind)[0].traced for kind in ("answers", "sequences")}
    monkeypatch.setattr(model_class, "_peft_model", lambda: None)
    monkeypatch.setattr(transformers.trainer, "_is_peft_model", lambda _: False)
    monkeypatch.setattr(transformers.trainer_utils, "is_peft_available", lambda *_: False)
    for kind, labels in (("answers", ["start_positions", "end_positions"]), ("sequences", ["labels"])):
        model = rewrite(traces[kind], GraloraConfig(r=4, target_modules=["query"]))
        assert not isinstance(model, peft.PeftModel)
        trainer = trained(model, tmp_path, kind, max_steps=1)
        assert trainer.label_names == labels
        assert trainer.model_accepts_loss_kwargs
        assert "eval_loss" in trainer.evaluate()
