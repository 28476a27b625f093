"""Saving and loading of a model's adapters, as files in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.adapters.adapter import adapter_names as as_names
from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.core.model.switching import Switching, planned_for
from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.errors import CheckpointError, ConfigError, RewriteError


class AdapterFiles(Switching):
    """The files of a model's adapters.

    Attributes:
        _state: The graph and its adapters, of the model.
    """

    _state: AdapterGraph

    def save_pretrained(
        self,
        directory: str | Path,
        adapter_names: Sequence[str] | str | None = None,
        *,
        selected_adapters: Sequence[str] | str | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        save_function: object = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write adapters in PEFT's format: `default` into `directory`, others into a folder of their name in it.

        Args:
            directory: Where to write; made if it does not exist.
            adapter_names: Names of the adapters; None for all.
            selected_adapters: PEFT's name for `adapter_names`.
            is_main_process: Whether to write at all; the other processes of a distributed training do not. Of a model
                that `fully_shard` has distributed, every process must call this, and the first one writes.
            state_dict: The model's state dict, as Accelerate gathers it; it must hold the model's current values. Of a
                distributed model it is what is written, by the process that calls this.
            safe_serialization: Must be True: pickles are not written.
            save_function: Accepted for Accelerate's loops, and ignored: the files are always written by safetensors.
            max_shard_size: Accepted for `push_to_hub`, and ignored: an adapter is one file.

        All of them are written, or none after an error; other files in the directory stay.

        Raises:
            RewriteError: An adapter does not exist.
            CheckpointError: The directory cannot be written, or the state dict holds other values; its contents are
                unchanged.
        """
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False writes a pickle, which is not supported; leave it out")
        if adapter_names is not None and selected_adapters is not None:
            raise RewriteError("adapter_names and selected_adapters are one argument; give one of them")
        from gralora_fx.core.adapters.adapter import checkpoint_parameters
        from gralora_fx.core.adapters.base import is_sharded
        from gralora_fx.core.adapters.checkpoint import (
            check_state_dict,
            gathered,
            is_writer,
            reshard,
            whole_tensors,
            write_adapters,
        )

        chosen = selected_adapters if adapter_names is None else adapter_names
        names = list(self._state.adapters) if chosen is None else as_names(chosen)
        adapters = {"" if name == "default" else name: self._state[name] for name in names}
        is_distributed = any(is_sharded(adapter.parameters()) for adapter in adapters.values())
        if state_dict is not None and is_distributed:  # Accelerate has gathered it, and one process calls this
            if is_main_process:
                whole = {name: whole_tensors(adapter, state_dict) for name, adapter in adapters.items()}
                write_adapters(adapters, whole, directory, self._state.base.traced)
            return
        for adapter in adapters.values() if state_dict is not None else ():
            check_state_dict(adapter, state_dict or {})
        reshard(self)  # type: ignore[arg-type]  # a part of a module
        tensors = {name: gathered(checkpoint_parameters(adapter)) for name, adapter in adapters.items()}
        if is_main_process and (is_writer() or not is_distributed):
            write_adapters(adapters, tensors, directory, self._state.traced)

    def load_adapter(
        self,
        directory: str | Path,
        adapter_name: str = "default",
        is_trainable: bool | None = None,
        *,
        revision: str | None = None,
        strict_base: bool = False,
    ) -> None:
        """Load a PEFT-format adapter under a new name, or into an existing adapter of the same configuration.

        Args:
            directory: Local directory or hub id.
            adapter_name: Name of the adapter.
            is_trainable: Whether its tensors train; None for the default: active adapters train, others do not.
            revision: Revision of the hub repository.
            strict_base: Whether to refuse an adapter that is not known to be of this base, instead of a warning.

        Raises:
            ConfigError: The adapter's configuration is missing, invalid, or differs from the existing adapter's.
            TargetError: It does not fit the model.
            CheckpointError: The tensors do not fit the model or their configuration, or the base is another one.
                Nothing has changed, after any error.
        """
        from gralora_fx.core.adapters.adapter_files import read_adapter
        from gralora_fx.core.adapters.checkpoint import load_tensors, settled_base

        config, tensors = read_adapter(directory, revision=revision)
        base = settled_base(config, self._state.traced, directory, strict=strict_base)
        if adapter_name in self._state.adapters:
            with self._state.writing():
                self._state.check_not_merged("load tensors")
                _check_same_config(self._state[adapter_name], planned_for(self._state.traced, config), adapter_name)
                load_tensors(self._state[adapter_name], tensors, self._state.traced.tree, str(directory))
        else:
            self.add_adapter(adapter_name, config)
            try:
                load_tensors(self._state[adapter_name], tensors, self._state.traced.tree, str(directory))
            except CheckpointError:
                self._state.discard(adapter_name)
                raise
        self._state.note_base(adapter_name, base)
        if is_trainable is not None:
            self._state[adapter_name].requires_grad_(is_trainable)


def _check_same_config(adapter: ModelAdapter, other: RewritePlan, name: str) -> None:
    mine, theirs = (
        {planned.site.path: (planned.sizes, planned.scale) for planned in chosen.selected}
        for chosen in (adapter.plan, other)
    )
    if mine != theirs or adapter.plan.saved_modules != other.saved_modules:
        raise ConfigError(
            f"adapter {name!r} exists with another configuration; delete it first or load under another name"
        )
