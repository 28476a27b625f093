"""Requests that share prompts, in random order; every answer is compared with that of its prompt alone.

Adapters are replaced meanwhile, requests given up, and the prefix cache is too small for all.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft_oracle import peft_model
from served_exports import CACHED, END, adapted, chat_tokenizer
from tiny_models import tiny_model

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.adapter_export import convert_adapter
from gralora_fx.run.engine.limits import part_length
from gralora_fx.run.generate.answer_options import AnswerOptions, Sampling
from gralora_fx.run.generate.completion import TextRequest
from gralora_fx.service.adapter_store.store import AdapterStore
from gralora_fx.service.scheduling.continuous import ContinuousScheduler
from gralora_fx.service.scheduling.queue import Observer
from gralora_fx.serving import load
from tests.architectures.tiny_decoders import tiny_decoder

ADAPTERS, VERSIONS, CONTEXT, CHUNK = 8, 2, 192, 16
LIMIT = 200_000  # bytes, about nine blocks
CALLS = {number: [90 + number, 95] for number in range(ADAPTERS) if number % 4 == 1}  # of the adapters of every method
HYBRID_ADAPTERS = [f"adapter{number}" for number in range(ADAPTERS)]
SIZES: dict[str, Any] = {
    "eos_token_id": END,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "max_position_embeddings": CONTEXT,
}


def made(folder: Path) -> tuple[Path, list[list[Path]]]:
    """Return an export of a tiny Llama, and for each of some adapters the files of its versions."""
    model, _ = adapted("llama", folder, CACHED, **SIZES)
    export_onnx(model, folder / "onnx", adapters="data", verify=False, tokenizer=chat_tokenizer())
    files = []
    for number in range(ADAPTERS):
        files.append([])
        for version in range(VERSIONS):
            name = f"a{number}-{version}"
            fields = {"r": 2 + 2 * (number % 3), "gralora_k": 2, "alpha": 32, "target_modules": "all-linear"}
            peft_model(tiny_model("llama", **SIZES), 10 + number * VERSIONS + version, **fields).save_pretrained(
                str(folder / name)
            )
            files[-1].append(convert_adapter(folder / name, folder / "onnx", folder, name))
    return folder / "onnx", files


def made_mixed(folder: Path) -> tuple[Path, list[list[Path]], Mapping[int, list[int]]]:
    """Return an export that takes DoRA, files of adapters of every method, and the tokens from which some of them act.

    The versions of an adapter differ in method too: what one of them has in a layer, the next must not find there.
    """
    shared: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = {"method": "LORA", "r": 4, "lora_alpha": 32}
    methods: tuple[dict[str, Any], ...] = (
        lora,
        {"method": "DORA", "r": 4, "lora_alpha": 16},
        {"r": 4, "gralora_k": 2, "alpha": 32},
        {"method": "DORA", "r": 2, "lora_alpha": 16},
    )
    saved(tiny_model("llama", **SIZES), folder / "first", 3, **shared, **methods[1])
    model = GraloraModel.from_pretrained(trace(tiny_model("llama", **SIZES), task=CACHED), folder / "first")
    export_onnx(model, folder / "onnx", adapters="data", verify=False, tokenizer=chat_tokenizer(), overwrite=True)
    for number in range(ADAPTERS):
        for version in range(VERSIONS):
            name, fields = f"a{number}-{version}", methods[(number + version) % len(methods)]
            if number in CALLS:
                fields = {**lora, "alora_invocation_tokens": CALLS[number]}
            saved(tiny_model("llama", **SIZES), folder / name, 10 + number * VERSIONS + version, **shared, **fields)
            convert_adapter(folder / name, folder / "onnx", folder, name)
    return mixed(folder)


def mixed(folder: Path) -> tuple[Path, list[list[Path]], Mapping[int, list[int]]]:
    """Read what `made_mixed` made in a folder."""
    files = [
        [folder / "adapters" / f"a{number}-{version}.onnx_adapter" for version in range(VERSIONS)]
        for number in range(ADAPTERS)
    ]
    return folder / "onnx", files, CALLS


def saved(model: Any, directory: Path, seed: int, **fields: Any) -> Any:
    """PEFT's model, with magnitudes that moved as in training, and its checkpoint in a directory."""
    wrapped = peft_model(model, seed, **fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(str(directory))
    return wrapped


def made_hybrid(folder: Path) -> tuple[Path, list[list[Path]]]:
    """Return an export of a tiny Falcon-H1, with states beside keys and values, and each adapter's versions."""
    sizes = {"mamba_d_state": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
    model = tiny_decoder("FalconH1ForCausalLM", eos_token_id=END, max_position_embeddings=CONTEXT, **sizes)
    traced = trace(model, task=CACHED)
    found = sorted(
        {site.path for site in traced.sites if site.path.split(".")[-1] in ("in_proj", "q_proj", "out_proj")}
    )
    torch.manual_seed(0)
    config = GraloraConfig(r=4, gralora_k=2, target_modules=found, init_weights=False)
    rewritten = rewrite(traced, config, adapter_name=HYBRID_ADAPTERS[0])
    for name in HYBRID_ADAPTERS[1:]:
        rewritten.add_adapter(name, LoraConfig(r=4, target_modules=found, init_lora_weights=False, lora_alpha=16))
    rewritten.set_adapter(HYBRID_ADAPTERS)
    export_onnx(rewritten, folder / "onnx", adapters="data", verify=False, tokenizer=chat_tokenizer())
    return folder / "onnx", hybrid_files(folder / "onnx")


def hybrid_files(export: Path) -> list[list[Path]]:
    """Return for each adapter of `made_hybrid` its file and that of the next, which replaces it."""
    files = [export / "adapters" / f"{name}.onnx_adapter" for name in HYBRID_ADAPTERS]
    return [[file, files[number - 1]] for number, file in enumerate(files)]


class Counts(Observer):
    """Keeps what the scheduler tells.

    Attributes:
        read: How many tokens of prompts were read.
        generated: How many tokens were chosen.
        found: How many tokens of prompts were in the cache.
    """

    def __init__(self) -> None:
        self.read_tokens = self.new = self.found = self.failures = 0

    def read(self, tokens: int) -> None:
        self.read_tokens += tokens

    def looked_up(self, tokens: int, found: int) -> None:
        self.found += found

    def generated(self, tokens: int) -> None:
        self.new += tokens

    def proposed(self, tokens: int, accepted: int) -> None:
        pass

    def failed(self) -> None:
        self.failures += 1


class Interleavings:
    """A scheduler with a prefix cache, whose turns are taken here, and the same model without one.

    Attributes:
        counts: What the scheduler told.
        cache: The prefix cache.
        answers: How many answers were compared.
        wrong: Of which a token was another one.
        reloads: How many adapters were replaced.
        given_up: How many requests were given up while they waited or ran.
        most: The most bytes that the cache took.
    """

    def __init__(
        self,
        export: Path,
        files: list[list[Path]],
        calls: Mapping[int, list[int]] = MappingProxyType({}),
        *,
        seed: int = 0,
        limit: int = LIMIT,
    ) -> None:
        self._random, self._files, self._calls = random.Random(seed), files, calls
        model, self._alone = load(export, threads=1), load(export, threads=1)
        for number, versions in enumerate(files):
            for version, file in enumerate(versions):
                self._alone.load_adapter(f"a{number}-{version}", file)
        self._cold = self._alone.decoder(rows=1, chunk=CHUNK)
        self._models = AdapterStore("base", model)
        self._versions = dict.fromkeys(range(len(files)), 0)
        for number in self._versions:
            self._load(number)
        decoder = model.decoder(rows=3, chunk=CHUNK, prefix_cache=limit)
        assert decoder.prefix_cache is not None
        self.cache, self.counts = decoder.prefix_cache, Counts()
        self._scheduler = ContinuousScheduler(decoder, chat_tokenizer(), self.counts, max_queue=16, models=self._models)
        self._texts = [(number - 1, self._tokens(self._random.randrange(1, 120))) for number in range(6)]
        self._known: dict[Any, list[int]] = {}
        self.answers = self.wrong = self.reloads = self.given_up = self.most = 0

    def run(self) -> None:
        """One interleaving: some requests that join, run and leave in random order."""
        jobs: list[tuple[Any, int, str | None, TextRequest]] = []
        to_ask = self._random.randrange(2, 7)
        while to_ask or self._scheduler.in_flight:
            action = self._random.random()
            if action < 0.01:
                self._reload()
            elif jobs and action < 0.04:
                job = self._random.choice(jobs)[0]
                self.given_up += not (job.is_done or job.is_cancelled)
                job.cancel()
            elif to_ask and action < 0.4:
                to_ask -= 1
                jobs.append(self._ask())
            elif self._scheduler.in_flight:
                self._scheduler._turn()
                self.most = max(self.most, self.cache.size)
        for job, number, version, request in jobs:
            if not job.is_cancelled:
                answer = self._answer(version, request)
                self.answers += 1
                self.wrong += job.answer.ids != answer
                # what later prompts go on from, as the next turn of a chat does
                place = self._random.randrange(len(self._texts))
                self._texts[place] = number, [*request.prompt, *answer][: CONTEXT - 40]

    def _ask(self) -> tuple[Any, int, str | None, TextRequest]:
        number, text = self._random.choice(self._texts)
        prompt = text[: self._random.randrange(1, len(text) + 1)] if self._random.random() < 0.3 else text
        prompt = (prompt + self._tokens(self._random.randrange(0, 12)))[: CONTEXT - 20] or [5]
        if self._random.random() < 0.2:
            number = self._random.randrange(-1, len(self._files))
        if number in self._calls:
            prompt = [*prompt[:-8], *self._calls[number], *self._tokens(self._random.randrange(0, 6))]
        count = self._random.randrange(1, 12)
        draws = {"do_sample": True, "seed": self._random.randrange(100)} if self._random.random() < 0.3 else {}
        salt = self._random.choice([None, None, "a"])
        held = self._models.hold_named(f"a{number}")
        key = None if held is None else held.key
        request = TextRequest(tuple(prompt), count, AnswerOptions(Sampling(**draws), salt=salt), adapter=key)
        (job,) = self._scheduler.submit([(request, lambda _: None)])
        self._models.release(key)
        return job, number, None if number < 0 else f"a{number}-{self._versions[number]}", request

    def _reload(self) -> None:
        number = self._random.randrange(len(self._files))
        self._versions[number] = (self._versions[number] + 1) % VERSIONS
        self._load(number)
        self.reloads += 1

    def _load(self, number: int) -> None:
        file = self._files[number][self._versions[number]]

        def load_it() -> None:
            name = f"a{number}"
            version = self._models.add(name, file, lambda _: None, None)
            self._models.give_name(version)
            self._models.release(version.key)

        self._models.change(load_it).result(20)

    def _answer(self, version: str | None, request: TextRequest) -> list[int]:
        """Return the tokens of an answer to a prompt alone, read cold."""
        key = version, request.prompt, request.max_new_tokens, request.options.sampling.seed
        if key not in self._known:
            start, left = self._cold.start_of(version, request.prompt), list(request.prompt)
            row, before = self._cold.open(version, start=start), start or 0
            chooser, ends = request.chooser(frozenset({END})), frozenset({END})
            while left:
                count = part_length(len(left), CHUNK, before)
                logits = self._cold.step({row: left[:count]})[row]
                left, before = left[count:], before - count
            ids: list[int] = []
            while (token := chooser(logits).token) not in ends:
                ids.append(token)
                if len(ids) == request.max_new_tokens:
                    break
                logits = self._cold.step({row: [token]})[row]
            self._cold.close(row)
            self._known[key] = ids
        return self._known[key]

    def check(self, answers: int) -> None:
        """Every answer was as alone, more than so many were given, and all that may disturb one has happened."""
        assert self.wrong == 0
        assert self.answers > answers
        assert min(self.reloads, self.given_up, self.cache.evictions, self.counts.found) > 0
        assert self.most <= self.cache.limit
        assert self.counts.failures == 0

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(3, 96) for _ in range(count)]
