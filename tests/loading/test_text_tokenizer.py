"""A tokenizer read without transformers: ids, texts and chats are those of transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tool_tokenizers import FAMILIES, family_tokenizer
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers import T5Tokenizer as T5

from gralora_fx.core.loading.text_tokenizer import TextTokenizer, is_read_here
from gralora_fx.core.loading.tokenizers import read_tokenizer
from gralora_fx.errors import ServingError
from gralora_fx.run.generate.detokenizer import TextStream

TEXTS = [
    "Hello world.",
    "a  b\n\tc",
    "caf\u00e9 na\u00efve \u6771\u4eac \U0001f600",
    "do n't , it 's <s> here </s>",
    "[MASK] x",
    " ",
]
CORPUS = [*TEXTS, "the quick brown fox, it is n't here ."] * 9
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def with_merges() -> Any:
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=LETTERS, special_tokens=["<s>", "</s>"], show_progress=False
    )
    own.train_from_iterator(CORPUS, trainer)
    own.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    own.enable_truncation(5)  # set by an earlier program, which transformers undoes
    own.enable_padding(direction="left", pad_token="</s>", pad_id=1)
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=7
    )


def bert() -> Any:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "hello",
        "world",
        "##s",
        "do",
        "n",
        "'",
        "t",
        "it",
        "s",
        ".",
        ",",
        "a",
        "b",
        "c",
    ]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, clean_up_tokenization_spaces=True)


def gpt2(**options: Any) -> Any:
    vocabulary = {token: index for index, token in enumerate([*LETTERS, "he", "\u0120w", "<|endoftext|>"])}
    return GPT2Tokenizer(vocab=vocabulary, merges=[("h", "e"), ("\u0120", "w")], pad_token="<|endoftext|>", **options)


def llama() -> Any:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "l", "o", "lo"]
    return LlamaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[("l", "o")])


def t5() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *((each, -2.0) for each in "abcdehlorw")]
    return T5(vocab=pieces, extra_ids=3)


KINDS = (tiny_tokenizer, with_merges, bert, gpt2, llama, t5)


def both(make: Callable[[], Any], path: Path) -> tuple[TextTokenizer, Any]:
    make().save_pretrained(path)
    assert is_read_here(path)
    found = read_tokenizer(path, ServingError)
    assert isinstance(found, TextTokenizer)
    return found, AutoTokenizer.from_pretrained(path)


def gpt2_without_spaces() -> Any:
    """One of bytes that is told twice to clean up spaces."""
    name = "clean_up_tokenization_spaces"
    return gpt2(**{name: True, f"{name}_for_bpe_even_though_it_will_corrupt_output": True})


@pytest.mark.parametrize("make", [bert, gpt2, gpt2_without_spaces])
def test_a_text_is_the_same_token_by_token(make: Callable[[], Any], tmp_path: Path) -> None:
    own, theirs = both(make, tmp_path)
    for text in (*TEXTS, "it 's do n't , a ."):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        stream = TextStream(own)
        pieces = [stream.step(token) for token in ids]
        assert "".join(pieces) + stream.finish() == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.quick
@pytest.mark.parametrize("make", KINDS)
def test_ids_and_texts_are_transformers(make: Callable[[], Any], tmp_path: Path) -> None:
    own, theirs = both(make, tmp_path)
    for text in TEXTS:
        for adds in (True, False):
            ids = theirs(text, add_special_tokens=adds)["input_ids"]
            assert own(text, add_special_tokens=adds)["input_ids"] == ids
            for skips in (True, False):
                assert own.decode(ids, skip_special_tokens=skips) == theirs.decode(ids, skip_special_tokens=skips)
    pairs, expected = own(TEXTS, TEXTS[::-1]), theirs(TEXTS, TEXTS[::-1])
    assert pairs == dict(expected)
    for name in ("pad_token_id", "eos_token_id", "pad_token_type_id", "padding_side", "model_max_length"):
        assert getattr(own, name) == getattr(theirs, name)
    assert own.special_tokens_map == theirs.special_tokens_map
    assert (len(own), own.backend_tokenizer.to_str()) == (len(theirs), theirs.backend_tokenizer.to_str())


@pytest.mark.parametrize("make", [make for make in KINDS if make is not llama])  # which has no token for padding
def test_batches_are_padded_and_cut_as_by_transformers(make: Callable[[], Any], tmp_path: Path) -> None:
    own, theirs = both(make, tmp_path)
    for options in ({"padding": True}, {"padding": True, "truncation": True, "max_length": 4}):
        found = own(TEXTS, return_tensors="np", **options)  # type: ignore[arg-type]
        expected = theirs(TEXTS, return_tensors="np", **options)
        assert {name: array.tolist() for name, array in found.items()} == {
            name: array.tolist() for name, array in expected.items()
        }
        assert all(array.dtype == np.int64 for array in found.values())


SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b>\u00e9</b>"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x", "name": None}],
    [
        {"role": "user", "content": [{"type": "text", "text": "x", "extra": np.float32(1.5), "other": object()}]},
        {"role": "assistant", "content": "y", "reasoning": "because"},
    ],
]
FULL = """{{ bos_token }}{%- set ns = namespace(n=0) -%}
{%- for m in messages %}
{%- if m.role == 'none' %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
{{ m.role }} {{ ns.n }}: {% generation %}{{ m.content | tojson(indent=2) }}{% endgeneration %}
{{ m.reasoning_content }} {{ m.thinking }} {{ m.name is defined }} {{ dict(a=1) | tojson }}
{%- endfor %}
{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{{ strftime_now('%Y') }}{{ documents }}{% if add_generation_prompt %}assistant{{ eos_token }}{% endif %}"""


@pytest.mark.quick
@pytest.mark.parametrize("template", [FULL, *(template for template, _ in FAMILIES.values())])
def test_chats_are_written_as_by_transformers(template: str, tmp_path: Path) -> None:
    def make() -> Any:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    own, theirs = both(make, tmp_path)
    for chat in CHATS:
        for tools in (None, [SEARCH]):
            expected = theirs.apply_chat_template(chat, tools, add_generation_prompt=True, tokenize=False)
            assert own.apply_chat_template(chat, tools, add_generation_prompt=True) == expected


def test_a_template_for_tools_is_taken_with_tools(tmp_path: Path) -> None:
    def make() -> Any:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
        return tokenizer

    own, theirs = both(make, tmp_path)
    assert own.chat_template == theirs.chat_template
    assert own.apply_chat_template(CHATS[0]) == "plain"
    assert own.apply_chat_template(CHATS[0], [SEARCH]) == "with tools"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles alternate') }}",
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ dict.mro() }}",
    ],
)
def test_what_a_template_must_not_do_has_the_same_outcome(template: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    outcomes: list[Any] = []
    for tokenizer in (TextTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        try:
            outcomes.append(tokenizer.apply_chat_template(CHATS[0], tokenize=False))
        except Exception as error:  # noqa: BLE001  # of any type, but the same of both
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_added_tokens_of_families_are_transformers(tmp_path: Path) -> None:
    for name in FAMILIES:
        own, theirs = both(lambda name=name: family_tokenizer(name), tmp_path / name)
        text = "".join(map(str, theirs.added_tokens_decoder.values())) + "<tool_call>{}"
        assert own(text)["input_ids"] == theirs(text)["input_ids"]
        assert {index: str(token) for index, token in own.added_tokens_decoder.items()} == {
            index: str(token) for index, token in theirs.added_tokens_decoder.items()
        }


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "WhisperTokenizer"},
        {"tokenizer_class": "NewTokenizer"},
        {"backend": None},
        {"auto_map": {"AutoTokenizer": ["x.Y", None]}},
    ],
)
def test_other_tokenizers_are_left_to_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert not is_read_here(tmp_path)


@pytest.mark.parametrize("content", [b"{}", b'{"model": 5}'])
def test_a_file_without_a_tokenizer_is_named(content: bytes, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ServingError, match=r"the tokenizer of .* cannot be loaded from tokenizer\.json"):
        read_tokenizer(tmp_path, ServingError)
