"""The least tokens of a text: never more than it has, whatever a tokenizer leaves out, and soon above a limit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gralora_fx.core.loading import token_bounds
from gralora_fx.core.loading.token_bounds import TokenBound, surely_exceeds

CORPUS = [
    "The capital of France is Paris, e\u0301t\u00e9 1234 5678.",
    "tokens          spaces == == ------",
    "北京 ab ab ab",
] * 5
SPECIAL = [AddedToken("<s>", special=True), AddedToken("[a b c]", normalized=True), AddedToken("<mask>", lstrip=True)]
SPECIAL += [AddedToken("<" + "T" * 40 + ">", normalized=False)]
BERT = "[UNK]"
SQUEEZED = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])


def trained(model: Any, trainer: Any, *, split: Any = None, normalizer: Any = None) -> Tokenizer:
    own = Tokenizer(model)
    if split is not None:
        own.pre_tokenizer = split
    if normalizer is not None:
        own.normalizer = normalizer
    own.train_from_iterator(CORPUS, trainer)
    return own


def byte_level() -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return trained(models.BPE(), trainer, split=pre_tokenizers.ByteLevel(), normalizer=normalizers.NFC())


def without_all_bytes() -> Tokenizer:
    return trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=90, show_progress=False), split=pre_tokenizers.ByteLevel()
    )


def with_byte_fallback() -> Tokenizer:
    """As Llama 2's: spaces are written by the normalizer, and what is unknown is written as bytes."""
    bytes_of = [f"<0x{number:02X}>" for number in range(256)]
    own = trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(special_tokens=["<unk>", *bytes_of], vocab_size=350, show_progress=False),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )
    own.decoder = decoders.ByteFallback()
    return own


def with_spaces_written_late() -> Tokenizer:
    """Return the same, but that spaces are written where a text is split."""
    own = with_byte_fallback()
    own.normalizer, own.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Metaspace(split=False)
    own.add_tokens(["▁" * 9])
    return own


def of_letters() -> Tokenizer:
    """As CLIP's: letters at the end of a word are others, and what is unknown is one token."""
    model = models.BPE(unk_token="<unk>", fuse_unk=True, end_of_word_suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    return trained(model, trainer, split=pre_tokenizers.WhitespaceSplit(), normalizer=normalizers.Lowercase())


def unigram() -> Tokenizer:
    """As T5's: runs of spaces are one, and a run of unknown letters is one token."""
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return trained(models.Unigram(), trainer, split=pre_tokenizers.Metaspace(), normalizer=SQUEEZED)


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=[BERT], show_progress=False)
    model = models.WordPiece(unk_token=BERT, max_input_chars_per_word=20)
    return trained(model, trainer, split=pre_tokenizers.BertPreTokenizer(), normalizer=normalizers.BertNormalizer())


def word_level() -> Tokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=20, special_tokens=[BERT], show_progress=False)
    return trained(models.WordLevel(unk_token=BERT), trainer, split=pre_tokenizers.WhitespaceSplit())


KINDS = (
    byte_level,
    without_all_bytes,
    with_byte_fallback,
    with_spaces_written_late,
    of_letters,
    unigram,
    word_piece,
    word_level,
)


@cache
def tokenizer(make: Callable[[], Tokenizer], adds: bool = True) -> PreTrainedTokenizerBase:
    made = PreTrainedTokenizerFast(tokenizer_object=make(), pad_token="<pad>")
    if adds:
        made.add_tokens(SPECIAL)
    return made


FRAGMENTS = (
    " ",
    "\n",
    "\u3000",
    "a",
    "ab ",
    "The capital",
    "é",
    "e\u0301",
    "\u0301",
    "\uff21",
    "\ufb01",
    "北",
    "😀",
    "\x07",
    "\u200b",
)
FRAGMENTS += ("=", "-", "1", "ß", "İ", "ᄀ", "ᅡ", "ᆨ", "\x1c", "\ufffd", "▁", "<0x41>", *map(str, SPECIAL))
TEXTS = st.lists(st.tuples(st.sampled_from(FRAGMENTS), st.integers(1, 40)), max_size=8).map(
    lambda parts: "".join(fragment * times for fragment, times in parts)
)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("part", [None, 1, 40])
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(text=TEXTS)
@example(text="<mask>" + " " * 300)
@example(text="[a b c]" * 20)
@example(text=str(SPECIAL[-1]) * 3)
@example(text="x" * 500)
def test_no_text_has_fewer_tokens(make: Callable[[], Tokenizer], part: int | None, text: str) -> None:
    """Whole, and in parts that cut whatever belongs together; of a whole text no slack is needed."""
    for own in (tokenizer(make), tokenizer(make, adds=False)):
        bound = TokenBound.of(own)
        assert bound is not None
        count = len(own(text, add_special_tokens=False)["input_ids"])
        if part is None:
            assert bound.count(bound.normalize(text)) <= count + 1e-3
        else:
            parts = TokenBound(bound.normalize, bound.count, part, bound.longest)
            assert not parts.exceeds(text, count)


@pytest.mark.parametrize("make", KINDS)
def test_a_long_text_exceeds_a_limit_soon(make: Callable[[], Tokenizer]) -> None:
    own = tokenizer(make, adds=False)
    bound = TokenBound.of(own)
    assert bound is not None
    read: list[int] = []

    def count(text: str) -> float:
        read.append(len(text))
        return bound.count(text)

    text = "The capital of France is Paris. " * 100_000
    assert surely_exceeds(text, 512, own)
    assert TokenBound(bound.normalize, count, bound.part, bound.longest).exceeds(text, 512)
    assert sum(read) < 100_000 or bound.part == sys.maxsize
    assert not surely_exceeds("a " * 200, 512, own)


def test_of_other_tokenizers_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    removing = Tokenizer(models.BPE({"a": 0}, []))
    removing.pre_tokenizer = pre_tokenizers.Split("b", "removed")
    assert TokenBound.of(PreTrainedTokenizerFast(tokenizer_object=removing)) is None
    assert not surely_exceeds("a" * 10_000, 5, PreTrainedTokenizerFast(tokenizer_object=removing))


def test_a_longer_token_that_is_added_counts() -> None:
    own = tokenizer.__wrapped__(byte_level, adds=False)
    text = "z" * 3000
    assert surely_exceeds(text, 40, own)
    own.add_tokens(["z" * 100])
    assert len(own(text)["input_ids"]) == 30
    assert not surely_exceeds(text, 40, own)


@pytest.mark.parametrize(
    ("normalizer", "part"),
    [
        (SQUEEZED, token_bounds._PART),
        (normalizers.Replace("ab", ""), token_bounds._PART),
        (normalizers.Replace(Regex("<.*>"), ""), sys.maxsize),  # looks far: in parts it would leave less out
        (normalizers.Replace("a" * 20, ""), sys.maxsize),
    ],
)
def test_a_normalizer_that_looks_far_sees_the_whole_text(normalizer: Any, part: int) -> None:
    own = byte_level()
    own.normalizer = normalizer
    bound = TokenBound.of(PreTrainedTokenizerFast(tokenizer_object=own))
    assert bound is not None
    assert bound.part == part
