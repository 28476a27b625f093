"""Captures of tiny models, made once a process: half of the tests' time is torch.export's.

A model that has everything of an earlier one but its values is given a copy of that one's graph over its own tensors.
All that comes before and after is done: normalizing, and the comparison with the model. `make test-all` captures each.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from gralora_fx.core.tracing.draft import Captured, Draft
from gralora_fx.core.tracing.graph_record import deep_copy

_MOST = 2**21  # elements of a model whose capture is kept
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_NOTES = ("name_or_path", "_is_hf_initialized")  # where a model came from
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def once(capture: Callable[[Draft], Captured]) -> Callable[[Draft], Captured]:
    """Return a `capture` that is called once for all models of transformers that are alike."""
    kept: dict[str, tuple[Captured, dict[str, Tensor]]] = {}

    def captured(draft: Draft) -> Captured:
        key = key_of(draft)
        if key is None:
            return capture(draft)
        own = dict(_tensors(draft.model))
        if key not in kept:
            result = capture(draft)
            copy = deep_copy(result.graph_module, {id(it): it for _, it in _tensors(result.graph_module)})
            kept[key] = dataclasses.replace(result, graph_module=copy), own
            return result
        first, tensors = kept[key]
        memo = {id(tensor): own[path] for path, tensor in tensors.items()}
        return dataclasses.replace(first, **vars(draft), graph_module=deep_copy(first.graph_module, memo))

    return captured


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def key_of(draft: Draft) -> str | None:
    """Return what says all that a capture depends on; None of a model in which something may be changed by hand."""
    model: Any = draft.model
    tensors = dict(_tensors(model))
    if not isinstance(model, PreTrainedModel) or sum(tensor.numel() for tensor in tensors.values()) > _MOST:
        return None
    said: list[Any] = [
        model.config,
        draft.constants,
        draft.dynamic,
        sorted(draft.held),
        draft.evaluates,
        draft.evaluated,
    ]
    for path, part in model.named_modules():
        is_known = type(part).__module__.startswith(("torch.nn.", "transformers."))
        if not is_known or _has_own_forward(part) or any(vars(part)[hooks] for hooks in _HOOKS):
            return None
        plain = {name: value for name, value in vars(part).items() if isinstance(value, _PLAIN) and name not in _NOTES}
        config = getattr(part, "config", None)
        said.append((path, type(part), sorted(plain.items()), getattr(config, "_attn_implementation", None)))
    first: dict[int, str] = {}
    for path, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            return None
        tied = first.setdefault(id(tensor), path)
        said.append((path, tied, tensor.shape, tensor.dtype, tensor.stride(), tensor.device, tensor.requires_grad))
    leaves, spec = tree_flatten(dict(draft.sample))
    said.append(spec)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            values = leaf.tolist() if not leaf.is_floating_point() else None
            said.append((leaf.shape, leaf.dtype, leaf.stride(), leaf.requires_grad, values))
        else:
            said.append(leaf)
    said.append((torch.is_grad_enabled(), torch.get_default_dtype()))
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _has_own_forward(part: nn.Module) -> bool:
    """Return whether an object has another forward than its class; a trace binds arguments to that of a model."""
    forward = vars(part).get("forward")
    function = getattr(getattr(forward, "func", forward), "__func__", None)
    return forward is not None and function is not type(part).forward
