"""Answers are what the tokenizer decodes, whole characters at a time, end before stop strings, and cost what is new."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tiny_tokenizers import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from gralora_fx.run.generate.completion import Completion
from gralora_fx.run.generate.detokenizer import TextStream

NO_ENDS: frozenset[int] = frozenset()


def byte_level() -> Any:
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120the", "he"]
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_fallback() -> Any:
    """As Llama 2 and Gemma have it: characters out of the vocabulary are byte tokens."""
    words = ["\u2581", "\u2581Hello", "\u2581world", "a", "b", "\u2581\u2581", ",", "\u2581."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace() -> Any:
    words = ["\u2581", "\u2581Hello", "\u2581world", "a", "b", ",", "\u2581.", "\u2581n't", "\u2581'", "\u2581's"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in ["<unk>", "<s>", *words]], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )


def word_piece() -> Any:
    words = ["[UNK]", "[PAD]", "hello", "##lo", "world", ".", ",", "'", "n't", "do", "not", "##s", "?", "'s"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", clean_up_tokenization_spaces=True
    )


def words() -> Any:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "hello": 3}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = [byte_level, byte_fallback, metaspace, word_piece, words, ByT5Tokenizer, tiny_tokenizer]


def drawn(tokenizer: Any) -> Iterator[list[int]]:
    """Any tokens, ids out of the vocabulary among them, and texts cut anywhere."""
    size = len(tokenizer) + 2 * tokenizer.is_fast  # those written in Python fail on ids out of the vocabulary
    for seed in range(60):
        draw = random.Random(seed)
        yield [draw.randrange(size) for _ in range(draw.choice([1, 5, 9, 90]))]
        ids = tokenizer("the \u00e9 \u65e5\u672c \U0001f600, Hello world . a n't b" * 2, add_special_tokens=False)[
            "input_ids"
        ]
        first, last = sorted(draw.choices(range(len(ids) + 1), k=2))
        yield ids[first:last]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_pieces_together_are_what_the_tokenizer_decodes(make: Callable[[], Any]) -> None:
    tokenizer = make()
    for ids in drawn(tokenizer):
        stream = TextStream(tokenizer)
        pieces = [stream.step(token) for token in ids] + [stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("make", TOKENIZERS)
def test_no_step_decodes_more_tokens_in_a_longer_answer(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, decode, sizes = make(), make().decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: [sizes.append(len(ids)), decode(ids, **options)][1])
    answer = Completion(tokenizer, NO_ENDS, ["zz"])
    token = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    for _ in range(300):
        answer.take(token)
    answer.finish()
    assert answer.text == decode([token] * 300, skip_special_tokens=True)
    assert max(sizes) <= 40


def test_characters_come_whole_and_as_soon_as_they_are() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a \u00e9 b")["input_ids"]
    assert len(ids) == 6  # the \u00e9 is two
    answer = Completion(tokenizer, NO_ENDS, [])
    assert [answer.take(token) for token in ids] == ["a", " ", "", "\u00e9", " ", "b"]
    cut = Completion(tokenizer, NO_ENDS, [])
    assert [cut.take(token) for token in ids[:3]] == ["a", " ", ""]
    assert (cut.finish(), cut.finish()) == ("\ufffd", "")
    assert cut.text == tokenizer.decode(ids[:3])


# -- stop strings ------------------------------------------------------------------------------------------------------


def letters(text: str, stop: list[str]) -> Completion:
    """Return an answer that was given a text letter by letter."""
    tokenizer = tiny_tokenizer()
    answer = Completion(tokenizer, NO_ENDS, stop)
    for letter in text:
        answer.take(tokenizer.convert_tokens_to_ids(letter))
    return answer


def test_text_that_was_held_back_comes_with_the_next_letter_or_the_end() -> None:
    tokenizer = tiny_tokenizer()
    answer = Completion(tokenizer, frozenset({2}), ["dex", "ey"])
    encode = tokenizer.convert_tokens_to_ids
    assert [answer.take(encode(letter)) for letter in "adeedb"] == ["a", "", "", "de", "e", "db"]
    assert [answer.take(encode(letter)) for letter in "de"] == ["", ""]
    assert answer.take(2) == "de"
    assert answer.text == "adeedbde"
    assert answer.has_ended
    assert (answer.take(encode("a")), answer.finish()) == ("", "")


def test_tokens_alone_have_no_text() -> None:
    ended = Completion(None, frozenset({25}), [])
    assert [ended.take(token) for token in (1, 25, 2)] == ["", "", ""]
    assert (ended.ids, ended.text) == ([1], "")


@pytest.mark.parametrize("seed", range(40))
def test_an_answer_ends_where_a_stop_string_is_first_complete(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("ab", k=40))
    stop = ["".join(draw.choices("ab", k=draw.randint(1, 9))) for _ in range(draw.randint(1, 3))]
    ends = [text.find(string) + len(string) for string in stop if string in text]
    longest = max((len(string) for string in stop if ends and text[: min(ends)].endswith(string)), default=0)
    answer = letters(text, stop)
    answer.finish()
    assert answer.text == (text[: min(ends) - longest] if ends else text)


def test_a_long_stop_string_costs_no_more_than_the_text() -> None:
    """The string is read as far as the text matches it, and each letter a few times."""
    reads = 0

    class Counted(str):
        __slots__ = ()

        def __getitem__(self, key: Any) -> str:
            nonlocal reads
            reads += 1
            return str.__getitem__(self, key)

    answer = letters("ab" * 300 + "c", [Counted("ab" * 500_000)])
    assert reads < 10 * 601
    answer.finish()
    assert answer.text == "ab" * 300 + "c"
