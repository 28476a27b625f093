"""A writer of news: a small hybrid of Mamba2 and attention, its tokenizer, training, and bits per character.

The base learns four of five topics of BBC news; an adapter learns the fifth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from gralora_fx.demo.news_classifier import fit, load_news

TOPIC = "sports"  # the adapter's topic
LENGTH = 96  # tokens of a text that are read at once
BASE_STEPS, ADAPTER_STEPS = 120, 40
BASE_RATE, ADAPTER_RATE = 1.2e-2, 1e-2
_BATCH = 6
_HELD_OUT = 64  # pieces of `LENGTH` tokens
_VOCABULARY, _END = 1024, "<|endoftext|>"
_WIDTH, _HEADS = 128, 8
_LAYERS = ("mamba", "mamba", "attention", "mamba")
_SHORTEST, _LONGEST = 1e-3, 1e-1  # time steps


@dataclass(frozen=True)
class Texts:
    """Tokenized texts, concatenated, each followed by the end token."""

    train: Tensor  # token ids to train on, `[tokens]`
    held_out: Tensor  # held-out token ids, `[tokens]`
    token_length: float  # mean characters of a held-out token


def read_texts(seed: int) -> tuple[PreTrainedTokenizerBase, Texts, Texts]:
    """Return a tokenizer trained on the base's texts only, and the texts of the base's topics and of the adapter's."""
    news = load_news(seed)
    number = news.classes.index(TOPIC)
    parts = [
        [[text for text, label in examples if (label == number) is of_topic] for examples in (news.train, news.test)]
        for of_topic in (False, True)
    ]
    tokenizer = _tokenizer(parts[0][0])
    base, topic = (_texts(tokenizer, *part) for part in parts)
    return tokenizer, base, topic


def hybrid(tokenizer: PreTrainedTokenizerBase, seed: int) -> GraniteMoeHybridForCausalLM:
    """Return a random model of 0.9 million parameters: three Mamba2 layers and one attention layer, as in Granite 4.

    Time steps are initialised between 0.001 and 0.1, as in the code of "Mamba: Linear-Time Sequence Modeling with
    Selective State Spaces", https://arxiv.org/abs/2312.00752. transformers initialises them to 1.3, at which states
    forget a text within a few tokens.
    """
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = GraniteMoeHybridConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        num_hidden_layers=len(_LAYERS),
        layer_types=list(_LAYERS),
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_multiplier=(_WIDTH // 4) ** -0.5,
        mamba_n_heads=_HEADS,
        mamba_d_state=32,
        shared_intermediate_size=2 * _WIDTH,
        num_local_experts=0,
        num_experts_per_tok=0,
        max_position_embeddings=4 * LENGTH,
        tie_word_embeddings=True,
        initializer_range=_WIDTH**-0.5,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = GraniteMoeHybridForCausalLM(config).eval()
    steps = torch.logspace(math.log10(_SHORTEST), math.log10(_LONGEST), _HEADS)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            parameter.data.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the steps
    return model


def train(
    model: Any, parameters: Iterable[nn.Parameter], texts: Texts, *, steps: int, rate: float, seed: int
) -> list[float]:
    """Train a traced or rewritten model to predict the next token, on random pieces of text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(texts.train) - LENGTH, (steps * _BATCH, 1), generator=generator)
    pieces = texts.train[starts + torch.arange(LENGTH + 1)]
    model.train()
    losses = fit(parameters, torch.split(pieces, _BATCH), lambda batch: _loss(model, batch), steps=steps, rate=rate)
    model.eval()
    return losses


def bits_per_character(model: Callable[..., Any], texts: Texts) -> float:
    """Return bits per character of held-out text: a token's loss in bits over the mean token length."""
    pieces = texts.held_out.unfold(0, LENGTH + 1, LENGTH)[:_HELD_OUT]
    with torch.no_grad():
        loss = fmean(_loss(model, batch).item() for batch in torch.split(pieces, _BATCH))
    return loss / math.log(2) / texts.token_length


def _loss(model: Callable[..., Any], pieces: Tensor) -> Tensor:
    logits = model(input_ids=pieces[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token=_END, pad_token=_END)


def _texts(tokenizer: PreTrainedTokenizerBase, train: Sequence[str], held_out: Sequence[str]) -> Texts:
    end = tokenizer.eos_token_id

    def ids_of(part: Sequence[str]) -> Tensor:
        return torch.tensor([token for text in tokenizer(list(part))["input_ids"] for token in (*text, end)])

    ids = ids_of(held_out)
    return Texts(ids_of(train), ids, token_length=sum(map(len, held_out)) / len(ids))
