"""Exports to serve, each with two adapters that PEFT saved, and PEFT's models of them by adapter."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from made_once import made_once
from peft_oracle import peft_model
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from traces import fresh_trace
from transformers import PreTrainedTokenizerBase

from gralora_fx import GraloraModel
from gralora_fx.exporters import export_onnx

ADAPTERS = ("small", "wide")
CACHED = "text-generation-with-past"
END = 2
LLAMA: dict[str, Any] = {"eos_token_id": END, "bos_token_id": 1, "pad_token_id": 0}
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tiny tokenizer with a template for chats."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def adapted(
    name: str, folder: Path, task: str | None = None, targets: Any = "all-linear", **sizes: Any
) -> tuple[GraloraModel, dict[str | None, Any]]:
    """Return a model with both adapters active, and the oracles by adapter; None is the base."""
    oracles = _oracles(name, targets, **sizes)
    for adapter in ADAPTERS:
        oracles[adapter].save_pretrained(str(folder / adapter))
    traced = fresh_trace(name, task=task, **sizes)
    model = GraloraModel.from_pretrained(traced, folder / "small", adapter_name="small")
    model.load_adapter(folder / "wide", "wide")
    model.set_adapter(list(ADAPTERS))
    return model, oracles


def _oracles(name: str, targets: Any = "all-linear", **sizes: Any) -> dict[str | None, Any]:
    oracles: dict[str | None, Any] = {None: tiny_model(name, **sizes)}
    for seed, (adapter, rank) in enumerate(zip(ADAPTERS, (2, 6), strict=True)):
        fields = {"r": rank, "gralora_k": 2, "alpha": 32, "target_modules": targets}
        oracles[adapter] = peft_model(tiny_model(name, **sizes), seed + 1, **fields)
    return oracles


def decoders(folder: Path, *modes: Any) -> tuple[dict[str, Path], dict[str | None, Any]]:
    """Return copies of exports of a tiny Llama by how they hold adapters, beside both adapters, and the oracles."""
    for mode in modes:
        made = made_once(f"decoder-{mode}", functools.partial(_export_decoder, mode))
        shutil.copytree(made, folder, dirs_exist_ok=True)
    return {mode: folder / mode for mode in modes}, _oracles("llama", **LLAMA)


def _export_decoder(mode: Any, folder: Path) -> None:
    model, _ = adapted("llama", folder, CACHED, **LLAMA)
    export_onnx(model, folder / mode, adapters=mode, verify=False, tokenizer=chat_tokenizer())


def greedy(oracle: Any, prompt: list[int], count: int) -> list[int]:
    """Return the tokens of transformers' `generate`, without the end token."""
    ids = torch.tensor([prompt])
    new = oracle.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    tokens = new[0, len(prompt) :].tolist()
    return tokens[: tokens.index(END)] if END in tokens else tokens
