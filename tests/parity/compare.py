"""One function for each thing that must be PEFT's: each returns what differs, an empty string if nothing does."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from acting import idle_sites
from architectures import base_model, base_trace, model_inputs
from cases import Case
from peft.tuners.gralora.layer import GraloraLayer
from peft.tuners.lora.layer import LoraLayer
from peft_oracle import adapted_paths, peft_model, perturb_saved_modules
from safetensors.torch import load
from torch import Tensor, nn
from traces import main_output

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, merge, plan
from gralora_fx.core.adapters.adapter_files import WEIGHTS_NAME
from gralora_fx.core.adapters.checkpoint import checkpoint_parameters
from gralora_fx.core.methods import DoraConfig


@dataclass(frozen=True)
class Tolerance:
    """The largest difference of two computations that is accepted, relative to the largest value."""

    logits: float
    gradients: float
    step: float
    merged: float


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-11, 1e-12, 1e-13),
    torch.float32: Tolerance(1e-5, 1e-4, 1e-5, 1e-6),
    torch.float16: Tolerance(5e-3, 3e-2, 1e-3, 1e-3),
    torch.bfloat16: Tolerance(3e-2, 2e-1, 8e-3, 8e-3),
}

LOSS_SCALE = 256.0

CONFIGS = {"GRALORA": GraloraConfig, "LORA": LoraConfig, "DORA": DoraConfig}
_MAGNITUDE = "lora_magnitude_vector"
_ADAPTERS = re.compile(r"\.(gra)?lora_[AB]")


@dataclass
class Pair:
    """One adapter in PEFT's model and, through its checkpoint, in ours."""

    case: Case
    directory: Path
    theirs: peft.PeftModel
    ours: GraloraModel
    inputs: dict[str, Tensor]
    tensors: dict[str, Tensor]
    tolerance: Tolerance
    gradients: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))

    @classmethod
    def of(cls, case: Case, directory: Path) -> Pair:
        """Let PEFT adapt the base and save it, and load that here."""
        theirs = peft_model(base_model(case.architecture, case.dtype), method=case.method, **case.fields)
        perturb_saved_modules(theirs)
        _perturb_biases(theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT looks for the base's configuration on the hub
            theirs.save_pretrained(str(directory / "theirs"))
        traced = base_trace(case.architecture, case.dtype, case.rank)
        return cls(
            case=case,
            directory=directory,
            theirs=theirs,
            ours=GraloraModel.from_pretrained(traced, directory / "theirs"),
            inputs=model_inputs(case.architecture, case.dtype, case.rank),
            tensors=load((directory / "theirs" / WEIGHTS_NAME).read_bytes()),
            tolerance=TOLERANCES[case.dtype],
        )


def sites(pair: Pair) -> str:
    """Compare the adapted modules with PEFT's, for the configuration as given and as PEFT saved it."""
    expected = adapted_paths(pair.theirs)
    if not expected:
        return "PEFT adapted nothing, so nothing is compared"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is False", UserWarning)
        planned_by_default = plan(pair.ours.traced, CONFIGS[pair.case.method](**pair.case.fields))
    for origin, planned in {"given": planned_by_default, "saved": pair.ours.plans["default"]}.items():
        adapted = {entry.site.path for entry in planned.selected}
        if adapted != expected:
            return f"as {origin}: only here {sorted(adapted - expected)}, only in PEFT {sorted(expected - adapted)}"
    return ""


def count(pair: Pair) -> str:
    """As many values train."""
    expected = pair.theirs.get_nb_trainable_parameters()[0]
    counts = pair.ours.get_nb_trainable_parameters()[0], pair.ours.plans["default"].trainable_parameters
    return "" if counts == (expected, expected) else f"{counts[0]} train, the plan says {counts[1]}, PEFT's {expected}"


def logits(pair: Pair) -> str:
    """Compare the outputs with PEFT's, over its tensors; the adapter must have a part in them."""
    with torch.no_grad():
        expected = peft_output(pair.theirs, pair)
        base = main_output(pair.ours.traced(**pair.inputs))
        actual = main_output(pair.ours(**pair.inputs))
    if not pair.case.starts_at_zero and _far({"": base}, {"": expected}, 1e-4) == "":
        return "the adapter does nothing, so nothing is compared"
    return _far({"logits": actual}, {"logits": expected}, pair.tolerance.logits)


def acts(pair: Pair) -> str:
    """Every adapter changes what its own layer gives, unless it starts at zero."""
    return "" if pair.case.starts_at_zero else ", ".join(idle_sites(pair.ours, pair.inputs))


def gradients(pair: Pair) -> str:
    """Every trained tensor has PEFT's gradient; without adapter dropout both sides are in training mode."""
    training = not pair.case.dropout
    pair.theirs.train(training)
    pair.ours.train(training)
    for output in (peft_output(pair.theirs, pair), main_output(pair.ours(**pair.inputs))):
        # scaled, as in mixed-precision training, so that float16 gradients do not vanish
        loss = (output if output.dtype == torch.float64 else output.float()).square().mean()
        (LOSS_SCALE * loss).backward()
    mine, theirs = _our_parameters(pair), peft_parameters(pair)
    pair.theirs.eval()
    pair.ours.eval()
    absent = {key for key, p in theirs.items() if p.grad is None} ^ {key for key, p in mine.items() if p.grad is None}
    if mine.keys() != theirs.keys() or absent:
        return f"gradients of other tensors: {sorted(mine.keys() ^ theirs.keys()) or sorted(absent)}"
    actual = {key: p.grad for key, p in mine.items() if p.grad is not None}
    expected = {key: p.grad for key, p in theirs.items() if p.grad is not None}
    # a gradient that is zero in exact arithmetic (a key's bias, which softmax does not see) is rounding noise
    noise = 1e-2 * max(float(t.abs().max()) for t in expected.values())
    return _far(actual, expected, pair.tolerance.gradients, noise)


def step(pair: Pair) -> str:
    """One step of the optimizer moves every tensor alike; the tensors are put back afterwards."""
    mine, theirs = _our_parameters(pair), peft_parameters(pair)
    before = [{key: p.detach().clone() for key, p in parameters.items()} for parameters in (mine, theirs)]
    for parameters in (mine, theirs):
        trained = list({id(p): p for p in parameters.values()}.values())
        if pair.case.optimizer == "AdamW":
            # a small epsilon would turn the sign of a gradient that is nearly zero into a whole step
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3 * LOSS_SCALE)
        else:
            optimizer = torch.optim.SGD(trained, lr=0.1 / LOSS_SCALE)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "in the first step")  # in half precision gradients may be zero
            optimizer.step()
    is_moved = any(not torch.equal(parameter, before[1][key]) for key, parameter in theirs.items())
    problem = _far(mine, theirs, pair.tolerance.step) if is_moved else "the step moves nothing"
    with torch.no_grad():
        for parameters, values in zip((mine, theirs), before, strict=True):
            for key, parameter in parameters.items():
                parameter.copy_(values[key])
    return problem


def saved(pair: Pair) -> str:
    """Check that saved files have PEFT's keys and, bit for bit, the tensors that were loaded."""
    pair.ours.save_pretrained(pair.directory / "ours")
    actual = load((pair.directory / "ours" / WEIGHTS_NAME).read_bytes())
    if actual.keys() != pair.tensors.keys():
        extra, absent = sorted(actual.keys() - pair.tensors.keys()), sorted(pair.tensors.keys() - actual.keys())
        return f"only here {extra}, only in PEFT's {absent}"
    changed = [key for key, t in actual.items() if t.dtype != pair.tensors[key].dtype or not t.equal(pair.tensors[key])]
    return f"other tensors: {changed}" if changed else ""


def peft_loads(pair: Pair) -> str:
    """PEFT gives its outputs from the directory that was saved here."""
    loaded = load_in_peft(base_model(pair.case.architecture, pair.case.dtype), pair.directory / "ours")
    with torch.no_grad():
        actual, expected = peft_output(loaded, pair), peft_output(pair.theirs, pair)
    return _far({"logits": actual}, {"logits": expected}, pair.tolerance.logits)


def merged(pair: Pair) -> str:
    """Every weight of the merged model is PEFT's; PEFT's model is spent afterwards."""
    ours = merge(pair.ours)
    theirs = {key: tensor.detach().clone() for key, tensor in merged_parameters(pair.theirs).items()}
    # PEFT cannot unload a saved module without a weight of its own (RoBERTa's head): then its deltas are the oracle
    with contextlib.suppress(AttributeError):
        theirs = dict(pair.theirs.merge_and_unload().named_parameters())
    absent = theirs.keys() - ours.tree.parameters.keys()
    if absent:
        return f"missing: {sorted(absent)}"
    actual = {key: ours.tree.parameters[key] for key in theirs}
    return _far(actual, theirs, pair.tolerance.merged)


# in the order in which they are compared; `merged` spends PEFT's model
ASPECTS: dict[str, Callable[[Pair], str]] = {
    "sites": sites,
    "count": count,
    "logits": logits,
    "each site": acts,
    "gradients": gradients,
    "step": step,
    "saved": saved,
    "PEFT loads": peft_loads,
    "merged": merged,
}


def compare(case: Case, directory: Path) -> dict[str, str]:
    """Return the differences from PEFT in each aspect of a case, an empty string where there are none."""
    with warnings.catch_warnings():  # of names and keys that PEFT ignores in silence
        warnings.filterwarnings("ignore", ".* (finds no numbered layers|applies to no)", UserWarning)
        try:
            pair = Pair.of(case, directory)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            return dict.fromkeys(ASPECTS, f"{type(error).__name__}: {error}")
        return {name: _outcome(aspect, pair) for name, aspect in ASPECTS.items()}


def _outcome(aspect: Callable[[Pair], str], pair: Pair) -> str:
    """Compare one aspect; an error is its outcome, so that the others are compared all the same."""
    try:
        return aspect(pair)
    except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
        return f"{type(error).__name__}: {error}"


# -- PEFT's side --------------------------------------------------------------------------------------------------


def load_in_peft(model: nn.Module, directory: Path) -> peft.PeftModel:
    """Return a base that PEFT adapts from a directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT corrects by itself
        return peft.PeftModel.from_pretrained(model, str(directory)).eval()


def peft_output(theirs: peft.PeftModel, pair: Pair) -> Tensor:
    """Return what PEFT computes, or means to compute.

    `nn.MultiheadAttention` reads the weight of its `out_proj` without calling it, so PEFT's adapter there has no effect
    until it is merged. The oracle of such a model is the base run with W + PEFT's own delta, not PEFT's forward.
    """
    if pair.case.architecture != "multihead":
        return main_output(theirs(**pair.inputs))
    return torch.func.functional_call(
        base_model("multihead", pair.case.dtype), merged_parameters(theirs), (pair.inputs["x"],)
    )


def merged_parameters(theirs: peft.PeftModel) -> dict[str, Tensor]:
    """Return the base's parameters by their own names, with PEFT's deltas and trained copies, open to autograd."""
    parameters: dict[str, Tensor] = {}
    for name, parameter in theirs.named_parameters():
        if not _ADAPTERS.search(name) and "original_module" not in name and _MAGNITUDE not in name:
            own = name.removeprefix("base_model.model.").replace("base_layer.", "")
            parameters[own.replace("modules_to_save.default.", "")] = parameter
    for name, module in theirs.named_modules():
        if isinstance(module, (GraloraLayer, LoraLayer)):
            key = f"{name.removeprefix('base_model.model.')}.weight"
            weight = parameters[key] + module.get_delta_weight("default")
            if "default" in getattr(module, _MAGNITUDE, ()):
                inputs, shape = (0, (1, -1)) if module.fan_in_fan_out else (1, (-1, 1))
                ratio = getattr(module, _MAGNITUDE)["default"].weight / weight.detach().norm(dim=inputs)
                weight = ratio.view(shape) * weight
            parameters[key] = weight.to(parameters[key].dtype)
    return parameters


def _perturb_biases(theirs: peft.PeftModel) -> None:
    """Move the biases that train away from the base, as training does."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and not _ADAPTERS.search(name) and "modules_to_save" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def peft_parameters(pair: Pair) -> dict[str, nn.Parameter]:
    """PEFT's trained parameters by the keys of its checkpoint."""
    by_storage = {p.data_ptr(): p for p in pair.theirs.parameters() if p.requires_grad}
    state = peft.get_peft_model_state_dict(pair.theirs)
    return {key: by_storage[t.data_ptr()] for key, t in state.items() if t.data_ptr() in by_storage}


def _our_parameters(pair: Pair) -> dict[str, nn.Parameter]:
    return checkpoint_parameters(pair.ours.adapter("default"))


# -- distances ----------------------------------------------------------------------------------------------------


def _far(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, floor: float = 0.0) -> str:
    """Name the tensors further apart than `tolerance` times the largest value (or `floor`), the worst first."""
    problems: list[tuple[float, str]] = []
    for key, theirs in expected.items():
        mine, theirs = actual[key].detach(), theirs.detach()
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"{key} is {mine.dtype} {list(mine.shape)}, in PEFT {theirs.dtype} {list(theirs.shape)}"
        distance = float((mine.double() - theirs.double()).abs().max()) if mine.numel() else 0.0
        largest = max(float(theirs.abs().max()) if theirs.numel() else 0.0, floor)
        if not distance <= tolerance * largest:
            problems.append((distance / largest if largest else float("inf"), key))
    return "; ".join(f"{key} is {distance:.1e} apart" for distance, key in sorted(problems, reverse=True)[:3])
