"""Tiny tokenizers of model families that call tools: their tokens, and templates of the same kind as theirs."""

from __future__ import annotations

from tiny_tokenizers import SPECIAL
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
_TEXT = "{{ m.role }}: {{ m.content }}\n"
_END = "{% if add_generation_prompt %}assistant: {% endif %}"


def _template(call: str, before: str = "") -> str:
    calls = "{% if m.tool_calls %}{% for c in m.tool_calls %}" + call + "{% endfor %}\n{% endif %}"
    return _TOOLS + before + "{% for m in messages %}" + _TEXT + calls + "{% endfor %}" + _END


_JSON = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
# by the name of the form: the template, and its tokens with whether they are special
FAMILIES: dict[str, tuple[str, dict[str, bool]]] = {
    "hermes": (_template(f"<tool_call>\n{_JSON}\n</tool_call>"), {"<tool_call>": False, "</tool_call>": False}),
    "mistral": (  # which joins arguments, as text, with other text
        _template(f"[TOOL_CALLS][{_JSON}]").replace(
            "{{ c.function.arguments | tojson }}", "{{ c.function.arguments + '' }}"
        ),
        {"[TOOL_CALLS]": True},
    ),
    "mistral-args": (
        _template("[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"),
        {"[TOOL_CALLS]": True, "[ARGS]": True},
    ),
    "llama3": (
        _template(_JSON.replace('arguments"', 'parameters"'), "Environment: ipython\n"),
        {"<|python_tag|>": True},
    ),
    "granite": (_template(f"<|tool_call|>[{_JSON}]"), {"<|tool_call|>": True}),
    "json": ("{% for m in messages %}" + _TEXT + "{% endfor %}" + _END, {}),
}


def byte_tokenizer(template: str, tokens: dict[str, bool]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of ASCII and é as bytes, with a newline, a template of chats, and more tokens.

    Args:
        template: The template.
        tokens: The tokens, and whether each is special.
    """
    alphabet = [chr(code) for code in range(33, 127)] + ["\u0120", "\u00c3", "\u00a9", "\u010a"]
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    own = Tokenizer(models.BPE(vocabulary, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    pad, start, end = SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, pad_token=pad, bos_token=start, eos_token=end)
    for token, is_special in tokens.items():
        added = AddedToken(token, special=is_special, normalized=False)
        tokenizer.add_tokens([added], special_tokens=is_special)
    tokenizer.chat_template = template
    return tokenizer


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family."""
    return byte_tokenizer(*FAMILIES[name])
