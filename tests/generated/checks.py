"""Checks of a drawn module: each holds, is refused by an error of ours, or finds a fault."""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from transformers.utils import ModelOutput

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, merge, rewrite, trace
from gralora_fx.errors import GraloraError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load
from tests.generated.modules import Description
from tests.generated.oracles import DenseOracle, PeftOracle

CHECKS: dict[str, Callable[[Subject], None]] = {}
EXPORTS = ("export", "export with a pass", "adapters as data")
COARSE = ("bf16",)  # layers that round more than the others


class Wrong(AssertionError):
    """Something that is not as the oracle has it."""


class Void(Exception):
    """Nothing to compare with: the oracle itself cannot do it."""


@dataclass(frozen=True)
class Verdict:
    """An outcome of a check: `holds`, `said` (a warning tells what differs), `refused` or `FAULT`, and the text."""

    seed: int
    check: str
    outcome: str
    text: str = ""


def check(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


@dataclass
class Subject:
    """A drawn module with its adapter, ours and the oracle's.

    Attributes:
        module: the eager module.
        model: ours, with adapters that do something.
        oracle: what is right.
        peft: whether the oracle is PEFT.
        warned: what the trace and the rewrite warned of.
    """

    description: Description
    module: nn.Module
    inputs: tuple[Tensor, ...]
    model: GraloraModel
    oracle: DenseOracle | PeftOracle
    warned: list[str] = field(default_factory=list)

    @property
    def peft(self) -> bool:
        return isinstance(self.oracle, PeftOracle)

    @property
    def loose(self) -> float:
        kinds = {part.kind for layer in self.description.layers for part in (layer, *layer.parts)}
        return 300.0 if kinds & set(COARSE) else 1.0


def subject(description: Description) -> Subject:
    """Trace and rewrite a drawn module, and make its oracle."""
    module, inputs = description.module(), tuple(description.inputs().values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = trace(copy.deepcopy(module), inputs)
        config = eval(
            description.adapter.text(),
            {"GraloraConfig": GraloraConfig, "LoraConfig": LoraConfig, "DoraConfig": DoraConfig},
        )
        model = fill(rewrite(traced, config), description.seed)
    warned = [text for text in map(_text, caught) if re.search("gradient|training|backward", text)]
    warned = [text for text in warned if "checkpointing is not part" not in text]
    model.eval()
    return Subject(description, module, inputs, model, oracle_of(description, module, model), warned)


def _text(warning: warnings.WarningMessage) -> str:
    return str(warning.message)


def fill(model: GraloraModel, seed: int) -> GraloraModel:
    """Draw the adapters' parameters, so that they do something; magnitudes stay near their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(parameter * (1 + 0.5 * drawn) if "magnitude" in name else drawn)
    return model


def oracle_of(description: Description, module: nn.Module, model: GraloraModel) -> DenseOracle | PeftOracle:
    """Return PEFT where it takes the module and computes what its adapter means, else the dense formula."""
    if not description.is_dense():
        try:
            return PeftOracle(module, model).eval()
        except ValueError:  # PEFT refuses it
            pass
    return DenseOracle(module, model, description).eval()


def leaves(output: Any) -> list[Tensor]:
    """Return the tensors of an output."""
    return [
        leaf
        for leaf in pytree.tree_leaves(dict(output) if isinstance(output, ModelOutput) else output)
        if isinstance(leaf, Tensor)
    ]


def same(actual: Any, expected: Any, tolerance: float = 1e-4, what: str = "outputs") -> None:
    """Raise if tensors differ by more than a share of the largest."""
    ours, theirs = leaves(actual), leaves(expected)
    if len(ours) != len(theirs):
        raise Wrong(f"{what}: {len(ours)} tensors, not {len(theirs)}")
    for left, right in zip(ours, theirs, strict=True):
        if left.shape != right.shape:
            raise Wrong(f"{what}: shape {tuple(left.shape)}, not {tuple(right.shape)}")
        if not right.isfinite().all():
            raise Void("the oracle is not finite")
        difference = float((left.detach().double() - right.detach().double()).abs().max()) if right.numel() else 0.0
        if not difference <= tolerance * (float(right.detach().abs().max()) if right.numel() else 0.0) + 2e-7:
            raise Wrong(f"{what} differ by {difference:.1e}")


def equal(actual: Any, expected: Any, what: str) -> None:
    """Raise if tensors differ in any bit."""
    if not all(torch.equal(left, right) for left, right in zip(leaves(actual), leaves(expected), strict=True)):
        raise Wrong(f"{what}: not to the bit")


def asked(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Call the oracle, which may be unable to."""
    try:
        return function(*inputs)
    except Exception as error:  # any: what eager PyTorch refuses is not ours to compute
        raise Void(str(error)) from error


@check
def evaluation(it: Subject) -> None:
    expected = asked(copy.deepcopy(it.oracle), *it.inputs)
    same(copy.deepcopy(it.model)(*it.inputs), expected, 1e-4 * it.loose)
    with torch.no_grad():
        same(copy.deepcopy(it.model)(*it.inputs), expected, 1e-4 * it.loose, "outputs without gradients")


@check
def sizes(it: Subject) -> None:
    _at_sizes(it, copy.deepcopy(it.model))


def _at_sizes(it: Subject, function: Callable[..., Any], *, few: bool = False) -> None:
    """Compare at other sizes; where some are refused and none is wrong, raise the first refusal."""
    refusals = []
    for other in other_sizes(it.description, few=few):
        inputs = tuple(it.description.inputs(other).values())
        try:
            with torch.no_grad():
                expected = copy.deepcopy(it.oracle)(*inputs)
        except Exception:  # noqa: BLE001  any: eager PyTorch cannot do it either
            continue
        try:
            with torch.no_grad():
                same(function(*inputs), expected, 3e-4 * it.loose, f"at {other} outputs")
        except GraloraError as error:
            refusals.append(error)
        except Void:
            continue
    if refusals:
        raise refusals[0]


def other_sizes(description: Description, *, few: bool = False) -> Iterator[dict[str, int]]:
    """Yield sizes: one, the sample's neighbours, its double, a prime, and four times as many."""
    at = description.sizes()
    for axis in description.axes():
        size = at[axis]
        for other in (1, 2 * size + 3) if few else (1, size - 1, size + 1, 2 * size, 13, 4 * size):
            if other:
                yield {axis: other}


@check
def training(it: Subject) -> None:
    try:
        _trains(it)
    except Wrong as error:
        if it.warned:
            raise Said(f"{error}; {it.warned[0]}") from error
        raise


class Said(Exception):
    """A difference that a warning has told of."""


def loss(output: Any) -> Tensor:
    """Return a number that every element of every output has a part in."""
    total = torch.zeros(())
    for leaf in leaves(output):
        if leaf.is_floating_point():
            weights = torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)
            total = total + (leaf.float() * weights).sum() / leaf.numel() + leaf.float().pow(2).mean() * 0.1
    return total


def _trains(it: Subject) -> None:
    ours, theirs = copy.deepcopy(it.model).train(), copy.deepcopy(it.oracle).train()
    adapters = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    if set(adapters) != set(theirs.adapters):
        raise Wrong("other parameters are trained")
    steps = torch.optim.SGD(adapters.values(), 0.05), torch.optim.SGD(theirs.adapters.values(), 0.05)
    for step in range(2):
        inputs = [[t.clone().requires_grad_(t.is_floating_point()) for t in it.inputs] for _ in range(2)]
        expected = asked(theirs, *inputs[1])
        output = ours(*inputs[0])
        same(output, expected, 1e-3 * it.loose, f"step {step}: outputs")
        if not loss(expected).requires_grad:
            raise Void("nothing is trained")
        asked(loss(expected).backward)
        if any(p.grad is not None and not float(p.grad.abs().max()) < 1e3 for p in theirs.adapters.values()):
            raise Void("too steep to compare")
        loss(output).backward()
        for left, right in zip(*inputs, strict=True):
            _same_gradient(left.grad, right.grad, it, f"step {step}: gradients of an input")
        for name, parameter in adapters.items():
            _same_gradient(parameter.grad, theirs.adapters[name].grad, it, f"step {step}: gradients of {name}")
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
    _same_buffers(ours, theirs, it)
    ours.eval(), theirs.eval()
    same(ours(*it.inputs), theirs(*it.inputs), 3e-3 * it.loose, "after training outputs")


def _same_gradient(actual: Tensor | None, expected: Tensor | None, it: Subject, what: str) -> None:
    if expected is None or float(expected.abs().max()) < 1e-6:
        if actual is not None and float(actual.abs().max()) > 1e-5:
            raise Wrong(f"{what}: {float(actual.abs().max()):.1e}, not none")
        return
    if actual is None:
        raise Wrong(f"{what}: none, not {float(expected.abs().max()):.1e}")
    difference = float((actual - expected).abs().max())
    if not difference <= 2e-3 * it.loose * float(expected.abs().max()) + 2e-6:
        raise Wrong(f"{what} differ by {difference:.1e} of {float(expected.abs().max()):.1e}")


def _same_buffers(ours: nn.Module, theirs: nn.Module, it: Subject) -> None:
    mine = {name.removeprefix("graph_module."): buffer for name, buffer in ours.named_buffers()}
    for name, buffer in theirs.named_buffers():
        key = name.removeprefix("module.").removeprefix("base_model.model.").replace(".base_layer", "")
        if key in mine:
            same(mine[key].float(), buffer.float(), 1e-3 * it.loose, f"buffer {key}")


@check
def double_backward(it: Subject) -> None:
    if it.description.seed % 4 or it.warned:
        raise Void("now and then")
    grads = []
    for model in (copy.deepcopy(it.oracle).train(), copy.deepcopy(it.model).train()):
        adapters = (
            model.adapters
            if model is not it.model and hasattr(model, "adapters") and isinstance(model.adapters, dict)
            else None
        )
        named = adapters or {n: p for n, p in model.named_parameters() if p.requires_grad}
        run = asked if not grads else (lambda function, *args: function(*args))
        grads.append(run(_second_order, model, named, *it.inputs))
    for name, expected in grads[0].items():
        _same_gradient(grads[1][name], expected, it, f"second-order gradients of {name}")


def _second_order(model: nn.Module, named: dict[str, Tensor], *inputs: Tensor) -> dict[str, Tensor | None]:
    first = torch.autograd.grad(loss(model(*inputs)), list(named.values()), create_graph=True, allow_unused=True)
    penalty = sum((g.pow(2).sum() for g in first if g is not None), torch.zeros(()))
    second = torch.autograd.grad(penalty, list(named.values()), allow_unused=True)
    return dict(zip(named, second, strict=True))


@check
def disabling(it: Subject) -> None:
    model = copy.deepcopy(it.model)
    with model.disable_adapter():
        output = model(*it.inputs)
    same(output, asked(copy.deepcopy(it.module), *it.inputs), 1e-4 * it.loose, "without the adapter outputs")


@check
def merging(it: Subject) -> None:
    same(_merged(it.model)(*it.inputs), copy.deepcopy(it.model)(*it.inputs), 2e-4 * it.loose)


def _merged(model: GraloraModel) -> Any:
    """Merge, and give a tied layer a weight of its own where that is what the error says to do."""
    try:
        return merge(model)
    except GraloraError as error:
        if "untie=True" not in str(error):
            raise
        return merge(model, untie=True)


@check
def merging_and_back(it: Subject) -> None:
    model = copy.deepcopy(it.model)
    state = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    model.merge_adapter()
    same(copy.deepcopy(model)(*it.inputs), copy.deepcopy(it.model)(*it.inputs), 2e-4 * it.loose, "merged outputs")
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor):
            equal(value, state[key], key)


@check
def copying(it: Subject) -> None:
    first = copy.deepcopy(it.model)
    second = copy.deepcopy(first)
    equal(first(*it.inputs), second(*it.inputs), "a copy")


@check
def pickling(it: Subject) -> None:
    restored = pickle.loads(pickle.dumps(it.model))
    same(restored(*it.inputs), copy.deepcopy(it.model)(*it.inputs), 1e-5)


@check
def saving(it: Subject) -> None:
    """Our files are read again; PEFT's are what ours are, for the oracle is PEFT that has read them."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(it.oracle, PeftOracle):
            it.oracle.module.save_pretrained(directory)
        else:
            it.model.save_pretrained(directory)
        again = GraloraModel.from_pretrained(trace(copy.deepcopy(it.module), it.inputs), directory)
    again.eval()
    same(again(*it.inputs), copy.deepcopy(it.model)(*it.inputs), 1e-4 * it.loose, "after saving outputs")


class Scale:
    """A pass of one's own: multiplies the first output by a parameter that it adds."""

    def __call__(self, graph_module: fx.GraphModule) -> None:
        graph_module.register_parameter("own_scale", nn.Parameter(torch.full((1,), 1.5)))
        output = graph_module.graph.output_node()
        source = next((n for n in output.all_input_nodes if n.op != "placeholder"), None)
        if source is None:
            return
        with graph_module.graph.inserting_before(output):
            scale = graph_module.graph.get_attr("own_scale")
            product = graph_module.graph.call_function(torch.mul, (source, scale))
        output.replace_input_with(source, product)


def _with_pass(it: Subject) -> GraloraModel:
    model = copy.deepcopy(it.model)
    model.add_pass(Scale())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("own_scale"):
                parameter.fill_(2.5)
    return model


@check
def passes(it: Subject) -> None:
    model = _with_pass(it)
    expected = copy.deepcopy(it.model)(*it.inputs)
    output = copy.deepcopy(model)(*it.inputs)
    if all(torch.equal(a, b) for a, b in zip(leaves(output), leaves(expected), strict=True)):
        raise Wrong("a pass changes nothing")
    first = next(
        i for i, (a, b) in enumerate(zip(leaves(output), leaves(expected), strict=True)) if not torch.equal(a, b)
    )
    same(leaves(output)[first], leaves(expected)[first] * 2.5, 1e-4 * it.loose, "with a pass outputs")
    same(_merged(model)(*it.inputs), output, 2e-4 * it.loose, "merged with a pass outputs")
    model.train()
    model.eval()
    same(copy.deepcopy(model)(*it.inputs), output, 1e-5, "with a pass, after training mode, outputs")


@check
def export(it: Subject) -> None:
    _exported(it, it.model, "merged")


@check
def export_with_a_pass(it: Subject) -> None:
    if it.description.seed % 3:
        raise Void("now and then")
    model = _with_pass(it)
    _exported(it, model, "merged", expected=copy.deepcopy(model)(*it.inputs), elsewhere=False)


@check
def adapters_as_data(it: Subject) -> None:
    _exported(it, it.model, "data")


def _exported(it: Subject, model: GraloraModel, form: Any, *, expected: Any = None, elsewhere: bool = True) -> None:
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(directory) / "export"
        dora = form == "data" and ("use_dora", True) in it.description.adapter.fields
        try:
            export_onnx(model, path, adapters=form, **({"dora": True} if dora else {}))
        except GraloraError as error:
            if "untie=True" not in str(error) or form != "merged":
                raise
            export_onnx(merge(model, untie=True), path)
        session = load(path)
        extra = {"adapter": "default"} if form == "data" else {}
        names = list(model.traced.input_names)

        def run(*inputs: Tensor) -> list[Tensor]:
            arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
            return [torch.as_tensor(value) for value in session(**arrays, **extra).values()]

        same(run(*it.inputs), copy.deepcopy(model)(*it.inputs) if expected is None else expected, 1e-3 * it.loose)
        if elsewhere:
            _at_sizes(it, run, few=True)
        if form == "data":
            arrays = {name: tensor.numpy() for name, tensor in zip(names, it.inputs, strict=True)}
            base = [torch.as_tensor(value) for value in session(**arrays).values()]
            same(base, asked(copy.deepcopy(it.module), *it.inputs), 1e-3 * it.loose, "without the adapter outputs")


def examine(description: Description, names: list[str] | None = None) -> list[Verdict]:
    """Run checks on a drawn module, all of them if none is named."""
    seed = description.seed
    verdicts: list[Verdict] = []
    try:
        it = subject(description)
    except GraloraError as error:
        return [Verdict(seed, "rewriting", "refused", str(error))]
    except Exception as error:  # noqa: BLE001  any: a traceback is a fault
        return [Verdict(seed, "rewriting", "FAULT", _told(error))]
    verdicts.append(Verdict(seed, "rewriting", "holds", "; ".join(it.warned)))
    for name in CHECKS if names is None else names:
        if name == "rewriting":
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)
                CHECKS[name](it)
            verdicts.append(Verdict(seed, name, "holds"))
        except Void:
            continue
        except Said as error:
            verdicts.append(Verdict(seed, name, "said", str(error)))
        except GraloraError as error:  # an export that is wrong or does not run is a fault
            is_fault = "results differ" in str(error) or "ONNX Runtime refuses" in str(error)
            outcome = "FAULT" if is_fault else "refused"
            verdicts.append(Verdict(seed, name, outcome, str(error)))
        except Exception as error:  # noqa: BLE001  any: a traceback is a fault
            verdicts.append(Verdict(seed, name, "FAULT", _told(error)))
    return verdicts


def _told(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, Wrong) else f" at {last.filename.rpartition('/')[2]}:{last.lineno}"
    return f"{type(error).__name__}: {error}{place}"
