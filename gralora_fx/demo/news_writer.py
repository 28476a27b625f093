"""A small hybrid of Mamba2 and attention learns to write four topics of BBC news, and an adapter the fifth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import Parameter, functional
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedTokenizerFast

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.base.progress.stages import quiet
from gralora_fx.demo.news_classifier import Results, fit, load_news
from gralora_fx.errors import GraloraError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

LENGTH, BATCH, HELD_OUT = 96, 6, 64  # tokens of a piece of text, pieces of a step, pieces held out
BASE_STEPS, ADAPTER_STEPS, BASE_RATE, ADAPTER_RATE = 120, 40, 1.2e-2, 1e-2
TOPIC, END, PROMPTS = "sports", "<|endoftext|>", ("The government", "England")
Texts: TypeAlias = tuple[Tensor, Tensor, float]  # token ids to train on and held out, and characters a token


def write_news(output: Path, say: Callable[[str], None] = print, *, steps: int, seed: int) -> Results:
    """Train a base and an adapter, export them twice, and compare answers of base and adapter."""
    tokenizer, texts, topic = read_texts(seed)
    source = hybrid(tokenizer, seed)
    traced = trace(source, task="text-generation-with-past")
    untrained = bits_per_character(traced, texts)
    losses = train(traced, source.parameters(), texts, steps=steps, rate=BASE_RATE, seed=seed)
    trained, before = bits_per_character(traced, texts), bits_per_character(traced, topic)
    say(f"bits per character of held-out text: {untrained:.2f} untrained, {trained:.2f} trained")
    config = GraloraConfig(r=16, gralora_k=2, alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = rewrite(traced, config, adapter_name=TOPIC)
    train(model, model.parameters(), topic, steps=-(-steps // 3), rate=ADAPTER_RATE, seed=seed)
    after = bits_per_character(model, topic)
    say(f"the same of {TOPIC}, which the base has not read: {before:.2f}, {after:.2f} with the adapter")
    if trained >= untrained or after >= before:
        raise GraloraError("the demonstration failed: training makes held-out text no likelier")
    with quiet():
        source.save_pretrained(output / "base")
        tokenizer.save_pretrained(output / "base")
        model.save_pretrained(output / "adapter")
    say(f"wrote {output / 'base'}: the base, as transformers writes it")
    say(f"wrote {output / 'adapter'}: the adapter, as PEFT writes it")
    say(str(export_onnx(model, output / "onnx", adapters="data", tokenizer=tokenizer, overwrite=True)))
    say(str(export_onnx(model, output / "merged", logits="all", tokenizer=tokenizer, overwrite=True)))
    served, both = bits_per_character(load(output / "merged"), topic), load(output / "onnx")
    cases = [(prompt, name) for prompt in PROMPTS for name in (None, TOPIC)]
    prompts, names = [prompt for prompt, _ in cases], [name for _, name in cases]
    draws: dict[str, Any] = {"max_new_tokens": 32, "do_sample": True, "temperature": 0.7}
    answers = both.generate(prompts, adapter=names, seed=0, **draws)  # each row by a seed of its own
    alone = [both.generate(case[0], adapter=case[1], seed=row, **draws) for row, case in enumerate(cases)]
    if abs(served - after) > 1e-3 or answers != alone:
        raise GraloraError("the demonstration failed: an export is not PyTorch's, or a batch changes its answers")
    trainable, total = model.get_nb_trainable_parameters()
    bits = {"four topics, untrained": untrained, "four topics, base": trained, f"{TOPIC}, base": before}
    bits |= {f"{TOPIC}, adapter": after, f"{TOPIC}, merged, ONNX Runtime": served}
    figures = {
        **{f"bits per character, {name}": f"{value:.3f}" for name, value in bits.items()},
        "answers in one batch equal to those alone": f"{len(answers)} of {len(alone)}",
        "trainable share": f"{100 * trainable / total:.2f} % ({trainable:,} of {total:,})",
    }
    rows = zip(PROMPTS, *([" ".join(text.split()) for text in answers[start::2]] for start in (0, 1)), strict=True)
    return figures, [("prompt", "base", TOPIC), *rows], losses


def read_texts(seed: int) -> tuple[PreTrainedTokenizerFast, Texts, Texts]:
    """Return a tokenizer trained on the base's texts only, and the texts of the base's topics and of the adapter's."""
    news = load_news(seed)
    base, topic = (
        [[text for text, label in part if (news.classes[label] == TOPIC) is wanted] for part in (news.train, news.test)]
        for wanted in (False, True)
    )
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    pairs.train_from_iterator(base[0], trainers.BpeTrainer(vocab_size=1024, special_tokens=[END], **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token=END, pad_token=END)
    parts: list[Texts] = []
    for train, held_out in (base, topic):
        rows = (tokenizer([text + END for text in texts]).input_ids for texts in (train, held_out))
        ids, others = (torch.tensor([token for row in part for token in row]) for part in rows)
        parts.append((ids, others, sum(map(len, held_out)) / len(others)))
    return tokenizer, parts[0], parts[1]


def hybrid(tokenizer: PreTrainedTokenizerFast, seed: int) -> GraniteMoeHybridForCausalLM:
    """Return a random model of 0.9 million parameters: three Mamba2 layers and one attention layer, as in Granite 4."""
    torch.manual_seed(seed)
    width, layers = 128, ["mamba", "mamba", "attention", "mamba"]
    options: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": len(layers), "layer_types": layers}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_multiplier": (width // 4) ** -0.5}
    options |= {"mamba_n_heads": 8, "mamba_d_state": 32, "initializer_range": width**-0.5}
    options |= {"shared_intermediate_size": 2 * width, "num_local_experts": 0, "num_experts_per_tok": 0}
    options |= {"vocab_size": len(tokenizer), "max_position_embeddings": 4 * LENGTH, "tie_word_embeddings": True}
    options |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    model = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**options)).eval()
    # as in the code of https://arxiv.org/abs/2312.00752; at transformers' 1.3, states forget within a few tokens
    steps = torch.logspace(-3, -1, 8)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            parameter.data.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the steps
    return model


def train(model: Any, weights: Iterable[Parameter], texts: Texts, steps: int, rate: float, seed: int) -> list[float]:
    """Train a traced or rewritten model to predict the next token, on random pieces of text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(texts[0]) - LENGTH, (steps * BATCH, 1), generator=generator)
    pieces = torch.split(texts[0][starts + torch.arange(LENGTH + 1)], BATCH)
    return fit(model, weights, pieces, lambda ids: next_token_loss(model, ids), rate)


def next_token_loss(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Return the mean cross entropy of each token but the first."""
    return functional.cross_entropy(model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())


def bits_per_character(model: Callable[..., Any], texts: Texts) -> float:
    """Return bits per character of held-out text: a token's loss in bits over the mean token length."""
    pieces = torch.split(texts[1].unfold(0, LENGTH + 1, LENGTH)[:HELD_OUT], BATCH)
    with torch.no_grad():
        losses = [next_token_loss(model, ids).item() for ids in pieces]
    return sum(losses) / len(losses) / math.log(2) / texts[2]
