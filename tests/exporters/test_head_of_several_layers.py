"""A saved head that is a module of several layers, where all biases train, folded into files without the model."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from peft_oracle import peft_model, perturb_saved_modules
from safetensors import safe_open
from tiny_models import text_batch, tiny_model
from traces import fresh_trace
from transformers import RobertaForSequenceClassification

from gralora_fx.exporters import export_onnx, fold_onnx, merge_checkpoint
from gralora_fx.serving import load

REPEATED = "base_model.model.classifier.original_module.dense.bias"


def saved_adapter(directory: Path) -> peft.PeftModel:
    """Return an adapter of the tiny RoBERTa; PEFT repeats the base's values of its head in the file."""
    wrapped = peft_model(tiny_model("roberta"), target_modules=["query"], task_type="SEQ_CLS", bias="all", r=8)
    perturb_saved_modules(wrapped)
    wrapped.save_pretrained(str(directory))
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert REPEATED in keys, "PEFT no longer repeats it, so this test has lost its subject"
    return wrapped.eval()


def test_it_is_merged_into_files_and_folded_into_an_export(tmp_path: Path) -> None:
    theirs, batch = saved_adapter(tmp_path / "adapter"), text_batch()
    tiny_model("roberta").save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    export_onnx(fresh_trace("roberta"), tmp_path / "onnx", verify=False)
    fold_onnx(tmp_path / "onnx", tmp_path / "adapter", tmp_path / "folded")
    with torch.no_grad():
        expected = theirs(**batch).logits
        merged = RobertaForSequenceClassification.from_pretrained(tmp_path / "merged").eval()(**batch).logits
    for logits in (merged, load(tmp_path / "folded")(**batch).logits):
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
