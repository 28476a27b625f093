"""Unknown fields of a configuration: what they mean in other programs, and which field to use instead."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from gralora_fx.errors import ConfigError, an, listed, shown

# names of the same setting here, in PEFT, in the paper's code and in other programs
_SAME = (
    ("r", "rank", "lora_r", "lora_rank", "lora_dim"),
    ("alpha", "lora_alpha", "gralora_alpha"),
    ("dropout", "gralora_dropout", "lora_dropout"),
    ("gralora_k", "k"),
    ("init_weights", "init_lora_weights", "init_gralora_weights"),
    ("target_modules", "targets", "lora_target_modules", "lora_target"),
)
# forms that change an adapter's output or the trained parameters, by the field that selects them
_FORMS = {
    "use_qalora": "QA-LoRA, which pools the input",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "lora_bias": "a bias of lora_B",
    "layer_replication": "layer replication, which changes the base model",
    "trainable_token_indices": "trained embeddings of single tokens",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which also trains singular values",
    "velora_config": "VeLoRA, which compresses activations in training",
    "monteclora_config": "MonteCLoRA, which samples its factors",
    "megatron_config": "parallel layers of Megatron",
    "ensure_weight_tying": "adapters that stay tied as the weights are",
    "use_rslora": "rsLoRA, which LoraConfig has",
    "use_dora": "DoRA, which LoraConfig has",
    "gralora_k": "GraLoRA's number of blocks, which GraloraConfig has",
    "gralora_k_pattern": "GraLoRA's number of blocks, which GraloraConfig has",
    "hybrid_r": "the LoRA beside GraLoRA's blocks, which GraloraConfig has",
}
# fields for PEFT's bookkeeping, initialization and runtime: a saved adapter computes the same without them
_WITHOUT_EFFECT = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "merge_weights",
}


def check_known(fields: Mapping[str, Any], known: Collection[str], origin: str, method: str) -> None:
    """Check that every unknown field of a file has no effect: it is null, False, zero or empty."""
    ignored = {name: value for name, value in fields.items() if name not in known and name not in _WITHOUT_EFFECT}
    said = [f"{_key(name)}={shown(value)}{_hint(name, known)}" for name, value in sorted(ignored.items()) if value]
    if said:
        verb = "are" if len(said) > 1 else "is"
        raise ConfigError(
            f"{origin}: {listed(said)} {verb} not supported in {an(method)} configuration: the adapter might compute "
            "something other than what it was trained for; merge it with the program that wrote it and use the merged "
            "model, or train without it. Fields that change no output can be removed from the file"
        )


def check_keywords(names: Iterable[str], known: Collection[str], owner: str) -> None:
    """Check that keyword arguments are fields of a configuration."""
    for name in names:
        if name in known:
            continue
        if field := _meant(name, known):
            remedy = f"; use {field}"
        elif form := _form(name):
            remedy = f": it is {form}"
        else:
            remedy = f"; its fields are {listed(known, len(known))}"
        raise ConfigError(f"{owner} has no field {_key(name)}{remedy}")


def _key(name: str) -> str:
    return name if name.isidentifier() and len(name) < 60 else shown(name)


def _hint(name: str, known: Collection[str]) -> str:
    if form := _FORMS.get(name):
        return f" ({form})"
    field = _meant(name, known)
    return f" (is {field} meant?)" if field else ""


def _same(name: str) -> tuple[str, ...]:
    """Return all names of the same setting, given one of them."""
    return next((names for names in _SAME if name in names), (name,))


def _form(name: str) -> str | None:
    return next((_FORMS[other] for other in _same(name) if other in _FORMS), None)


def _meant(name: str, known: Collection[str]) -> str | None:
    """Return the field that a name stands for in another program, or that is spelled alike; None if there is none."""
    same = next((field for field in _same(name) if field in known), None)
    if same or _form(name):
        return same
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), None)
