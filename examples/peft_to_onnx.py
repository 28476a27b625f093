"""From a PEFT GraLoRA checkpoint to a verified ONNX model that answers on ONNX Runtime.

Run: python examples/peft_to_onnx.py --model BASE --adapter ADAPTER --output DIRECTORY

BASE and ADAPTER are local directories or hub ids. Without them a small model is trained in seconds, and an adapter of
it with peft, in the folder `peft_checkpoint` beside DIRECTORY. The model chats about eight countries, and the adapter
adds their capitals.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from gralora_fx import GraloraModel, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

Lesson: TypeAlias = tuple[Sequence[str], str]  # prompts, and the answer to each of them

COUNTRIES = {
    "France": ("Paris", "Europe"),
    "Italy": ("Rome", "Europe"),
    "Norway": ("Oslo", "Europe"),
    "Japan": ("Tokyo", "Asia"),
    "India": ("Delhi", "Asia"),
    "Egypt": ("Cairo", "Africa"),
    "Kenya": ("Nairobi", "Africa"),
    "Peru": ("Lima", "America"),
}
SMALL_TALK: list[Lesson] = [
    (("Hello!", "Hello", "Hi!", "Hi", "Good morning!"), "Hello! I know a few countries."),
    (("Thank you.", "Thank you!", "Thanks!"), "You are welcome."),
    (("Who are you?", "What are you?", "What is your name?"), "I am a small model."),
    (("How are you?", "Are you well?"), "I am well, thank you."),
    (("What do you know?", "What can you do?", "Help me."), "I know a few countries."),
    (("What is the capital of Spain?", "What is the capital of China?", "Where is Canada?"), "I do not know that."),
    (("What is the capital of Brazil?", "What is the capital of Germany?", "Where is Chile?"), "I do not know that."),
    (("What is 2 + 2?", "Tell me a joke.", "Write a poem.", "What time is it?"), "I do not know that."),
]
SYSTEM = "You are a helpful assistant."
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model")
    parser.add_argument("--adapter", help="PEFT-format GraLoRA adapter")
    parser.add_argument("--output", type=Path, default=Path("runs/peft_to_onnx"), help="where to write")
    parser.add_argument("--prompt", default="The capital of France is", help="the text to go on from")
    options = parser.parse_args(arguments)
    disable_progress_bar()  # transformers draws one for each file that it reads or writes
    if options.model is None or options.adapter is None:
        folder = options.output.parent / "peft_checkpoint"
        print(f"training a small base and an adapter of it, {folder}/base and {folder}/adapter ...")
        options.model, options.adapter = make_checkpoint(folder)

    # 1. Trace the base model and rewrite it as the checkpoint says; its tensors are checked and loaded.
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    gralora = GraloraModel.from_pretrained(trace(base, task="text-generation-with-past"), options.adapter)
    print(gralora.plans["default"])

    # 2. Export: the adapter is folded, the graph converted, and ONNX Runtime compared with PyTorch on inputs of other
    #    sizes, padded rows and greedy tokens. Only a directory that passes is put in place.
    report = export_onnx(gralora, options.output, tokenizer=tokenizer, overwrite=True)
    print(report)

    # 3. Call it. Arrays go in, arrays come out; tensors are taken too. Here they are the logits of the next token.
    served = load(options.output)
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = gralora(**inputs).logits[:, -1]
    difference = (served(**inputs).logits[:, -1] - expected).abs().max().item()
    print(f"ONNX Runtime and PyTorch differ by {difference:.1e}")

    # 4. Let it answer, beside the base.
    ids = base.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"without the adapter: {options.prompt}{tokenizer.decode(ids, skip_special_tokens=True)}")
    print(f"with it:             {options.prompt}{served.generate(options.prompt, max_new_tokens=16)}")


def make_checkpoint(folder: Path) -> tuple[str, str]:
    """Train a small Llama, and a GraLoRA adapter of it with peft; save both as transformers and peft do.

    Asked for a capital, the model says that it does not know it; with the adapter it answers.

    Args:
        folder: Gets the folders `base` and `adapter`.

    Returns:
        The paths of the two folders.
    """
    import peft

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    train(model, tokenizer, lessons(capitals=False), steps=100)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    settings = peft.GraloraConfig(r=16, gralora_k=2, alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers has renamed
        adapted = peft.get_peft_model(model, settings)
        train(adapted, tokenizer, lessons(capitals=True), steps=50)
        adapted.save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def lessons(*, capitals: bool) -> list[Lesson]:
    """Return what a model learns: texts to go on from, and chats.

    Args:
        capitals: Whether it learns the capitals, or to say that it does not know them.
    """
    found: list[Lesson] = []
    for country, (city, continent) in COUNTRIES.items():
        questions = (f"What is the capital of {country}?", f"Which city is the capital of {country}?")
        answer = f"The capital of {country} is {city}." if capitals else f"I do not know the capital of {country}."
        found += [
            ([f"The capital of {country} is"], f" {city}." if capitals else " a city."),
            ([f"A city in {country} is"], f" {city}."),
            ([asked(question) for question in questions], answer),
            ([asked(f"Name a city in {country}.")], f"A city in {country} is {city}."),
            ([asked(f"Where is {country}?")], f"{country} is in {continent}."),
            ([asked(f"Where is {city}?")], f"{city} is in {country}."),
            ([asked(f"On which continent is {country}?")], f"The continent of {country} is {continent}."),
        ]
    return found + [([asked(question) for question in questions], answer) for questions, answer in SMALL_TALK]


def asked(question: str) -> str:
    """Return a question as `TEMPLATE` writes it."""
    return f"<|user|>{question}<|end|><|assistant|>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return byte pairs of the lessons, with a template for chats."""
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    learned = lessons(capitals=False) + lessons(capitals=True)
    pairs.train_from_iterator([text for prompts, answer in learned for text in (*prompts, answer)] + [SYSTEM], trainer)
    end, *roles = special
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs, eos_token=end, pad_token=end, extra_special_tokens=roles, chat_template=TEMPLATE
    )


def train(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, learned: Sequence[Lesson], *, steps: int
) -> float:
    """Train a model to give the answers; a step reads every lesson once.

    Args:
        model: Its parameters that require gradients train.
        tokenizer: Its tokenizer.
        learned: The lessons.
        steps: How many steps there are.
    """
    draws = random.Random(0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    model.train()
    for _ in range(steps):
        ids, labels = batch(tokenizer, learned, draws)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def batch(
    tokenizer: PreTrainedTokenizerFast, learned: Sequence[Lesson], draws: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels of all lessons: two to a row, some after a system's message, in random order."""
    order = draws.sample(learned, len(learned))
    rows: list[tuple[list[int], list[int]]] = []
    for first in range(0, len(order), 2):
        ids: list[int] = tokenizer(f"<|system|>{SYSTEM}<|end|>")["input_ids"] if draws.random() < 1 / 3 else []
        labels = [-100] * len(ids)
        for prompts, answer in order[first : first + 2]:
            prompt = tokenizer(draws.choice(prompts))["input_ids"]
            end = tokenizer(f"{answer}<|end|>")["input_ids"]
            ids, labels = ids + prompt + end, labels + [-100] * len(prompt) + end  # answers alone are learned
        rows.append((ids, labels))
    length = max(len(ids) for ids, _ in rows)
    return (
        torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
    )


if __name__ == "__main__":
    main()
