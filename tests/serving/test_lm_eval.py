"""lm-evaluation-harness over HTTP: log-likelihoods, likeliest answers and written ones as of transformers and PEFT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from client_environments import ROOT, run_client
from example_checkpoint import copy_checkpoint
from running_service import running
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gralora_fx import GraloraModel, trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx

PERPLEXITY = {"output_type": "loglikelihood_rolling", "doc_to_text": '""', "metric_list": "[{metric: word_perplexity}]"}
WRITTEN = {
    "output_type": "generate_until",
    "metric_list": "[{metric: exact_match}]",
    "generation_kwargs": "{until: [x], max_gen_toks: 48}",
}
TARGET = {"doc_to_target": '"The capital of {{country}} is {{choices[answer]}}"'}


def write_tasks(folder: Path) -> None:
    """Write the files of docs/lm-eval.md, and two tasks of other kinds about the same data."""
    page = (ROOT / "docs" / "lm-eval.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^`(capitals\.\w+)`\n\n```\w+\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    for name, text in files.items():
        (folder / name).write_text(text)
    for name, fields in {"perplexity": PERPLEXITY | TARGET, "written": WRITTEN | TARGET}.items():
        kept = [
            line
            for line in files["capitals.yaml"].splitlines()
            if not line.startswith((*fields, "task:", "doc_to_choice:", "  -"))
        ]
        lines = [f"task: {name}", *kept, *(f"{field}: {value}" for field, value in fields.items())]
        (folder / f"{name}.yaml").write_text("\n".join(lines))


class Oracle:
    """transformers' or PEFT's model: the scores of tokens after others."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def loglikelihood(self, known: list[int], ids: list[int]) -> tuple[float, bool]:
        """Return the sum of the log-probabilities of tokens after known ones, and whether each is the likeliest."""
        rows = self.model(input_ids=torch.tensor([known + ids])).logits[0, len(known) - 1 : -1].log_softmax(-1)
        return float(rows[range(len(ids)), ids].sum()), rows.argmax(-1).tolist() == ids

    def expected(self, arguments: list[Any]) -> Any:
        """Return the results of a task, by the arguments of its request."""
        if len(arguments) == 1:
            return self.loglikelihood([self.tokenizer.eos_token_id], self.ids(arguments[0]))[0]
        known = self.ids(arguments[0])
        if isinstance(arguments[1], str):
            return self.loglikelihood(known, self.ids("".join(arguments))[len(known) :])
        given = torch.tensor([known])
        written = self.model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=48, do_sample=False
        )
        text = self.tokenizer.decode(written[0, len(known) :], skip_special_tokens=True)
        return text.split("x")[0]


def test_lm_eval(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint"
    copy_checkpoint(tmp_path_factory, saved)
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    adapted = GraloraModel.from_pretrained(trace(base, task="text-generation-with-past"), saved / "adapter")
    onnx, tasks = tmp_path / "onnx", tmp_path / "tasks"
    export_onnx(adapted, onnx, adapters="data", logits="all", tokenizer=saved / "base", verify=False)
    tasks.mkdir()
    write_tasks(tasks)
    with running(ServiceSettings(onnx)) as (url, _):
        found = run_client("lm_eval", url, str(onnx), str(tasks), "onnx", "default")
    tokenizer = AutoTokenizer.from_pretrained(onnx)
    assert [found[name]["accuracy"] for name in ("onnx", "default")] == [0.25, 1]
    for name in ("onnx", "default"):
        oracle = Oracle(base if name == "onnx" else peft.PeftModel.from_pretrained(base, saved / "adapter"), tokenizer)
        assert len(found[name]["scores"]) == 8 * (4 + 1 + 1)
        for arguments, score in found[name]["scores"]:
            expected = oracle.expected(arguments)
            if isinstance(expected, tuple):
                assert score == [pytest.approx(expected[0], abs=1e-4), expected[1]], arguments
            else:
                assert score == (expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-4)), (
                    arguments
                )
