"""Adapters that PEFT saved over a resized vocabulary: it writes the embeddings beside them, trained or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from gralora_fx import GraloraModel, LoraConfig, TracedModel, merge, rewrite, trace
from gralora_fx.errors import CheckpointError, ExportError
from gralora_fx.exporters import export_adapter, export_onnx, fold_onnx, merge_checkpoint
from gralora_fx.run.sessions.session import open_session

pytestmark = pytest.mark.filterwarnings("ignore:.*values of its own for")
ADDED = 3  # tokens
TARGETS = ["q_proj", "v_proj"]
LOGITS = 1e-6  # rounding of a folded weight, of logits up to 1


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, an adapter over it with more tokens, its own base, and another with as many."""
    root = tmp_path_factory.mktemp("resized")
    model: Any = tiny_model("llama")
    model.config.tie_word_embeddings = request.param
    model.tie_weights()
    model.save_pretrained(root / "base")
    config = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = peft.get_peft_model(_resized(root / "base", seed=0), peft.LoraConfig(**config))
    adapted.save_pretrained(root / "adapter")
    adapted.unload().save_pretrained(root / "own")
    _resized(root / "base", seed=1).save_pretrained(root / "other")
    return root


def _resized(directory: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(model.config.vocab_size + ADDED, mean_resizing=False)
    return model


def _traced(directory: Path) -> TracedModel:
    return trace(AutoModelForCausalLM.from_pretrained(directory).eval(), task="text-generation")


def _ids(directory: Path) -> Tensor:
    """Return a text with each of the added tokens."""
    size = AutoModelForCausalLM.from_pretrained(directory).config.vocab_size
    return torch.tensor([[1, *range(size - ADDED, size), 5]])


def _of_peft(root: Path, base: str) -> Tensor:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / base), root / "adapter").eval()
    with torch.no_grad():
        logits: Tensor = model(_ids(root / base)).logits
    return logits


@pytest.mark.parametrize("base", ["own", "other"])
def test_logits_are_pefts_whichever_values_the_new_tokens_have_in_the_base(saved: Path, base: str) -> None:
    model = GraloraModel.from_pretrained(_traced(saved / base), saved / "adapter")
    expected = _of_peft(saved, base)
    for each in (model, merge(model)):
        torch.testing.assert_close(each(input_ids=_ids(saved / base))["logits"], expected, rtol=0, atol=LOGITS)
    before = AutoModelForCausalLM.from_pretrained(saved / base)(_ids(saved / base)).logits
    assert (expected - before).abs().max() > 100 * LOGITS


def test_embeddings_that_are_not_the_bases_are_named(saved: Path) -> None:
    with pytest.warns(UserWarning, match=r"values of its own for .*model\.embed_tokens.* over a resized vocabulary"):
        model = GraloraModel.from_pretrained(_traced(saved / "other"), saved / "adapter")
    assert model.adapter("default").config.modules_to_save is not None
    same = GraloraModel.from_pretrained(_traced(saved / "own"), saved / "adapter")
    assert same.adapter("default").config.modules_to_save is None


@pytest.mark.parametrize("base", ["own", "other"])
def test_merged_files_and_exports_hold_the_adapters_embeddings(saved: Path, base: str, tmp_path: Path) -> None:
    report = merge_checkpoint(saved / base, saved / "adapter", tmp_path / "merged")
    assert bool(report.replaced) == (base == "other")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = _of_peft(saved, base)
    torch.testing.assert_close(merged(_ids(saved / base)).logits, expected, rtol=0, atol=LOGITS)
    export_onnx(_traced(saved / base), tmp_path / "onnx", verify=False)
    fold_onnx(tmp_path / "onnx", saved / "adapter", tmp_path / "folded")
    ids = _ids(saved / base).numpy()
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (logits,) = open_session(tmp_path / "folded").run(["logits"], feed)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_an_export_with_adapters_as_data_takes_it_only_over_its_own_embeddings(
    saved: Path, quantize: Any, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS)
    for base in ("own", "other"):
        options: Any = {"adapters": "data", "quantize": quantize, "verify": False}
        export_onnx(rewrite(_traced(saved / base), config), tmp_path / base, **options)
    assert export_adapter(saved / "adapter", tmp_path / "own", "new").is_file()
    with pytest.raises(ExportError, match=r"values of its own for .*weight.* export the base that the adapter was"):
        export_adapter(saved / "adapter", tmp_path / "other", "new")


def test_a_base_with_fewer_tokens_is_refused_with_their_number(saved: Path, tmp_path: Path) -> None:
    size = len(load_file(saved / "base" / "model.safetensors")["model.embed_tokens.weight"])
    export_onnx(
        rewrite(_traced(saved / "base"), LoraConfig(r=4, target_modules=TARGETS)),
        tmp_path / "onnx",
        adapters="data",
        verify=False,
    )
    message = rf"of {size + ADDED} tokens, and the base's has {size}.*\(resize_token_embeddings\)"
    for load in (
        lambda: GraloraModel.from_pretrained(_traced(saved / "base"), saved / "adapter"),
        lambda: merge_checkpoint(saved / "base", saved / "adapter", tmp_path / "merged"),
        lambda: export_adapter(saved / "adapter", tmp_path / "onnx", "new"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load()
    assert not (tmp_path / "merged").exists()
