"""An answer depends on no prompt beside it: windows, ALiBi, chunks, tokens of padding, and what the service batches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peft_oracle import peft_model
from running_service import post, running
from served_exports import CACHED, chat_tokenizer

from gralora_fx import GraloraModel, TracedModel, trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import OrtModel, load
from tests.architectures.decoder_check import ANSWER, alone
from tests.architectures.tiny_decoders import tiny_decoder

ADAPTER, NEW, END = "one", ANSWER, 2
# prompts that differ in length by more than a window, by less, and not at all
PROMPTS = [[5 + (7 * row + 3 * place) % 80 for place in range(size)] for row, size in enumerate((19, 4, 9, 4, 6))]
WINDOWED = ("MistralForCausalLM", {"sliding_window": 8})
KINDS = {
    "a window, merged": (*WINDOWED, "merged"),
    "a window, adapters as data": (*WINDOWED, "data"),
    "ALiBi, merged": ("MptForCausalLM", {}, "merged"),
    "ALiBi, adapters as data": ("MptForCausalLM", {}, "data"),
}


def expected(model: Any, served: OrtModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return transformers' answers to prompts, each read alone."""
    return [alone(model, prompt, served.limits.ends)[0] for prompt in prompts]


@functools.cache
def traced_once(name: str, *fields: tuple[str, int]) -> TracedModel:
    return trace(tiny_decoder(name, **dict(fields)), task=CACHED)


class Exported:
    """An export with an adapter, and PEFT's model of it."""

    def __init__(self, kind: str, folder: Path) -> None:
        name, fields, mode = KINDS[kind]
        self.oracle = peft_model(
            tiny_decoder(name, **fields), 1, r=4, gralora_k=2, alpha=32, target_modules="all-linear"
        )
        self.oracle.save_pretrained(str(folder / ADAPTER))
        traced = copy.deepcopy(traced_once(name, *fields.items()))
        model = GraloraModel.from_pretrained(traced, folder / ADAPTER, adapter_name=ADAPTER)
        self.path, self.adapter = folder / "onnx", None if mode == "merged" else ADAPTER
        export_onnx(model, self.path, adapters=mode, verify=False, tokenizer=chat_tokenizer())  # type: ignore[arg-type]
        self.model = load(self.path, threads=1)

    def expected(self) -> list[list[int]]:
        """Return transformers' answers to the prompts, each read alone."""
        return expected(self.oracle, self.model, PROMPTS)

    def answer(self, prompts: Any, **options: Any) -> Any:
        return self.model.generate(prompts, adapter=self.adapter, **options)


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp("neighbours"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported("a window, merged", tmp_path_factory.mktemp("windowed"))


def test_together_alone_and_transformers_agree(exported: Exported) -> None:
    reference = exported.expected()
    assert exported.answer(PROMPTS, max_new_tokens=NEW) == reference
    assert [exported.answer(prompt, max_new_tokens=NEW) for prompt in PROMPTS] == reference


def test_the_service_answers_each_as_if_it_were_alone(exported: Exported) -> None:
    tokenizer = chat_tokenizer()
    with running(ServiceSettings(exported.path, max_batch=8)) as (url, _):

        def answer(prompt: list[int], **options: Any) -> list[str]:
            body = {"model": exported.adapter or exported.path.name, "prompt": prompt, "max_tokens": NEW, **options}
            return [choice["text"] for choice in post(f"{url}v1/completions", body)["choices"]]

        drawn = {"seed": 4, "n": 2}
        reference = [[tokenizer.decode(ids, skip_special_tokens=True)] for ids in exported.expected()]
        drawn_alone = [answer(prompt, **drawn) for prompt in PROMPTS]
        with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
            found = [pool.submit(answer, prompt, temperature=0) for prompt in PROMPTS]
            drawn_together = [pool.submit(answer, prompt, **drawn) for prompt in PROMPTS]
            assert [each.result() for each in found] == reference
            assert [each.result() for each in drawn_together] == drawn_alone


def test_draws_scores_and_pieces_are_those_of_each_prompt_alone(windowed: Exported) -> None:
    options = {"do_sample": True, "max_new_tokens": NEW, "logprobs": 2}
    together = windowed.answer(PROMPTS, seed=5, **options)
    pieces = list(windowed.answer(PROMPTS, seed=5, stream=True, **options))
    for row, prompt in enumerate(PROMPTS):
        alone = windowed.answer(prompt, seed=5 + row, **options)
        assert together[row].content == alone.content
        scores = [[score.logprob for score in answer.scores] for answer in (together[row], alone)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        assert [token for piece in pieces for token in piece[row].content] == alone.content


def test_scores_of_experts_have_the_digits_of_each_prompt_alone(tmp_path: Path) -> None:
    """Six experts a token: the sum of their weights is no multiple of what is added at once."""
    model = tiny_decoder("MixtralForCausalLM", num_local_experts=16, num_experts_per_tok=6)
    export_onnx(trace(model, task=CACHED), tmp_path / "onnx", verify=False)
    served = load(tmp_path / "onnx", threads=2)
    together = served.generate(PROMPTS, max_new_tokens=NEW, logprobs=2)
    for answer, prompt in zip(together, PROMPTS, strict=True):
        assert answer.scores == served.generate(prompt, max_new_tokens=NEW, logprobs=2).scores


def test_rows_go_on_after_another_has_ended(windowed: Exported) -> None:
    whole = [windowed.answer(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    ends = [END, whole[0][2], whole[3][5]]
    together = windowed.answer(PROMPTS, max_new_tokens=NEW, eos_token_id=ends)
    cut = [answer[: next((at for at, t in enumerate(answer) if t in ends), None)] for answer in whole]
    assert together == cut
    assert len({*map(len, cut)}) > 1


def test_an_answer_has_as_many_tokens_as_its_own_prompt_leaves(windowed: Exported) -> None:
    context = windowed.model.limits.context
    prompts = [[7] * (context - 3), [8, 9]]
    together = windowed.answer(prompts)
    assert together == [windowed.answer(prompt) for prompt in prompts]
    assert len(together[0]) <= 3


def test_tokens_of_padding_in_a_prompt_are_tokens(tmp_path: Path) -> None:
    model = tiny_decoder("LlamaForCausalLM")
    export_onnx(trace(model, task=CACHED), tmp_path / "onnx", verify=False)
    served = load(tmp_path / "onnx", threads=1)
    last = served.limits.vocabulary - 1  # what pads rows
    prompts = [*PROMPTS, [5, last, last], [last], [5, END, END], [8, 0, 0], [last, 6]]
    assert served.generate(prompts, max_new_tokens=NEW) == expected(model, served, prompts)


@pytest.mark.parametrize("name", ["BartForCausalLM", "GPTNeoForCausalLM"])
def test_other_models_that_count_positions_themselves(tmp_path: Path, name: str) -> None:
    model = tiny_decoder(name)
    export_onnx(trace(model, task=CACHED), tmp_path / "onnx", verify=False)
    served = load(tmp_path / "onnx", threads=1)
    assert served.generate(PROMPTS, max_new_tokens=NEW) == expected(model, served, PROMPTS)
