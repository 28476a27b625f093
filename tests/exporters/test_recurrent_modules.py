"""`nn.LSTM`, `nn.GRU` and `nn.RNN` keep their length in a trace, and are ONNX's operators in an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from traces import relative_error

from gralora_fx import LoraConfig, rewrite, trace
from gralora_fx.errors import ExportError, TraceError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

KINDS: tuple[type[nn.RNNBase], ...] = (nn.LSTM, nn.GRU, nn.RNN)
FORMS: dict[str, dict[str, Any]] = {
    "one": {},
    "rows first": {"batch_first": True},
    "both ways, two levels, dropout": {"batch_first": True, "bidirectional": True, "num_layers": 2, "dropout": 0.5},
    "three levels without biases": {"bias": False, "num_layers": 3},
}


class Reader(nn.Module):
    """A recurrent layer between two linear layers, which returns its last states too."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Linear(6, 8)
        self.layer: Any = kind(8, 4, **options)
        self.head = nn.Linear((options.get("proj_size") or 4) * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        outputs, last = self.layer(self.embed(x), state)
        return self.head(outputs), last


def leaves(outputs: Any) -> list[Tensor]:
    return [leaf for part in outputs for leaf in (leaves(part) if isinstance(part, tuple) else [part])]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_length_and_batch_is_right_in_the_trace_in_training_and_in_the_export(
    kind: type[nn.RNNBase], form: str, tmp_path: Path
) -> None:
    model = Reader(kind, **FORMS[form]).eval()
    traced = trace(model, (torch.randn(2, 5, 6),))
    adapted = rewrite(traced, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert {site.path for site in traced.sites} == {"embed", "head"}
    export_onnx(traced, tmp_path / "onnx")
    session = load(tmp_path / "onnx")
    for shape in ((1, 1, 6), (4, 9, 6), (3, 2, 6)):
        x = torch.randn(shape)
        expected = leaves(model(x))
        for actual, wanted in zip(leaves(traced(x)), expected, strict=True):
            assert torch.equal(actual, wanted)
        for exported, wanted in zip(session(x=x).values(), expected, strict=True):
            assert relative_error(torch.as_tensor(exported), wanted) < 1e-5
        torch.manual_seed(3)
        wanted = model.train()(x)[0]
        torch.manual_seed(3)
        with adapted.train().disable_adapter():
            assert relative_error(adapted(x)[0], wanted) < 1e-6
        model.eval()
    adapted(x)[0].square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    nodes = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count(kind.__name__) == FORMS[form].get("num_layers", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_given_first_states_are_inputs(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    def state(batch: int) -> Any:
        made = tuple(torch.randn(2, batch, 4) for _ in range(2))
        return made if kind is nn.LSTM else made[0]

    model = Reader(kind, batch_first=True, num_layers=2).eval()
    export_onnx(trace(model, (torch.randn(2, 5, 6), state(2))), tmp_path / "onnx")
    x, given = torch.randn(3, 7, 6), state(3)
    names = {"state.0": given[0], "state.1": given[1]} if kind is nn.LSTM else {"state": given}
    actual = load(tmp_path / "onnx")(x=x, **names)
    assert relative_error(torch.as_tensor(next(iter(actual.values()))), model(x, given)[0]) < 1e-5


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"quantize": "int8"}])
def test_exports_in_fewer_bits_run(options: dict[str, Any], tmp_path: Path) -> None:
    model = Reader(nn.GRU, batch_first=True).eval()
    export_onnx(trace(model, (torch.randn(2, 5, 6),)), tmp_path / "onnx", **options)
    x = torch.randn(3, 7, 6)
    assert relative_error(torch.as_tensor(load(tmp_path / "onnx")(x=x)[0]), model(x)[0]) < 2e-2


@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_have_adapters_of_their_own_where_the_batch_comes_first(batch_first: bool, tmp_path: Path) -> None:
    class Outputs(Reader):
        def forward(self, x: Tensor, state: Any = None) -> Tensor:
            return super().forward(x, state)[0]  # type: ignore[no-any-return]

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    traced = trace(Outputs(nn.LSTM, batch_first=batch_first).eval(), (torch.randn(2, 5, 6),))
    export_onnx(rewrite(traced, config).eval(), tmp_path / "onnx", adapters="data")
    assert (tmp_path / "onnx" / "model_rows.onnx").exists() is batch_first


def test_projections_have_no_operator_in_onnx(tmp_path: Path) -> None:
    model = Reader(nn.LSTM, proj_size=2).eval()
    traced = trace(model, (torch.randn(5, 2, 6),))
    x = torch.randn(9, 3, 6)
    assert torch.equal(traced(x)[0], model(x)[0])
    with pytest.raises(ExportError, match="ONNX has no LSTM with projections"):
        export_onnx(traced, tmp_path / "onnx")


def test_packed_sequences_are_refused_by_name() -> None:
    class Packs(Reader):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
            return self.layer(packed)[1]

    with pytest.raises(TraceError, match="packed sequences depend on the values of the lengths"):
        trace(Packs(nn.GRU, batch_first=True), (torch.randn(2, 3, 8),))
