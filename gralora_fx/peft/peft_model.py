"""`get_peft_model` and `PeftModel`: a rewritten model with PEFT's arguments and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods import read_config
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ConfigError, MergeError, RewriteError, an
from gralora_fx.peft.peft_arguments import check_adapter_dtype, check_unsupported, name_of, traced_with_cache
from gralora_fx.peft.peft_configs import own_config


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    **tracing: Any,
) -> PeftModel:
    """Trace a model, and insert a new adapter into its graph.

    A model that generates is traced with its cache, so that `generate` works.

    Args:
        model: The base model, whose parameters are shared, and stop requiring gradients.
        peft_config: A configuration of this package or of PEFT's.
        adapter_name: Name of the adapter.
        mixed: Must be False: a model takes adapters of all methods in any case.
        autocast_adapter_dtype: Whether adapters of half-precision layers are float32; must be True for such a model.
        revision: Revision of the base model, recorded in the configuration.
        low_cpu_mem_usage: Accepted and ignored: an adapter's tensors are allocated immediately.
        **tracing: Arguments of `gralora_fx.trace`, such as `task`, `example_inputs` and `blocks`.

    Raises:
        ConfigError: The configuration is of an unknown method, or an argument is not supported.
        TraceError: The model cannot be traced.
        TargetError: The configuration does not fit the model.
        RewriteError: The model has adapters already.
    """
    if mixed:
        raise ConfigError("mixed=True is not needed: a model takes adapters of all methods; leave it out")
    check_adapter_dtype(model, autocast_adapter_dtype)
    config = own_config(peft_config)
    changes = {"base_model_name_or_path": config.base_model_name_or_path or name_of(model)}
    config = config.changed(**changes, **({} if revision is None else {"revision": revision}))
    made = _class_for(PeftModel, config)(traced_with_cache(model, tracing))
    made.add_adapter(adapter_name, config)
    made.freeze_base()
    return made._with_source(model)


class PeftModel(GraloraModel):
    """A `GraloraModel` with the method signatures and return values of PEFT's `PeftModel`."""

    _source: nn.Module | None = None

    def __new__(cls, traced: TracedModel, *_: Any, **__: Any) -> Self:
        """Create a model over a trace."""
        if isinstance(traced, nn.Module):
            raise RewriteError(f"{an(cls.__name__)} is made by get_peft_model(model, config); call that")
        return super().__new__(cls, traced)  # type: ignore[return-value]

    @classmethod
    def from_pretrained(  # type: ignore[override]  # PEFT's arguments
        cls,
        model: nn.Module | TracedModel,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        **tracing: Any,
    ) -> PeftModel:
        """Trace a model, and load a saved adapter into its graph.

        Args:
            model: The base model, or its trace.
            model_id: Directory or hub id of the adapter.
            adapter_name: Name to give the adapter.
            is_trainable: Whether the adapter trains; otherwise the model is in evaluation mode.
            config: Must be None or equal to the saved configuration.
            autocast_adapter_dtype: As in `get_peft_model`.
            ephemeral_gpu_offload: Must be False.
            low_cpu_mem_usage: Accepted, and ignored.
            key_mapping: Must be None: keys are read as PEFT writes them.
            revision: Revision of the hub repository.
            subfolder: Folder of the adapter within the directory.
            **tracing: Arguments of `gralora_fx.trace`.

        Raises:
            ConfigError: The adapter's configuration is missing or invalid, or an argument is not supported.
            TraceError: The model cannot be traced.
            TargetError: The configuration does not fit the model.
            CheckpointError: The tensors do not fit.
        """
        check_unsupported(ephemeral_gpu_offload=ephemeral_gpu_offload, key_mapping=key_mapping)
        check_adapter_dtype(model, autocast_adapter_dtype)
        directory = Path(model_id, subfolder) if subfolder else model_id
        saved = read_config(directory, revision=revision)
        if config is not None and own_config(config).changed(inference_mode=True) != saved.changed(inference_mode=True):
            raise ConfigError(f"config differs from {directory}'s and would misread its tensors; leave it out")
        kind = _class_for(cls, saved)
        made: PeftModel = super(PeftModel, kind).from_pretrained(  # type: ignore[assignment]
            traced_with_cache(model, tracing), directory, adapter_name=adapter_name, revision=revision
        )
        if not is_trainable:
            made.set_requires_grad(adapter_name, False)
            made.eval()
        return made._with_source(model)

    def _with_source(self, model: object) -> Self:
        self.__dict__["_source"] = model if isinstance(model, nn.Module) else None  # no submodule: the graph is
        return self

    # -- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        config_or_plan: AdapterConfig | RewritePlan | Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter; the first one becomes active.

        Args:
            adapter_name: A new name.
            config_or_plan: A configuration of this package or of PEFT's, or a plan.
            low_cpu_mem_usage: Accepted, and ignored.
            autocast_adapter_dtype: As in `get_peft_model`.
        """
        check_adapter_dtype(self, autocast_adapter_dtype)
        known = config_or_plan if isinstance(config_or_plan, RewritePlan) else own_config(config_or_plan)
        super().add_adapter(adapter_name, known)

    def load_adapter(  # type: ignore[override]  # PEFT's arguments
        self,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> None:
        """Load a saved adapter under a new name, or into an adapter of the same configuration.

        Args:
            model_id: Directory or hub id of the adapter.
            adapter_name: Its name here.
            is_trainable: Whether a new adapter trains; without, the model is in evaluation mode afterwards.
            torch_device: Accepted, and ignored: tensors go where the adapter's are.
            autocast_adapter_dtype: As in `get_peft_model`.
            ephemeral_gpu_offload: Must be False.
            low_cpu_mem_usage: Accepted, and ignored.
            key_mapping: Must be None.
            revision: Revision of the hub repository.
            subfolder: Folder of the adapter within the directory.
        """
        check_unsupported(ephemeral_gpu_offload=ephemeral_gpu_offload, key_mapping=key_mapping)
        check_adapter_dtype(self, autocast_adapter_dtype)
        trains = None if adapter_name in self.configs and not is_trainable else is_trainable
        directory = Path(model_id, subfolder) if subfolder else model_id
        super().load_adapter(directory, adapter_name, trains, revision=revision)
        if not is_trainable:
            self.eval()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several.

        Args:
            adapter_name: Name or names of adapters.
            inference_mode: Whether they are frozen.
        """
        super().set_adapter(adapter_name)
        if inference_mode:
            self.set_requires_grad(adapter_name, False)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Return whether an adapter is active."""
        return bool(self.active_adapters)

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]  # PEFT's arguments
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        **others: Any,
    ) -> None:
        """Write adapters and the model's card, `README.md`, with PEFT's arguments.

        Args:
            save_directory: Where to write.
            safe_serialization: Must be True.
            selected_adapters: Names of the adapters; None for all.
            save_embedding_layers: "auto" or False: only modules of `modules_to_save` are trained beside adapters.
            is_main_process: Whether to write.
            path_initial_model_for_weight_conversion: Must be None.
            state_dict: The model's state dict, as Accelerate gathers it.
            **others: Arguments for `push_to_hub` that PEFT hands on.
        """
        check_unsupported(path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion)
        if save_embedding_layers not in ("auto", False):
            raise ConfigError(
                "save_embedding_layers=True would save what is not trained; name the embedding in modules_to_save, "
                "which trains it and saves it with the adapter"
            )
        super().save_pretrained(
            save_directory,
            selected_adapters=selected_adapters,
            safe_serialization=safe_serialization,
            is_main_process=is_main_process,
            state_dict=state_dict,
        )

    # -- the base ---------------------------------------------------------------------------------------------------

    def merge_and_unload(  # type: ignore[override]  # PEFT's arguments and result
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module | TracedModel:
        """Fold adapters into the base model's own weights, and return the original model.

        Args:
            progressbar: Accepted, and ignored.
            safe_merge: Whether to check that folded weights are finite before any changes.
            adapter_names: Names of the adapters; None for the active ones.
        """
        self._check_source()
        merged = super().merge_and_unload(safe_merge=safe_merge, adapter_names=adapter_names)
        return merged if self._source is None else self._source

    def unload(self) -> nn.Module | TracedModel:  # type: ignore[override]
        """Remove every adapter, and return the original base model."""
        self._check_source()
        unloaded = super().unload()
        return unloaded if self._source is None else self._source

    def _check_source(self) -> None:
        """Check that the original model still shares its parameters with the graph."""
        if self._source is None:
            return
        own = {id(parameter) for parameter in self._source.parameters()}
        graph = self._state.base.parameters_now().values()
        if any(id(parameter) not in own for parameter in graph):
            raise MergeError(
                "parameters of the model were replaced since it was traced (distributed, or loaded with assign=True), "
                "so that the given model does not have them any more; use gralora_fx.merge, which returns a trace"
            )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare the inputs of a step, as transformers' `generate` does.

        Args:
            *args: As in transformers' method.
            **kwargs: As in transformers' method.
        """
        view: Any = self.base_model
        return view.prepare_inputs_for_generation(*args, **kwargs)

    @property
    def name_or_path(self) -> str:
        """Path or hub id that the base model was loaded from."""
        return self.traced.tokenizer_source or ""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and copies, whose base is a trace."""
        return {name: value for name, value in super().__getstate__().items() if name != "_source"}


class PeftModelForCausalLM(PeftModel):
    """A causal language model."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model."""


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classification model."""


class PeftModelForTokenClassification(PeftModel):
    """A token classification model."""


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answering model."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose outputs are hidden states."""


CLASSES: dict[str, type[PeftModel]] = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def _class_for(cls: type[PeftModel], config: AdapterConfig) -> type[PeftModel]:
    """Return the subclass for a configuration's task if `PeftModel` itself was called, else the class called."""
    return CLASSES.get(config.task_type or "", PeftModel) if cls is PeftModel else cls
