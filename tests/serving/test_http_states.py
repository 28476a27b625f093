"""A service over a hybrid of attention and states: 16 requests at once, 8 adapters, each answered as it is alone."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from running_service import post, running
from served_exports import CACHED, chat_tokenizer

from gralora_fx import GraloraConfig, LoraConfig, rewrite, trace
from gralora_fx.config.service_settings import ServiceSettings
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load
from gralora_fx.serving.http.app import create_app
from tests.architectures.tiny_decoders import tiny_decoder

ADAPTERS = [f"adapter{number}" for number in range(8)]
FIELDS = {"mamba_d_state": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
PROMPTS = [[5 + (7 * n + 3 * place) % 80 for place in range(1 + 5 * n % 23)] for n in range(16)]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid") / "onnx"
    traced = trace(tiny_decoder("FalconH1ForCausalLM", eos_token_id=2, **FIELDS), task=CACHED)
    found = sorted(
        {site.path for site in traced.sites if site.path.split(".")[-1] in ("in_proj", "q_proj", "out_proj")}
    )
    torch.manual_seed(0)
    config = GraloraConfig(r=4, gralora_k=2, target_modules=found, init_weights=False)
    model = rewrite(traced, config, adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.add_adapter(name, LoraConfig(r=4, target_modules=found, init_lora_weights=False, lora_alpha=16))
    model.set_adapter(ADAPTERS)
    export_onnx(model, folder, adapters="data", verify=False, tokenizer=chat_tokenizer())
    return folder


def test_each_answer_is_that_of_its_own_single_run(export: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load(export, threads=1), chat_tokenizer()
    names = [[None, *ADAPTERS][n % 9] for n in range(16)]
    pairs = zip(PROMPTS, names, strict=True)
    answers = [model.generate(prompt, max_new_tokens=8, adapter=name) for prompt, name in pairs]
    alone = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    assert len(set(alone)) > 4
    with caplog.at_level(logging.INFO), running(ServiceSettings(export, max_batch=6, chunk=5)) as (url, _):

        def answer(number: int) -> str:
            body = {"model": names[number] or "onnx", "prompt": PROMPTS[number], "max_tokens": 8, "temperature": 0}
            text: str = post(f"{url}v1/completions", body)["choices"][0]["text"]
            return text

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(answer, range(16))) == alone
    assert "no prefix cache: prefix_cache has no effect, since layers of the model keep states" in caplog.text
    assert "no speculation: layers of the model keep states, which cannot be set back" in caplog.text


def test_what_such_a_model_cannot_do_is_refused_where_it_is_asked_for(export: Path) -> None:
    with pytest.raises(ServingError, match="prefix_cache has no effect, since layers of the model keep states"):
        create_app(ServiceSettings(export, prefix_cache="64MiB"))
    with pytest.raises(ServingError, match="speculative_tokens has no effect: layers of the model keep states"):
        create_app(ServiceSettings(export, speculative_tokens=4))
