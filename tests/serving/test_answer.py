"""Answers grow by whole characters, end before stop strings, and take time that grows with their length."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_tokenizers import tiny_tokenizer

from gralora_fx.serving.answer import Answer


class Letters:
    """A tokenizer written in Python: one letter a token, in which 9 is the first half of a character."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("\ufffd" if token == 9 else chr(97 + token) for token in ids).replace("\ufffdk", "é")


def test_answers_end_before_a_stop_string_and_wait_for_whole_characters() -> None:
    answer = Answer(Letters(), frozenset({25}), ["de"])  # type: ignore[arg-type]
    assert [answer.take(token) for token in (0, 9, 10, 1)] == ["a", "", "é", "b"]
    assert [answer.take(token) for token in (3, 4, 5)] == ["", "", ""]  # d may begin the stop string
    assert (answer.has_ended, answer.text) == (True, "aéb")
    ended = Answer(None, frozenset({25}), [])
    assert [ended.take(token) for token in (1, 25, 2)] == ["", "", ""]
    assert ended.ids == [1]


@pytest.mark.parametrize("make", [Letters, tiny_tokenizer])
def test_text_that_was_held_back_comes_with_the_next_letter_or_the_end(make: Any) -> None:
    tokenizer = make()
    encode = tokenizer.convert_tokens_to_ids if hasattr(tokenizer, "convert_tokens_to_ids") else lambda c: ord(c) - 97
    answer = Answer(tokenizer, frozenset({2 if make is tiny_tokenizer else 25}), ["dex", "ey"])
    assert [answer.take(encode(letter)) for letter in "adeedb"] == ["a", "", "", "de", "e", "db"]
    assert [answer.take(encode(letter)) for letter in "de"] == ["", ""]
    assert answer.take(next(iter(answer._ends))) == "de"
    assert answer.text == "adeedbde"
    assert answer.has_ended


def test_a_tokenizers_bytes_make_whole_characters() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a é b")["input_ids"]
    assert len(ids) == 6  # the é is two
    answer = Answer(tokenizer, frozenset(), [])
    assert [answer.take(token) for token in ids] == ["a", " ", "", "é", " ", "b"]
    assert answer.text == tokenizer.decode(ids)


def test_no_token_is_decoded_more_often_in_a_longer_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers with a stream never decode a whole answer again."""
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: pytest.fail("the whole answer was decoded"))
    answer = Answer(tokenizer, frozenset(), ["zz"])
    assert "".join(answer.take(40) for _ in range(300)) == answer.text
    assert len(answer.text) == 300
