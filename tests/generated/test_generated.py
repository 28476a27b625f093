"""Modules drawn from seeds are rewritten, trained, merged and exported as PEFT or a dense formula has it, or refused.

`python -m tests.generated --seeds 0:1000` runs any range, counts refusals by text, and prints faults as scripts.
"""

from __future__ import annotations

import pytest
import torch

from tests.generated.checks import CHECKS, EXPORTS, examine
from tests.generated.layers import KINDS
from tests.generated.modules import Layer, drawn
from tests.generated.scripts import script, smallest

pytestmark = pytest.mark.filterwarnings("default")  # what warns is the module, not the test; checks read what is said


@pytest.mark.parametrize("seed", range(2000))
def test_a_drawn_module_is_right_or_refused(seed: int) -> None:
    exports = (seed + seed // 50) % 4 == 0  # a quarter, of `make test`'s seeds too
    names = [name for name in CHECKS if exports or name not in EXPORTS]
    faults = [verdict for verdict in examine(drawn(seed), names) if verdict.outcome == "FAULT"]
    if faults:
        first = faults[0]
        least = smallest(drawn(seed), first.check)
        pytest.fail(f"{first.check}: {first.text}\n\n{script(least, first.check, first.text)}")


@pytest.mark.quick
def test_a_seed_always_draws_the_same_module() -> None:
    for seed in range(20):
        first, second = drawn(seed), drawn(seed)
        assert first == second
        for (name, one), (_, other) in zip(
            first.module().state_dict().items(), second.module().state_dict().items(), strict=True
        ):
            assert torch.equal(one, other), name


def test_every_kind_is_drawn_and_every_module_runs() -> None:
    seen: set[str] = set()
    for seed in range(400):
        description = drawn(seed)
        seen |= description.kinds()
        assert 2 <= len(description.layers) <= 10
        description.module()(*description.inputs().values())
    assert seen >= set(KINDS)


def test_a_wrong_value_is_found_and_shrunk_to_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose merge doubles the first layer's bias is a fault of `merging` alone."""
    from tests.generated import checks

    right = checks.merge

    def wrong(model: torch.nn.Module, **options: bool) -> torch.nn.Module:
        merged = right(model, **options)
        with torch.no_grad():
            next(iter(merged.graph_module.parameters())).mul_(2)
        return merged

    description = next(d for d in map(drawn, range(100)) if d.beginning == "sequences" and "linear" in d.kinds())
    description = type(description)(
        description.seed,
        "sequences",
        (Layer("linear", 0), Layer("activation", 1), Layer("mlp", 2)),
        "tensor",
        description.adapter.__class__("lora", (("r", 4), ("lora_alpha", 8))),
    )
    assert not [v for v in examine(description, ["merging"]) if v.outcome == "FAULT"]
    monkeypatch.setattr(checks, "merge", wrong)
    assert [v.check for v in examine(description, ["evaluation", "merging"]) if v.outcome == "FAULT"] == ["merging"]
    least = smallest(description, "merging")
    assert len(least.layers) == 1
    text = script(least, "merging")
    compile(text, "script", "exec")
    assert "merge(g)" in text
