"""A failing case as a short script: the smallest description that still fails, and lines that show it."""

from __future__ import annotations

import inspect
import re
import time

from tests.generated.checks import Scale, Verdict, examine
from tests.generated.modules import Description

# what each check does, in a line or two; `g` is the adapted model, `net` the eager one, `x` the inputs
SHOWN = {
    "evaluation": "print(show(g(*x)), show(want(*x)))",
    "sizes": "y = {other}\nprint(show(g(*y)), show(want(*y)))",
    "training": (
        "g.train(), net.train()\nx = [t.requires_grad_(t.is_floating_point()) for t in x]\n"
        "for f in (g, want):\n    o = f(*x)\n    sum(t.pow(2).mean() for t in leaves(o)).backward()\n"
        "    print(show(o), [t.grad.norm() for t in x if t.grad is not None])\n"
        "    print({n: p.grad.norm() for n, p in g.named_parameters() if p.grad is not None})\n"
        "    g.zero_grad(); [setattr(t, 'grad', None) for t in x]"
    ),
    "double backward": (
        "g.train()\ngrads = torch.autograd.grad(sum(t.pow(2).mean() for t in leaves(g(*x))), "
        "[p for p in g.parameters() if p.requires_grad], create_graph=True)\n"
        "sum(t.pow(2).sum() for t in grads).backward()"
    ),
    "disabling": "with g.disable_adapter():\n    print(show(g(*x)), show(net(*x)))",
    "merging": "print(show(merge(g)(*x)), show(g(*x)))",
    "merging and back": "before = show(g(*x)); g.merge_adapter(); g.unmerge_adapter(); print(before, show(g(*x)))",
    "copying": "print(show(copy.deepcopy(g)(*x)), show(g(*x)))",
    "pickling": "import pickle\nprint(show(pickle.loads(pickle.dumps(g))(*x)), show(g(*x)))",
    "saving": (
        "g.save_pretrained('a')\nagain = GraloraModel.from_pretrained(trace(net, x), 'a')\n"
        "print(show(again(*x)), show(g(*x)))"
    ),
    "passes": (
        "{pass}before = show(g(*x)); g.add_pass(Scale())\n"
        "print(before, show(g(*x)), show(copy.deepcopy(g)(*x)), show(merge(g)(*x)))"
    ),
    "export": "export_onnx(g, 'o', overwrite=True)\no = load('o')\n{run}",
    "export with a pass": ("{pass}g.add_pass(Scale()); export_onnx(g, 'o', overwrite=True)\no = load('o')\n{run}"),
    "adapters as data": "export_onnx(g, 'o', adapters='data', overwrite=True)\no = load('o')\n{run}",
    "rewriting": "",
}
_RUN = "print(o(**{{n: t.numpy() for n, t in zip(g.traced.input_names, {x})}}{adapter}), want(*{x}))"


def fault(verdicts: list[Verdict], check: str) -> Verdict | None:
    """Return the fault that a check has found."""
    return next((v for v in verdicts if v.check == check and v.outcome == "FAULT"), None)


def smallest(description: Description, check: str, seconds: float = 60) -> Description:
    """Take away what a fault does not need, one thing after another, for so many seconds at most."""
    first = fault(examine(description, [check]), check)
    end = time.perf_counter() + seconds
    left = iter(description.smaller()) if first else iter(())
    while first and time.perf_counter() < end and (less := next(left, None)) is not None:
        try:
            found = fault(examine(less, [check]), check)
        except (ValueError, RuntimeError, AttributeError):  # what is left is no module
            continue
        if found is not None and found.text.split(":")[0] == first.text.split(":")[0]:
            description, left = less, iter(less.smaller())
    return description


def script(description: Description, check: str, text: str = "") -> str:
    """Return a script that shows a fault with torch and gralora_fx alone."""
    sizes, said = _sizes_in(text), " ".join(text.split())[:200]
    inputs, other = (_inputs(description, more) for more in ({}, sizes))
    run = _RUN.format(x="y" if sizes else "x", adapter=", adapter='default'" if "data" in check else "")
    if sizes:
        run = f"y = {other}\n{run}"
    shown = (
        SHOWN[check].replace("{pass}", f"{inspect.getsource(Scale)}\n").replace("{run}", run).replace("{other}", other)
    )
    exports = (
        "\nfrom gralora_fx.exporters import export_onnx\nfrom gralora_fx.serving import load"
        if "load(" in shown
        else ""
    )
    return f"""# seed {description.seed}, {check}: {said}
import copy, torch, torch.nn.functional as F; from torch import fx, nn; from torch.utils._pytree import tree_leaves
from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, merge, rewrite, trace{exports}
{description.code()}
torch.manual_seed({description.seed}); net = Net().eval(); x = {inputs}
g = rewrite(trace(copy.deepcopy(net), x), {description.adapter.text()}).eval()
[p.data.copy_(torch.randn(p.shape) * 0.2) for n, p in g.named_parameters() if p.requires_grad and "magn" not in n]
leaves = lambda o: [t for t in tree_leaves(dict(o) if hasattr(o, "keys") else o) if t.is_floating_point()]
show = lambda o: [round(float(t.norm()), 5) for t in leaves(o)]
weights = dict(net.named_parameters(remove_duplicate=False)); at = lambda p: p if p in weights else p + ".weight"
put = lambda w, d: w + (d if d.shape == w.shape else d.T)
new = lambda: {{at(p): put(weights[at(p)], g.delta_weight(p)) for p in g.adapter("default").planned}}
want = lambda *x: torch.func.functional_call(net, new(), x, tie_weights=False)
{shown}
"""


def _inputs(description: Description, sizes: dict[str, int]) -> str:
    made = description.inputs(sizes)
    texts = [
        f"torch.randint(0, 20, {tuple(t.shape)})" if name == "ids" else f"torch.randn{tuple(t.shape)}"
        for name, t in made.items()
    ]
    return f"({', '.join(texts)},)"


def _sizes_in(text: str) -> dict[str, int]:
    """Return the sizes that a verdict names."""
    found = re.search(r"at \{'(\w)': (\d+)\}", text)
    return {found[1]: int(found[2])} if found else {}


def short(description: Description) -> str:
    """Return what a description is made of, in a line."""
    kinds = [
        layer.kind if not layer.parts else f"{layer.kind}({', '.join(p.kind for p in layer.parts)})"
        for layer in description.layers
    ]
    return f"{description.beginning} > {' > '.join(kinds)} > {description.end}; {description.adapter.text()}"
