"""SmolLM2-135M on a QLoRA adapter's base: our exports compared with PEFT over bitsandbytes' NF4 layers, on the CPU.

PEFT trains a GraLoRA adapter for a few steps over the base that bitsandbytes quantized (NF4, scales in 8 bits, products
in float32), and its logits on held-out news are the reference. Exports take the base's rounded values: in float32,
which must equal PEFT's model, and in int8, which is served. Only the values differ from an int8 export of the float
base, so speed is compared with that.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from benchmarks import smollm2
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx import GraloraModel
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.demo.news_classifier import load_news
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps, ModelSteps
from gralora_fx.run.sessions.session import Runtime, open_session, quiet_options
from gralora_fx.serving import load

BASE, OUTPUT = Path("runs/generation/base"), Path("runs/few_bits_nf4")
HOW = "nf4-double"
TRAINED, TEXTS, LENGTH = 8, 16, 128
PROMPT, STEPS = 64, 8


def measure(report: Report, iterations: int = 16) -> None:
    """Add a table and its claims to a report; `iterations` is the number of timed tokens of each export."""
    smollm2.base(BASE)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    news = load_news(0)
    train, test = (
        [torch.tensor([tokenizer(text)["input_ids"][:LENGTH]]) for text, _ in texts]
        for texts in (news.train[:TRAINED], news.test[:TEXTS])
    )
    progress("PEFT over bitsandbytes")
    expected = _by_peft(train, test)
    progress("rounded base")
    ours = load_traced(str(BASE), str(OUTPUT / "adapter"), "text-generation-with-past", base_quantization=HOW)
    assert isinstance(ours, GraloraModel)
    rows = []
    for name, options in _EXPORTS.items():
        progress(name)
        export_onnx(ours, OUTPUT / name, logits="all", verify=False, **options)
        chosen = {"adapter": "default"} if options.get("adapters") == "data" else {}
        served = load(OUTPUT / name)
        found = (torch.from_numpy(served(input_ids=ids.numpy(), **chosen)["logits"][0]) for ids in test)
        rows.append({"export": name, **_row(expected, found)})
    floats = load_traced(str(BASE), str(OUTPUT / "adapter"), "text-generation-with-past")
    row = _row(expected, (ModelSteps(floats, 1)(ids, torch.ones_like(ids))[0] for ids in test))
    rows.append({"export": "(the adapter on the float base, PyTorch)", **row})
    positions = sum(ids.numel() for ids in test)
    report.tables.append(
        Table(f"NF4 base: beside PEFT over bitsandbytes, {positions} positions of held-out news", rows)
    )
    progress("speed")
    export_onnx(floats, OUTPUT / "int8 of the float base", logits="all", quantize="int8", verify=False)
    decode = _decode(("int8", "int8 of the float base"), iterations)
    by_name = {row["export"]: row for row in rows}
    report.claims += [
        Claim("NF4 base, float32: largest difference from PEFT's logits", by_name["float32"]["logits"], at_most=1e-4),
        Claim("NF4 base, float32: PEFT's token, %", by_name["float32"]["same token %"], at_least=99),
        Claim("NF4 base, int8: PEFT's token, %", by_name["int8"]["same token %"], at_least=99),
        Claim("NF4 base, int8: a token over int8 of the float base, time", decode, at_most=1.05),
    ]
    shutil.rmtree(OUTPUT, ignore_errors=True)


_EXPORTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantize": "int8"},
    "int8, products in float32": {"quantize": "int8", "accuracy_level": 1},
    "int8, the adapter as data": {"quantize": "int8", "adapters": "data"},
}


def _by_peft(train: Iterable[Tensor], test: Iterable[Tensor]) -> list[Tensor]:
    """Train an adapter on the base in NF4 and save it; return its logits `[length, vocabulary]`."""
    import bitsandbytes

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=how, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # where it would multiply in bfloat16
    torch.manual_seed(0)
    config = peft.GraloraConfig(r=16, alpha=32, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    for ids in train:
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.eval().save_pretrained(OUTPUT / "adapter")
    with torch.no_grad():
        return [wrapped(input_ids=ids).logits[0] for ids in test]


def _row(expected: list[Tensor], found: Iterable[Tensor]) -> dict[str, Any]:
    pairs = list(zip(expected, found, strict=True))
    same = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs]).float().mean()
    return {
        "same token %": 100 * float(same),
        "logits": max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs),
    }


def _decode(names: tuple[str, str], iterations: int) -> float:
    """Return the ratio of a token's time in two exports: in turns, on one thread, by the thread's CPU time."""
    options = Runtime(session_options=quiet_options(1))
    sessions = {name: open_session(OUTPUT / name, options) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    ids = torch.randint(10, 40000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    for iteration in range(iterations):
        for name in names[:: 1 if iteration % 2 else -1]:
            step = DecoderSteps(sessions[name], 1)
            _seconds(step, ids, PROMPT)
            taken = (_seconds(step, ids[:, :1], PROMPT + count) for count in range(1, STEPS + 1))
            seconds[name].append(statistics.median(taken))
    return Ratio.between(seconds[names[0]], seconds[names[1]]).median_of_pairs


def _seconds(step: DecoderSteps, ids: Tensor, total: int) -> float:
    begin = time.thread_time()
    step(ids, torch.ones(1, total, dtype=torch.long))
    return time.thread_time() - begin
