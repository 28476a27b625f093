"""Activated adapters as data of an export: the base reads what is before them, and they answer as PEFT's aLoRA."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from made_once import made_once
from peft_oracle import peft_model
from served_exports import CACHED, LLAMA, chat_tokenizer, greedy
from tiny_models import tiny_model
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, rewrite
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.run.engine.adapters import NotInvokedError
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.sessions.adapter_file import AdapterInMemory
from gralora_fx.serving import load

CALL = [7, 8]
PROMPTS = {  # by where the invocation is
    "in the middle": [11, 12, 13, 14, 15, 16, *CALL, 17, 18],
    "at the end": [21, 22, 23, 24, 25, *CALL],
    "twice": [31, 32, *CALL, 33, 34, 35, 36, *CALL, 37],
    "at the beginning": [*CALL, 41, 42, 43],
    "after one token": [51, *CALL, 52],
}
FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"}


def oracle() -> peft.PeftModel:
    """PEFT's model with the adapter."""
    return peft_model(
        tiny_model("llama", **LLAMA), 3, method="LORA", **FIELDS, alora_invocation_tokens=CALL, task_type="CAUSAL_LM"
    )


def adapted(folder: Path, task: str | None = CACHED) -> GraloraModel:
    """Return a model with PEFT's adapter, a GraLoRA that is activated by other tokens, and a plain LoRA."""
    oracle().save_pretrained(str(folder / "peft"))
    model = GraloraModel.from_pretrained(
        fresh_trace("llama", task=task, **LLAMA), folder / "peft", adapter_name="judge"
    )
    sizes: dict[str, Any] = {"r": 4, "alpha": 32, "init_weights": False, "target_modules": "all-linear"}
    model.add_adapter("guide", GraloraConfig(**sizes, gralora_k=2, alora_invocation_tokens=[9]))
    model.add_adapter("plain", LoraConfig(**FIELDS, init_lora_weights=False))
    model.set_adapter(["judge", "guide", "plain"])
    return model


def make_export(folder: Path) -> None:
    model = adapted(folder)
    report = export_onnx(model, folder / "export", adapters="data", tokenizer=chat_tokenizer())
    assert report.verification is not None
    assert report.verification.passed
    for name in model.active_adapters:
        model.save_pretrained(folder / "saved", [name])


@pytest.fixture
def export(tmp_path: Path) -> Path:
    shutil.copytree(made_once("activated", make_export), tmp_path, dirs_exist_ok=True)
    return tmp_path / "export"


@functools.cache
def expected(place: str, count: int = 6) -> list[int]:
    return greedy(oracle(), PROMPTS[place], count)


def read(decoder: Decoder, row: int, prompt: list[int], chunk: int) -> np.ndarray[Any, Any]:
    """Return the logits after a prompt that a row reads in pieces."""
    for at in range(0, len(prompt), chunk):
        logits = decoder.step({row: prompt[at : at + chunk]})[row]
    return logits


@pytest.mark.parametrize("place", PROMPTS)
def test_answers_are_pefts(export: Path, place: str) -> None:
    model, prompt = load(export), PROMPTS[place]
    assert model.generate(prompt, adapter="judge", max_new_tokens=6) == expected(place)
    assert model.generate(prompt, max_new_tokens=6) == greedy(tiny_model("llama", **LLAMA), prompt, 6)


def test_prompts_with_other_adapters_are_answered_together(export: Path) -> None:
    model = load(export)
    prompts = [*PROMPTS.values(), [61, 62, 9, 63], [71, 72, 73]]
    names = [*["judge"] * len(PROMPTS), "guide", "plain"]
    together = model.generate(prompts, adapter=names, max_new_tokens=6)
    assert together[: len(PROMPTS)] == [expected(place) for place in PROMPTS]
    alone = [
        model.generate(prompt, adapter=name, max_new_tokens=6) for prompt, name in zip(prompts, names, strict=True)
    ]
    assert together == alone


def test_logits_are_those_of_the_graph_and_a_cut_changes_no_bit_of_what_others_read(export: Path) -> None:
    decoder, prompt = load(export).decoder(rows=3, capacity=32, chunk=16), PROMPTS["in the middle"]
    start = decoder.start_of("judge", prompt)
    assert start == 6
    row, other = decoder.open("judge", start=start), decoder.open("plain")
    beside = decoder.step({row: prompt, other: [5, 6, 7, 8]})
    single = decoder.open()
    decoder.close(row)
    decoder.close(other)
    alone, plain = decoder.open("judge", start=start), decoder.open("plain")
    assert np.array_equal(decoder.step({alone: prompt})[alone], beside[row])
    assert np.array_equal(decoder.step({plain: [5, 6, 7, 8]})[plain], beside[other])
    decoder.step({single: prompt[:6]})
    before = {name: value[:, :6].copy() for name, value in decoder.cached(single).items()}  # type: ignore[attr-defined]
    of_row = decoder.cached(alone)  # type: ignore[attr-defined]
    assert all(np.array_equal(of_row[name][:, :6], value) for name, value in before.items())  # the base's, bit for bit
    logits = oracle()(input_ids=torch.tensor([prompt])).logits[0, -1].detach().numpy()
    assert np.abs(beside[row] - logits).max() < 1e-5 * max(1.0, np.abs(logits).max())


def test_logits_of_several_tokens_are_theirs_where_the_adapter_begins_between_them(export: Path) -> None:
    decoder, prompt = load(export).decoder(rows=2, capacity=32, chunk=16), PROMPTS["in the middle"]
    at_once, apart = (decoder.open("judge", start=6) for _ in range(2))
    each = [decoder.step({apart: [token]})[apart] for token in prompt]
    for count in (2, 6, len(prompt)):
        logits = decoder.step({at_once: prompt}, {at_once: count})[at_once]
        decoder.rewind(at_once, 0)
        assert np.allclose(logits, each[-count:], atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 4, 5])
def test_a_prompt_in_pieces_begins_where_it_does_at_once(export: Path, chunk: int) -> None:
    decoder, prompt = load(export).decoder(rows=2, capacity=32, chunk=chunk), PROMPTS["twice"]
    row = decoder.open("judge", start=decoder.start_of("judge", prompt))
    logits = oracle()(input_ids=torch.tensor([prompt])).logits[0, -1].detach().numpy()
    assert np.abs(read(decoder, row, prompt, chunk) - logits).max() < 1e-5 * max(1.0, np.abs(logits).max())


def test_rows_that_run_one_after_the_other_answer_alike(export: Path) -> None:
    (export / "model_rows.onnx").unlink()
    path = export / "gralora_export.json"
    fields = json.loads(path.read_text())
    fields["rows"] = {"file": None, "reason": "of this test"}
    del fields["files"]["model_rows.onnx"]
    path.write_text(json.dumps(fields))
    model = load(export)
    assert "Sequential" in type(model.decoder(rows=1)).__name__
    for place in ("in the middle", "after one token"):
        assert model.generate(PROMPTS[place], adapter="judge", max_new_tokens=6) == expected(place)


def test_an_adapter_is_added_to_an_export_of_before(tmp_path: Path) -> None:
    traced = fresh_trace("llama", task=CACHED, **LLAMA)
    plain = rewrite(traced, LoraConfig(**FIELDS))
    export_onnx(plain, tmp_path / "export", adapters="data", verify=False)
    oracle().save_pretrained(str(tmp_path / "peft"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the base's name
        export_adapter(tmp_path / "peft", tmp_path / "export", "judge")
    answer = load(tmp_path / "export").generate(PROMPTS["twice"], adapter="judge", max_new_tokens=6)
    assert answer == expected("twice")


def test_what_cannot_be_is_refused_by_name(export: Path) -> None:
    model = load(export)
    config = export.parent / "peft" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "alora_invocation_tokens": [7, 4000]}))
    with pytest.raises(
        ExportError, match="of which 4000 is outside the export's vocabulary of 101 tokens; give the id"
    ):
        export_adapter(config.parent, export, "unknown")
    with pytest.raises(
        NotInvokedError, match=r"adapter 'judge' acts from its tokens \[7, 8\] on, and the prompt lacks"
    ):
        model.generate([11, 7, 12, 8], adapter="judge", max_new_tokens=2)
    for refused in (
        lambda: model(input_ids=np.array([[7, 8]]), adapter="judge"),
        lambda: model.decoder(rows=1).open("judge"),
        lambda: model.mix_adapters("sum", {"judge": 1.0, "plain": 1.0}),
    ):
        with pytest.raises(ServingError, match=r"adapter 'judge' acts only on its tokens \[7, 8\] and what follows"):
            refused()
    judge = model.adapters["judge"]
    record = dataclasses.replace(judge.record, config={**judge.record.config, "alora_invocation_tokens": [-1]})
    with pytest.raises(ServingError, match=r"the record of adapter 'damaged': alora_invocation_tokens must hold"):
        model.load_adapter("damaged", AdapterInMemory(record, judge.tensors))
    assert "damaged" not in model.adapters
    with pytest.raises(ServingError, match="start is how many tokens"):
        model.decoder(rows=1).open("judge", start=-1)


def test_an_export_that_cannot_have_one_says_why(tmp_path: Path) -> None:
    model = adapted(tmp_path, task=None)
    with pytest.raises(ExportError, match="'judge' is activated by tokens, which needs a decoder with a cache"):
        export_onnx(model, tmp_path / "export", adapters="data")
    cached = rewrite(
        fresh_trace("llama", task=CACHED, **LLAMA),
        LoraConfig(**FIELDS, alora_invocation_tokens=CALL, modules_to_save=["lm_head"]),
    )
    with pytest.raises(ExportError, match="trains parameters of the base whole"):
        export_onnx(cached, tmp_path / "export", adapters="data")
