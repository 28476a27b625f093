"""TRL's SFTTrainer over a rewritten model: a setting that cannot work is refused by name, and the others train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import same_adapter
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from traces import fresh_trace
from transformers import Trainer

from gralora_fx import GraloraConfig, GraloraModel, rewrite
from gralora_fx.errors import RewriteError


@pytest.fixture
def model() -> GraloraModel:
    return rewrite(fresh_trace("llama", num_hidden_layers=1), GraloraConfig(r=4, target_modules="all-linear"))


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # TRL's name


# -- what TRL calls, without TRL ----------------------------------------------------------------------------------


def test_tags_are_kept_once_and_reach_the_card_that_peft_writes(model: GraloraModel, tmp_path: Path) -> None:
    assert model.model_tags is None
    model.add_model_tags(["trl", "sft"])
    model.add_model_tags("trl")
    assert model.model_tags == ["trl", "sft"]
    model.create_or_update_model_card(str(tmp_path))  # type: ignore[operator]  # PEFT's
    assert "\n- sft\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fused_lm_head": True}, r"class SFT\(SFTTrainer\): compute_loss = Trainer.compute_loss"),
        ({"cu_seq_lens_q": [0, 3]}, "set packing=False and padding_free=False"),
    ],
)
def test_arguments_of_trls_are_refused_with_what_to_set(
    model: GraloraModel, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RewriteError, match=message):
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False, **given)


# -- TRL itself ---------------------------------------------------------------------------------------------------


def _sft(model: Any, directory: Path, *, with_loss: bool = True, **settings: Any) -> Trainer:
    """TRL's trainer, with the loss of Trainer."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    members = {"compute_loss": Trainer.compute_loss} if with_loss else {}
    rows = [{"input_ids": [5 + (row * step) % 60 for step in range(4 + row % 3)]} for row in range(1, 9)]
    fixed = {"max_steps": 3, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return type("SFT", (trl.SFTTrainer,), members)(  # type: ignore[no-any-return]
        model=model,
        args=trl.SFTConfig(str(directory), learning_rate=1e-2, **{**fixed, **settings}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize(
    ("with_loss", "settings", "message"),
    [
        (False, {}, "compute_loss = Trainer.compute_loss"),
        (True, {"packing": True, "max_length": 16}, "set packing=False"),
        (True, {"padding_free": True, "max_length": None}, "padding_free=False"),
    ],
)
def test_what_sft_asks_for_by_default_is_refused_with_the_setting_to_change(
    model: GraloraModel, with_loss: bool, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RewriteError, match=message):
        _sft(model, tmp_path, with_loss=with_loss, **settings).train()


@pytest.mark.parametrize("checkpoints", [True, False])  # True is TRL's default
def test_sft_with_the_loss_of_trainer_trains_as_with_peft(checkpoints: bool, tmp_path: Path) -> None:
    ours, theirs = same_adapter(tiny_model("llama", num_hidden_layers=1), tmp_path / "adapter")
    losses = []
    for name, model in (("ours", ours), ("theirs", theirs)):
        trainer = _sft(model, tmp_path / name, gradient_checkpointing=checkpoints)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert ours.is_gradient_checkpointing is checkpoints
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    saved = GraloraModel.from_pretrained(ours.traced, tmp_path / "ours" / "checkpoint-3")
    same = [torch.equal(a, b) for a, b in zip(saved.state_dict().values(), ours.state_dict().values(), strict=True)]
    assert all(same)
