"""A model whose answers are known: what it says is the same on every processor and in every draw."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

GREETING = "Hi."
_END = "</s>"
# behind a prompt the greeting and its end; in a call the tool whose name begins with a g, if there is one; then the end
_NEXT = {" ": "H", "\n": "H", "o": "H", "H": "i", "i": ".", ".": _END, '"': "g", "</tool_call>": _END}


def greeting_model(tokenizer: PreTrainedTokenizerBase, **sizes: Any) -> PreTrainedModel:
    """Return a tiny Llama that answers a prompt that ends in a space, a newline or an o with `GREETING`.

    Nothing attends, so the last token alone says what follows: the token of `_NEXT` by far, where the form of the
    answer permits it, else each with about the same probability.

    Args:
        tokenizer: A tokenizer of letters, with a token for the end of a call.
        sizes: Fields of its configuration.
    """
    model = tiny_model("llama", vocab_size=len(tokenizer), **sizes)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding[:, : len(_NEXT)] = head[:, : len(_NEXT)] = 0
        for axis, texts in enumerate(_NEXT.items()):
            (last,), (following,) = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
            embedding[last] = torch.eye(len(embedding[last]))[axis]
            head[following, axis] = 16
    return model
