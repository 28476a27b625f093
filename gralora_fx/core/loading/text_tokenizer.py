"""A tokenizer read by the `tokenizers` library, with the part of transformers' interface that serving uses.

It reads what transformers 5 saved: `tokenizer.json`, `tokenizer_config.json` and chat templates. transformers itself
reads all others, such as those whose classes do more than their files say.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from gralora_fx.base.sources.model_files import TOKENIZER_CONFIG, TOKENIZER_FILE

_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OLDER = ("special_tokens_map.json", "added_tokens.json")  # files of earlier versions, which say more about tokens
# classes of transformers, without "Tokenizer" or "Fast", that encode and decode as their files say
_PLAIN = {
    *("sBackend", "PreTrained", "Albert", "Barthez", "Bert", "BigBird", "Blenderbot", "CLIP", "Camembert", "Cohere"),
    *("Deberta", "DebertaV2", "DistilBert", "GPT2", "GPTNeoX", "Gemma", "Herbert", "Llama"),
    *("MPNet", "OpenAIGPT", "Pegasus", "Qwen2", "Qwen3_5", "Reformer", "RemBert", "Roberta", "T5", "XGLM"),
    "XLMRoberta",
}
_PADS_LEFT = {"Cohere", "Gemma", "Llama"}  # classes that do, unless the file says otherwise
_TYPED = {"Bert", "Deberta", "DebertaV2"}  # classes with token types for pairs, unless the file says otherwise
_UNLIMITED = int(1e30)  # transformers' number for a tokenizer that sets no limit
_CLEANS = "clean_up_tokenization_spaces"
_CLEANS_BPE = f"{_CLEANS}_for_bpe_even_though_it_will_corrupt_output"
_CLEANED = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'"}  # spaces that word tokenizers insert
_CLEANED |= {f" {part}": part for part in ("n't", "'m", "'s", "'ve", "'re")}
_IDS, _TYPES, _MASK = "input_ids", "token_type_ids", "attention_mask"
# the letters that byte-level tokenizers write for bytes: those of Latin-1 that are visible, and others for the rest
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_REST = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_LETTERS = {byte: chr(byte if byte in _VISIBLE else 256 + _REST.index(byte)) for byte in range(256)}


def is_read_here(directory: Path) -> bool:
    """Return whether a directory's files describe its tokenizer completely."""
    if not all((directory / name).is_file() for name in (TOKENIZER_FILE, TOKENIZER_CONFIG)):
        return False
    config = json.loads((directory / TOKENIZER_CONFIG).read_bytes())
    return (
        config.get("backend") == "tokenizers"  # written by transformers 5
        and "auto_map" not in config
        and _kind(config) in _PLAIN
        and not any((directory / name).is_file() for name in _OLDER)
    )


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("tokenizer_class") or "").removesuffix("Fast").replace("Tokenizer", "")


class TextTokenizer:
    """A tokenizer; attributes have the names and the meaning of transformers' `PreTrainedTokenizerBase`."""

    def __init__(self, directory: Path) -> None:
        """Read it from a directory for which `is_read_here`."""
        config = json.loads((directory / TOKENIZER_CONFIG).read_bytes())
        self.backend_tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
        padding = self.backend_tokenizer.padding or {}
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        self.special_tokens_map = {name: _content(config[name]) for name in _NAMED if config.get(name) is not None}
        extra = config.get("extra_special_tokens") or ()
        more = map(_content, extra.values() if isinstance(extra, dict) else extra)
        known = {token.content for token in self.added_tokens_decoder.values() if token.special}
        new = [token for token in (*self.special_tokens_map.values(), *more) if token not in known]
        self.backend_tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in new])
        limit = config.get("model_max_length")
        self.model_max_length: int = _UNLIMITED if limit is None else limit
        side = "left" if _kind(config) in _PADS_LEFT else "right"
        self.padding_side: str = config.get("padding_side") or padding.get("direction") or side
        self.pad_token_type_id: int = config.get("pad_token_type_id") or 0
        for name in (_CLEANS, _CLEANS_BPE):
            setattr(self, name, bool(config.get(name)))
        self.chat_template = _templates(directory, config)
        usual = (_IDS, _TYPES, _MASK) if _kind(config) in _TYPED else (_IDS, _MASK)
        self.model_input_names: Sequence[str] = config.get("model_input_names") or usual
        self._cutting = threading.Lock()

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Tokens beside the model's own, by id."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    @cached_property
    def pad_token_id(self) -> int | None:
        """The id of the token for padding; None if there is none."""
        return self._named_id("pad_token")

    @cached_property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text; None if there is none."""
        return self._named_id("eos_token")

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        found: int | None = None if token is None else self.backend_tokenizer.token_to_id(token)
        return found

    def __call__(
        self,
        text: str | Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """Tokenize a text, or several, each with a second one or none, by transformers' arguments.

        `return_tensors` is `"np"`, or None for lists; `max_length` is at most the tokenizer's limit.
        """
        if return_tensors not in (None, "np"):
            raise ValueError(f"tensors of {return_tensors!r} need transformers; ask for 'np', or install it")
        texts: Any = [text] if isinstance(text, str) else list(text)
        texts = texts if pairs is None else list(zip(texts, pairs, strict=True))
        limit = min(max_length or self.model_max_length, self.model_max_length)
        if truncation and limit < _UNLIMITED:
            with self._cutting:
                self._cutter.enable_truncation(limit)
                found = self._cutter.encode_batch(texts, add_special_tokens=add_special_tokens)
        else:
            found = self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        rows = {_IDS: [row.ids for row in found], _TYPES: [row.type_ids for row in found]}
        rows[_MASK] = [[1] * len(ids) for ids in rows[_IDS]]
        rows = {name: values for name, values in rows.items() if name in self.model_input_names}
        if padding:
            fills = {_IDS: self.pad_token_id or 0, _TYPES: self.pad_token_type_id, _MASK: 0}
            rows = {name: [self._padded(row, values, fills[name]) for row in values] for name, values in rows.items()}
        if return_tensors == "np":
            return {name: np.array(values, np.int64) for name, values in rows.items()}
        return {name: values[0] for name, values in rows.items()} if isinstance(text, str) else dict(rows)

    def _padded(self, row: list[int], rows: Sequence[Sequence[int]], fill: int) -> list[int]:
        more = [fill] * (max(map(len, rows)) - len(row))
        return [*more, *row] if self.padding_side == "left" else [*row, *more]

    @cached_property
    def _cutter(self) -> Tokenizer:
        """A copy that cuts texts, since other threads use the tokenizer itself."""
        return Tokenizer.from_str(self.backend_tokenizer.to_str())

    def decode(
        self, ids: Any, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """Return the text of tokens."""
        tokens = np.atleast_1d(np.asarray(ids, np.int64)).tolist()
        text = str(self.backend_tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))
        is_cleaned = clean_up_tokenization_spaces is not False and cleans_spaces(self)
        return self.clean_up_tokenization(text) if is_cleaned else text

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """Drop the spaces that word tokens leave before punctuation and English endings."""
        for written, cleaned in _CLEANED.items():
            text = text.replace(written, cleaned)
        return text

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """Return a token of the vocabulary; None for an id outside of it."""
        name: str | None = self.backend_tokenizer.id_to_token(token)
        return name

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
    ) -> str:
        """Return a chat rendered by its template, not tokenized."""
        from gralora_fx.core.loading.chat_template import rendered

        assert not tokenize
        template = self.chat_template
        if isinstance(template, dict):  # by their names
            template = template.get("tool_use" if tools is not None and "tool_use" in template else "default")
        if template is None:
            raise ValueError("the tokenizer has no chat template by default")
        values = {**self.special_tokens_map, "add_generation_prompt": add_generation_prompt}
        return rendered(template, messages, tools=tools, documents=None, **values)


def cleans_spaces(tokenizer: Any) -> bool:
    """Return whether a tokenizer's `decode`, transformers' too, cleans up spaces; BPE needs a second setting for it."""
    if not getattr(tokenizer, _CLEANS, False):
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is None or type(backend.model).__name__ != "BPE" or bool(getattr(tokenizer, _CLEANS_BPE, False))


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _templates(directory: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, or several by name; files take precedence over the configuration."""
    files = {path.stem: path for path in sorted((directory / _TEMPLATES).glob("*.jinja"))}
    if (directory / _TEMPLATE).is_file():
        files["default"] = directory / _TEMPLATE
    found = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if found:
        return found["default"] if [*found] == ["default"] else found
    own: Any = config.get("chat_template")
    return {each["name"]: each["template"] for each in own} if isinstance(own, list) else own
