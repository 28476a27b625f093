"""Teach a vision-language model to read digits: PEFT trains an adapter, the model is exported, and answers over HTTP.

Everything is made here: a small LLaVA with random weights, and digits that Pillow draws in many sizes and places. The
adapter changes the projector and the decoder; the tower stays as it is drawn. Two cores take a minute and a half:

    pip install -e '.[serve,train,vision]'
    python examples/read_digits.py --output runs/digits
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import peft
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from gralora_fx import GraloraModel, trace
from gralora_fx.exporters import export_onnx

SIDE = 32  # of an image, in pixels
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "Which", "digit", "?", *map(str, range(10))]
QUESTION = "Which digit ?"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)
ADAPTED = r".*(multi_modal_projector|language_model).*(linear_\d|_proj)"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="where to write")
    parser.add_argument("--images", type=int, default=8000, help="images to train on")
    parser.add_argument("--steps", type=int, default=1000, help="steps of 64 images")
    parser.add_argument("--questions", type=int, default=100, help="new images that the service is asked about")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    processor = small_processor()
    trained = train(small_model(), processor, draw_digits(options.images, seed=0), options.steps)
    trained.save_pretrained(options.output / "adapter")

    base = trace(trained.unload(), task="image-text-to-text-with-past")
    adapted = GraloraModel.from_pretrained(base, options.output / "adapter", adapter_name="digits")
    report = export_onnx(adapted, options.output / "onnx", adapters="data", tokenizer=processor)
    print(f"exported, and verified with images: {report.verification.passed}")

    asked = draw_digits(options.questions, seed=1)
    with service(options.output / "onnx") as url:
        for name, told in (("onnx", "before"), ("digits", "after")):
            right = sum(ask(url, name, image) == str(digit) for image, digit in asked)
            print(f"{told}: {right} of {len(asked)} digits read over HTTP")


def small_model() -> LlavaForConditionalGeneration:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=8)
    text = LlamaConfig(
        **sizes, vocab_size=len(WORDS), initializer_range=0.1, pad_token_id=0, max_position_embeddings=128
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=WORDS.index("<image>"))
    ).eval()


def small_processor() -> LlavaProcessor:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(WORDS[:5])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessor(size=size, do_center_crop=False),
        PreTrainedTokenizerFast(tokenizer_object=words, **special),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def draw_digits(count: int, seed: int) -> list[tuple[Image.Image, int]]:
    """Draw digits in grey on a noisy ground, each in a size and at a place of its own."""
    random = np.random.default_rng(seed)
    drawn = []
    for digit in random.integers(0, 10, count):
        ground, ink = random.integers(0, 90), random.integers(160, 256)
        image = Image.new("L", (SIDE, SIDE), int(ground))
        font = ImageFont.load_default(int(random.integers(18, 28)))
        place = random.integers(2, 12), random.integers(-2, 5)
        ImageDraw.Draw(image).text(tuple(map(int, place)), str(digit), fill=int(ink), font=font)
        noisy = np.asarray(image) + random.normal(0, 8, (SIDE, SIDE))
        drawn.append((Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert("RGB"), int(digit)))
    return drawn


def train(model: Any, processor: Any, drawn: Sequence[tuple[Image.Image, int]], steps: int) -> Any:
    """Train PEFT's GraLoRA on the projector and the decoder, to answer the question with the digit alone."""
    adapted = peft.get_peft_model(model, peft.GraloraConfig(r=32, gralora_k=2, alpha=64, target_modules=ADAPTED))
    adapted.print_trainable_parameters()
    asked = processor.apply_chat_template([chat({"type": "image"})], tokenize=False)
    inputs = processor(text=[asked] * len(drawn), images=[image for image, _ in drawn], return_tensors="pt")
    answers = torch.tensor([WORDS.index(str(digit)) for _, digit in drawn])
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen = torch.randint(0, len(drawn), (64,))
        logits = adapted(**{name: value[chosen] for name, value in inputs.items()}).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits.float(), answers[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {float(loss.detach()):.3f}")
    return adapted


def chat(image: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}


@contextmanager
def service(directory: Path) -> Iterator[str]:
    """Serve an export for a while."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gralora_fx.cli", "serve", "--onnx", str(directory), "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_ready(url):
            if process.poll() is not None:
                raise RuntimeError("the service has stopped; it says why above")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        urlopen(f"{url}/health").close()
    except URLError:
        return False
    return True


def ask(url: str, model: str, image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    data = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    message = chat({"type": "image_url", "image_url": {"url": data}})
    body = {"model": model, "messages": [message], "max_tokens": 1, "temperature": 0}
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"]).strip()


if __name__ == "__main__":
    main()
