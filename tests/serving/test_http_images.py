"""Images in chats and responses: each answer is that of the prompt with what its images put in place of tokens."""

from __future__ import annotations

import base64
import itertools
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_images import damaged_files, encoded, huge_files, other_files, picture, whole_files
from PIL import Image
from served_exports import ADAPTERS, END, adapted
from starlette.testclient import TestClient
from tiny_image_processors import tiny_processor
from tiny_tokenizers import tiny_tokenizer

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ConfigError, ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.images.image_limits import ServedImages
from gralora_fx.features.images.request_images import RequestImages
from gralora_fx.run.engine.session_decoders import RowsDecoder
from gralora_fx.service import engines
from gralora_fx.service.app import create_app
from gralora_fx.serving import load
from tests.architectures.image_prompts import tiny_image_model

TASK = "image-text-to-text-with-past"
PLACE = 9  # the token that stands for an image
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{{ '*' if part['type'] == 'image' else "
    "part['text'] }}{% endfor %} {% endfor %}{% if tools %}{{ tools | length }}{% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


class Prompts:
    """Stands in for what reads pixels: the embeddings of an image's tokens are drawn by its pixels."""

    def __init__(self, tokenizer: Any, embeddings: torch.nn.Embedding) -> None:
        """Take the model's own embeddings."""
        self.tokenizer, self.embeddings = tokenizer, embeddings
        self.seen: list[tuple[str, list[Image.Image], str | None]] = []

    def read_one(
        self, prompt: Any, images: Sequence[Image.Image], adapter: str | None, described: Sequence[Any] = ()
    ) -> tuple[list[int], Any]:
        """Return the ids of a chat, and the embeddings of all of them."""
        text = self.tokenizer.apply_chat_template(prompt, list(described), add_generation_prompt=True, tokenize=False)
        self.seen.append((text, list(images), adapter))
        pieces = [self.tokenizer(piece)["input_ids"] for piece in text.split("*")]
        ids, drawn = list(pieces[0]), []
        for image, piece in zip(images, pieces[1:], strict=True):
            place, count = len(ids), 2 + image.width % 3
            ids += [PLACE] * count + piece
            seed = zlib.crc32(image.tobytes()) + count
            values = torch.randn(count, self.embeddings.embedding_dim, generator=torch.Generator().manual_seed(seed))
            drawn.append((slice(place, place + count), values * self.embeddings.weight.detach().std()))
        with torch.no_grad():
            embeds = self.embeddings(torch.tensor([ids])).clone()
        for places, values in drawn:
            embeds[0, places] = values
        return ids, {"inputs_embeds": embeds.numpy()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Any]]:
    """Return an export that takes embeddings, with two adapters as data, and PEFT's models of them."""
    folder = tmp_path_factory.mktemp("images")
    ids = {"eos_token_id": END, "bos_token_id": 1, "pad_token_id": 0}
    model, oracles = adapted("llama", folder, TASK, max_position_embeddings=128, **ids)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    export_onnx(model, folder / "export", adapters="data", verify=False, tokenizer=tokenizer)
    return folder / "export", oracles


@pytest.fixture(scope="module")
def prompts(exported: tuple[Path, dict[str | None, Any]]) -> Prompts:
    tokenizer = load(exported[0]).tokenizer
    return Prompts(tokenizer, exported[1][None].get_input_embeddings())


@pytest.fixture(scope="module")
def http(exported: tuple[Path, dict[str | None, Any]], prompts: Prompts) -> Iterator[TestClient]:
    """Yield a service of the export whose images the stand-in reads."""
    with pytest.MonkeyPatch.context() as patches:

        def reader(settings: ServiceSettings, _: Any) -> RequestImages:
            return RequestImages(prompts, prompts.tokenizer, settings.part(ServedImages))

        patches.setattr(engines, "_attachment_reader", reader)
        app = create_app(ServiceSettings(exported[0], max_batch=4, more=(ServedImages(max_images=3),)))
    with TestClient(app) as client:
        yield client


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


SMALL, WIDE = url(encoded(picture(), "PNG")), url(encoded(picture(size=(60, 9)), "JPEG"), "jpeg")


def content(*urls: str, text: str = "What is it?") -> list[dict[str, Any]]:
    """Return the parts of a message, images first."""
    return [*({"type": "image_url", "image_url": {"url": each}} for each in urls), {"type": "text", "text": text}]


def chat(*urls: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "See."}, {"role": "user", "content": content(*urls)}]
    return {"model": "export", "messages": messages, "max_tokens": 9, "temperature": 0, **fields}


def answer(http: TestClient, body: Any, path: str = CHAT) -> dict[str, Any]:
    found = http.post(path, json=body)
    assert found.status_code == 200, found.text
    return found.json()


def scores_of(found: dict[str, Any]) -> list[float]:
    return [token["logprob"] for token in found["choices"][0]["logprobs"]["content"]]


def text_of(found: dict[str, Any]) -> str:
    return str(found["choices"][0]["message"]["content"])


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_an_answer_is_that_of_the_embeddings(
    adapter: str | None, http: TestClient, exported: tuple[Path, dict[str | None, Any]], prompts: Prompts
) -> None:
    path, oracles = exported
    found = answer(http, chat(SMALL, WIDE, model=adapter or "export"))
    text, images, seen = prompts.seen[-1]
    assert text == "system: See. user: **What is it? assistant: "
    assert (seen is None) == (adapter is None)
    assert [image.size for image in images] == [(31, 17), (60, 9)]
    assert np.array_equal(np.asarray(images[0]), np.asarray(picture()))
    ids, given = prompts.read_one(
        [
            {"role": "system", "content": [{"type": "text", "text": "See."}]},
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}],
            },
        ],
        images,
        adapter,
    )
    expected = load(path).generate(ids, inputs_embeds=given["inputs_embeds"][0], max_new_tokens=9, adapter=adapter)
    embeds = torch.from_numpy(given["inputs_embeds"])
    new = oracles[adapter].generate(inputs_embeds=embeds, max_new_tokens=9, do_sample=False)[0].tolist()
    assert expected == [token for token in new if token != END]
    assert text_of(found) == prompts.tokenizer.decode(expected, skip_special_tokens=True)
    assert found["usage"]["prompt_tokens"] == len(ids)
    assert ids.count(PLACE) >= 5


def test_other_images_give_other_answers_and_the_order_counts(http: TestClient) -> None:
    several = ((), (SMALL,), (WIDE,), (SMALL, WIDE), (WIDE, SMALL))
    scores = [scores_of(answer(http, chat(*urls, logprobs=True, max_tokens=2))) for urls in several]
    assert len(set(map(tuple, scores))) == len(several)


def test_rows_with_and_without_images_share_steps_and_answer_as_alone(
    http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [
        chat(*urls, model=model, max_tokens=16, ignore_eos=True, logprobs=True)
        for urls, model in itertools.product(((), (SMALL,), (WIDE, SMALL)), ("export", *ADAPTERS))
    ]
    alone = [scores_of(answer(http, body)) for body in bodies]
    counts: list[int] = []
    step = RowsDecoder.step

    def counted(self: Any, tokens: Any, last: Any = None) -> Any:
        counts.append(len(tokens))
        return step(self, tokens, last)

    monkeypatch.setattr(RowsDecoder, "step", counted)
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = [scores_of(found) for found in pool.map(lambda body: answer(http, body), bodies)]
    assert together == alone
    assert max(counts) > 1


def test_responses_and_streams_answer_alike(http: TestClient) -> None:
    expected = answer(http, chat(SMALL, n=2))
    parts = [
        {"type": "input_image", "image_url": SMALL, "detail": "low"},
        {"type": "input_text", "text": "What is it?"},
    ]
    body = {"model": "export", "instructions": "See.", "input": [{"role": "user", "content": parts}], "temperature": 0}
    found = answer(http, {**body, "max_output_tokens": 9}, RESPONSES)
    assert found["output"][0]["content"][0]["text"] == text_of(expected)
    assert found["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert expected["choices"][1]["message"]["content"] == text_of(expected)
    detailed = chat(SMALL, stream=True)
    detailed["messages"][1]["content"][0]["image_url"]["detail"] = "high"
    pieces = http.post(CHAT, json=detailed).text
    assert pieces.rstrip().endswith("[DONE]")


def test_texts_of_a_template_that_writes_parts_alone_are_written(http: TestClient) -> None:
    found = answer(http, chat())
    assert found["usage"]["prompt_tokens"] == len("system: See. user: What is it? assistant: ")


def test_tools_are_described_beside_images(http: TestClient, prompts: Prompts) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("look", "listen")]
    answer(http, chat(SMALL, tools=tools, max_tokens=3))
    assert prompts.seen[-1][0] == "system: See. user: *What is it? 2assistant: "


def test_results_of_tools_are_written_for_a_template_of_parts_that_knows_no_tools(
    exported: tuple[Path, dict[str | None, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "export"
    shutil.copytree(exported[0], path)
    template = path / "chat_template.jinja"
    known = "{% if tools %}{{ tools | length }}{% endif %}"
    template.write_text(template.read_text().replace(known, f"{{#{'.' * (len(known) - 4)}#}}"))  # as long
    tokenizer = load(path).tokenizer
    prompts = Prompts(tokenizer, exported[1][None].get_input_embeddings())
    reader = RequestImages(prompts, tokenizer, ServedImages())
    monkeypatch.setattr(engines, "_attachment_reader", lambda *_: reader)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "ok"}]
    with TestClient(create_app(ServiceSettings(path))) as client:
        lengths = []
        for urls in ((SMALL,), ()):
            asked = [{"role": "user", "content": content(*urls, text="?")}, *said]
            found = answer(client, {"model": "export", "messages": asked, "max_tokens": 1})
            lengths.append(found["usage"]["prompt_tokens"])
    text = prompts.seen[-1][0]
    assert "f: ok" in text
    assert lengths == [len(text) - 1 + 2 + picture().width % 3, len(text) - 1]


def test_odd_uploads_are_each_answered_or_refused_in_a_line_and_disturb_nothing(http: TestClient) -> None:
    expected = text_of(answer(http, chat()))
    uploads = [*other_files(), *huge_files(), *itertools.islice(damaged_files(), 0, None, 3)]
    uploads += itertools.islice(whole_files(), 0, None, 9)
    refused = 0
    for name, data in uploads:
        found = http.post(CHAT, json=chat(SMALL, url(data), max_tokens=1))
        if found.status_code == 200:
            continue
        assert found.status_code == 400, name
        error = found.json()["error"]
        assert error["param"] == "messages.1.content.1.image_url.url"
        assert error["message"].startswith("messages.1.content.1.image_url.url: the image ")
        assert "\n" not in error["message"]
        refused += 1
    assert 60 < refused < len(uploads)
    assert text_of(answer(http, chat())) == expected


@pytest.mark.parametrize(
    ("parts", "field", "text"),
    [
        (content("https://example.org/a.png"), "messages.0.content.0.image_url.url", "--allow-image-host example.org"),
        (content("/etc/passwd"), "messages.0.content.0.image_url.url", "is '/etc/passwd'; give a data: URL"),
        (content("file:///etc/passwd"), "messages.0.content.0.image_url.url", "give a data: URL"),
        (content(*[SMALL] * 4), "messages", "there are 4 images, more than 3; give fewer"),
        ([{"type": "image_url"}], "messages.0.content.0.image_url", "image_url is missing or null"),
        ([{"type": "text", "text": "a", "image_url": {"url": SMALL}}], "messages.0.content.0.image_url", "has none"),
        ([{"type": "image_url", "image_url": {"url": SMALL}, "text": "a"}], "messages.0.content.0.text", "has none"),
        (
            [{"type": "image_url", "image_url": {"url": SMALL, "file_id": "f"}}],
            "messages.0.content.0.image_url.file_id",
            "file_id is not supported",
        ),
        ([{"type": "image", "path": "/etc/passwd"}], "messages.0.content.0.type", "'text' or 'image_url'"),
        ([{"type": "file", "file_id": "f"}], "messages.0.content.0.type", "'text' or 'image_url'"),
        ([{"type": "video_url"}], "messages.0.content.0.type", "'text' or 'image_url'"),
    ],
)
def test_what_is_no_image_of_a_chat_is_named(http: TestClient, parts: Any, field: str, text: str) -> None:
    found = http.post(CHAT, json={"model": "export", "messages": [{"role": "user", "content": parts}]})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == field
    assert text in found.json()["error"]["message"]


def test_messages_of_others_have_no_images_and_responses_name_their_fields(http: TestClient) -> None:
    for role in ("system", "assistant"):
        found = http.post(CHAT, json=chat() | {"messages": [{"role": role, "content": content(SMALL)}]})
        assert found.json()["error"]["param"] == "messages.0.content"
        assert f"a message of the role {role} has no images" in found.json()["error"]["message"]
    for part, field in (
        ({"type": "input_image", "file_id": "file-1"}, "input.0.content.0.file_id"),
        ({"type": "input_image"}, "input.0.content.0.image_url"),
        ({"type": "input_image", "image_url": "ftp://a/b"}, "input.0.content.0.image_url"),
        ({"type": "input_file", "file_url": "https://a"}, "input.0.content.0.type"),
    ):
        body = {"model": "export", "input": [{"role": "user", "content": [part]}]}
        found = http.post(RESPONSES, json=body)
        assert found.status_code == 400
        assert found.json()["error"]["param"] == field


def test_a_model_of_texts_refuses_images_by_name_and_their_options(
    exported: tuple[Path, dict[str | None, Any]],
) -> None:
    with TestClient(create_app(ServiceSettings(exported[0]))) as client:
        error = client.post(CHAT, json=chat(SMALL)).json()["error"]
        assert error["param"] == "messages.1.content.0.image_url.url"
        assert error["message"].endswith("this model reads text alone; leave it out")
    with pytest.raises(ServingError, match=r"^max_images has no effect on this export, for image-text-to-text-with-pa"):
        create_app(ServiceSettings(exported[0], more=(ServedImages(max_images=2),)))


@pytest.mark.parametrize("host", ["", "https://a.org", "a.org/b", "user@a.org", "a org", "a.org:port"])
def test_hosts_are_names_as_in_urls(host: str) -> None:
    with pytest.raises(ConfigError, match=r"allow_image_host must be the name of a host as in a URL"):
        ServedImages(allow_image_host=("example.org", host))
    ServedImages(allow_image_host=("Example.org", "10.0.0.5:9000", "[::1]:80", "localhost"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Return an export of a tiny model with what reads its pixels, the model and its processor."""
    model = tiny_image_model("Qwen2_5_VLForConditionalGeneration")
    processor, path = tiny_processor(model), tmp_path_factory.mktemp("whole") / "export"
    export_onnx(trace(model, task=TASK), path, tokenizer=processor, verify=False)
    return path, model, processor


def test_a_whole_model_answers_over_http_and_in_python_as_transformers_does(whole: tuple[Path, Any, Any]) -> None:
    path, model, processor = whole
    image = picture(size=(64, 48))
    seen = url(encoded(image, "PNG"))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "This?"}]},
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "image", "image": picture()}]},
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(new, skip_special_tokens=True)
    served = load(path)
    assert served.generate(messages, max_new_tokens=8) == expected
    assert served.generate([messages, "a"], max_new_tokens=8)[0] == expected
    with pytest.raises(ServingError, match=r"images are in the chat, and given beside it too"):
        served.generate(messages, images=[image], max_new_tokens=8)
    asked = [
        {"role": "user", "content": content(seen, text="What?")},
        {"role": "assistant", "content": "This?"},
        {"role": "user", "content": content(SMALL, text="And")[::-1]},
    ]
    body = {"model": "export", "messages": asked, "max_tokens": 8, "temperature": 0}
    with TestClient(create_app(ServiceSettings(path))) as client:
        found = answer(client, body)
        assert text_of(found) == expected
        assert found["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
        asked[0]["content"] = content(WIDE, text="What?")
        assert text_of(answer(client, body)) != expected
