"""Images over HTTP for encoder-decoders: of pixels alone, and within the prompt of an encoder of texts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import torch
from made_once import made_once
from odd_images import encoded
from running_service import running
from tiny_image_processors import drawn_image
from transformers import AutoProcessor

from gralora_fx import GraloraModel, trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.features.images.image_limits import ServedImages
from gralora_fx.serving import OrtModel, load
from tests.serving.test_http_images import url
from tests.tiny_pixel_writers import (
    tiny_captioner,
    tiny_captioners_processor,
    tiny_florence,
    tiny_florence_processor,
    tiny_pixel_writer,
    tiny_writers_processor,
)

_NEW = 6
_IMAGES = [drawn_image(70, 50), drawn_image(40, 90, seed=1)]
_URLS = [url(encoded(image, "PNG")) for image in _IMAGES]
_MODELS: dict[str, tuple[Any, Any, list[str], list[str]]] = {  # with layers to adapt, and prompts
    "captioner": (tiny_captioner, tiny_captioners_processor, ["qkv", "query"], ["", "HI"]),
    "donut": (lambda: tiny_pixel_writer("donut"), lambda: tiny_writers_processor("donut"), ["q_proj"], ["", "HI"]),
    "florence": (tiny_florence, tiny_florence_processor, ["qkv", "q_proj"], ["", "<CAPTION>", "What is it?"]),
}


def _exported(name: str, path: Path) -> None:
    model, processor, layers, _ = _MODELS[name]
    adapted = peft.get_peft_model(model(), peft.GraloraConfig(r=8, gralora_k=2, alpha=32, target_modules=layers))
    torch.manual_seed(3)
    for key, value in adapted.named_parameters():
        if "gralora" in key:
            torch.nn.init.normal_(value.data, std=0.3)
    adapted.save_pretrained(str(path / "adapter"))
    source = trace(model(), task="image-to-text-with-past")
    rewritten = GraloraModel.from_pretrained(source, path / "adapter", adapter_name="own")
    export_onnx(rewritten, path / "data", adapters="data", tokenizer=processor(), verify=False)


Served = tuple[str, OrtModel, openai.OpenAI, Path]


@pytest.fixture(scope="module", params=_MODELS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Yield the name of a model, its export opened beside its service, a client of that, and the export's directory."""
    name = request.param
    path = made_once(f"{name}-of-http", lambda folder: _exported(name, folder)) / "data"
    with running(ServiceSettings(path, max_batch=4)) as (address, _):
        client = openai.OpenAI(base_url=f"{address}v1", api_key="none", timeout=60, max_retries=0)
        yield name, load(path), client, path


def _message(*urls: str, text: str = "") -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": each}} for each in urls]
    return [{"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}]


def _asked(client: openai.OpenAI, model: str, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=messages, max_tokens=_NEW, temperature=0, logprobs=True, **options
    )


def _told(found: Any) -> tuple[str, list[float]]:
    (choice,) = found.choices
    return choice.message.content, [token.logprob for token in choice.logprobs.content]


def test_each_row_is_answered_as_by_generate_with_its_image_prompt_and_adapter(served: Served) -> None:
    name, model, client, path = served
    cases = [(image, text, own) for text in _MODELS[name][3] for image in (0, 1) for own in (None, "own")]
    wanted = [
        model.generate(text, images=_IMAGES[image], adapter=own, max_new_tokens=_NEW, logprobs=0)
        for image, text, own in cases
    ]
    expected = [(each.content, [score.logprob for score in each.scores]) for each in wanted]
    assert len({text for text, _ in expected}) > 3

    def ask(case: tuple[int, str, str | None]) -> Any:
        image, text, own = case
        return _asked(client, own or path.name, _message(_URLS[image], text=text))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, cases))
    for each, (text, scores), case in zip(found, expected, cases, strict=True):
        assert _told(each) == (text, scores), case
        assert each.usage.prompt_tokens == _count(name, path, case[1])


def _count(name: str, path: Path, text: str) -> int:
    """Count the tokens that transformers' `generate` reads: the beginning of an answer, or the encoder's prompt."""
    processor = AutoProcessor.from_pretrained(path)
    if name == "florence":
        return len(processor(images=[[_IMAGES[0]]], text=[text]).input_ids[0])
    own = processor.tokenizer(text, add_special_tokens=False).input_ids
    return len(own) if own and name == "donut" else 1 + len(own)


def test_responses_and_streams_have_the_same_answer(served: Served) -> None:
    name, _, client, path = served
    text = _MODELS[name][3][-1]
    expected = _asked(client, path.name, _message(_URLS[0], text=text))
    parts = [{"type": "input_image", "image_url": _URLS[0], "detail": "auto"}, {"type": "input_text", "text": text}]
    asked: list[Any] = [{"role": "user", "content": parts}]
    options = {"model": path.name, "temperature": 0, "max_output_tokens": _NEW}
    answered = client.responses.create(input=asked, **options)
    assert (answered.output_text, answered.usage.input_tokens) == (
        _told(expected)[0],
        expected.usage.prompt_tokens,
    )
    pieces = _asked(client, path.name, _message(_URLS[0], text=text), stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == _told(expected)[0]


@pytest.mark.parametrize("served", ["florence"], indirect=True)
def test_an_encoder_of_texts_answers_a_text_alone(served: Served) -> None:
    _, model, client, path = served
    expected = model.generate("HI", max_new_tokens=_NEW)
    answered = client.completions.create(model=path.name, prompt="HI", max_tokens=_NEW, temperature=0)
    assert answered.choices[0].text == expected
    assert _told(_asked(client, path.name, _message(text="HI")))[0] == expected


@pytest.mark.parametrize("served", ["captioner"], indirect=True)
def test_a_text_alone_is_refused_by_an_encoder_of_pixels(served: Served) -> None:
    _, _, client, path = served
    problem = "the model reads an image, and the request has none; send one in the message of a chat"
    with pytest.raises(openai.BadRequestError, match=problem) as failed:
        client.completions.create(model=path.name, prompt="HI")
    assert failed.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match=problem) as failed:
        _asked(client, path.name, _message(text="HI"))
    assert failed.value.param == "messages"


def test_more_than_a_message_with_an_image_is_refused(served: Served) -> None:
    _, _, client, path = served
    with pytest.raises(openai.BadRequestError, match="reads one image for an answer, and the request has 2") as failed:
        _asked(client, path.name, _message(*_URLS))
    assert failed.value.param == "messages.0.content.1.image_url.url"
    several = [*_message(_URLS[0]), {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(
        openai.BadRequestError, match="one message of the role user, and the chat has the roles user, assistant, user"
    ):
        _asked(client, path.name, several)
    with pytest.raises(openai.BadRequestError, match=r"image_url\.url: the image is damaged or cut off"):
        _asked(client, path.name, _message(url(encoded(_IMAGES[0], "PNG")[:200])))


@pytest.mark.parametrize("served", ["captioner"], indirect=True)
def test_bounds_of_images_are_those_of_the_service(served: Served) -> None:
    path = served[-1]
    with running(ServiceSettings(path, more=(ServedImages(max_image_pixels=3_499),))) as (address, _):
        client = openai.OpenAI(base_url=f"{address}v1", api_key="none", timeout=60, max_retries=0)
        with pytest.raises(openai.BadRequestError, match="the image is 70 x 50 pixels, more than 3,499; make it small"):
            _asked(client, path.name, _message(_URLS[0]))
