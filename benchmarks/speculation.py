"""Speculation by n-grams, compared with the same engine without it: equal tokens, and the speedup.

SmolLM2-135M with a GraLoRA adapter folded in, as float32 and int4, on two threads. Some prompts contain a news text
that the answer repeats: verbatim, with changes, or as a quotation. Others are ordinary questions. Both sides answer in
turns, in one process, and all answers are compared.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import smollm2
from benchmarks.harness import Claim, Report, Table, progress
from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import OrtModel, load

RUNS = Path("runs/generation")
THREADS, NEW = 2, 96
LEAST = {"fp32": 1.8, "int4": 1.3}
WITHOUT, WITH = "without", "with"

_NEWS = (
    "The city museum opened its new wing on Tuesday, with more than four thousand visitors on the first day. "
    "Curators said that the collection had been restored over six years, at a cost of nineteen million "
    'dollars. "We wanted people to see how these paintings looked when they were made," said Helen Marsh, who '
    "led the work. The wing has twelve rooms, a library and a garden that is open to everyone. Tickets cost "
    "eight dollars, and children under twelve pay nothing.",
    "A storm that crossed the coast on Sunday night left thirty thousand homes without power, the company "
    "said on Monday. Crews from four states came to repair the lines, and most of the homes should have power "
    'again by Wednesday. The river rose by two metres near the old bridge, which was closed. "It is the '
    'highest that I have seen in forty years," said Tom Alder, a farmer. Schools in the county stay closed '
    "until Thursday, and the trains run every two hours.",
    "The national team won the final in Lisbon by three goals to one after extra time, its first title since "
    "1998. The captain, Ana Ribeiro, scored twice and was named player of the match. The coach said that the "
    "plan had been to wait for mistakes and to run as fast as possible when they came. Forty thousand people "
    "watched in the stadium, and a parade through the centre of the city is planned for Saturday afternoon.",
)
COPYING = {
    "a text again": "Text:\n{0}\n\nThe same text, word for word:\n{0}\n\nThe same text, word for word:\n",
    "an edited text": "Original:\n{0}\n\nCopy:\n{0}\n\nThe same with every number in digits:\n",
    "quotations": 'Article: {0}\n\nThe article says, and we quote it in full: "{1}',
}
ORDINARY = (
    "What is a good way to learn to play the piano?",
    "Write a short story about a fox who lives near a railway station.",
    "Explain how a bicycle stays upright.",
    "Give me some ideas for a birthday party for a ten year old.",
)


def run(iterations: int = 3) -> Report:
    """Measure answers to each set of prompts, `iterations` times on each side."""
    report = Report("speculation", "speculation: SmolLM2-135M, n-grams of the prompt and the answer")
    for precision, directory in smollm2.exports(RUNS):
        model = load(directory, threads=THREADS)
        rows = [
            _row(report, model, f"{precision}, {name}", _copies(template), iterations, at_least=LEAST[precision])
            for name, template in COPYING.items()
        ]
        chats = [
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in ORDINARY
        ]
        rows.append(_row(report, model, f"{precision}, questions", chats, iterations, at_least=0.97))
        drawn = {"do_sample": True, "seed": 1, "top_p": 0.9}
        rows.append(_row(report, model, f"{precision}, questions, drawn", chats, iterations, at_least=0.97, **drawn))
        rows.append(_row(report, model, f"{precision}, 4 questions at a time", [chats], iterations, at_least=0.97))
        mixed = [[*chats[:2], *_copies(COPYING["a text again"])[:2]]]
        rows.append(_row(report, model, f"{precision}, 2 questions beside 2 copies", mixed, iterations, at_least=0.97))
        report.tables.append(Table(f"{precision}: answers of {NEW} tokens", rows))
        report.tables.append(_steps(model, precision))
    with tempfile.TemporaryDirectory() as folder:
        model = _random_model(Path(folder))
        prompts = [[(7 * start + step * step) % 512 for step in range(40)] for start in range(4)]
        rows = [
            _row(report, model, "random model", prompts, 4 * iterations, at_least=0.97),
            _row(report, model, "random model, 4 at a time", [prompts], 4 * iterations, at_least=0.97),
            _row(report, model, "random model, drawn", prompts, 4 * iterations, at_least=0.97, do_sample=True, seed=1),
        ]
        report.tables.append(Table("a tiny random model", rows))
    return report


def _copies(template: str) -> list[str]:
    return [template.format(text, " ".join(text.split()[:6])) for text in _NEWS]


def _row(
    report: Report,
    model: OrtModel,
    name: str,
    prompts: Sequence[Any],
    iterations: int,
    *,
    at_least: float,
    **options: Any,
) -> Mapping[str, Any]:
    """Answer prompts, one call each, on both sides in turns."""
    progress(name)
    ratios: list[float] = []
    seconds: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    equal = compared = steps = tokens = 0
    for iteration in range(-1, iterations):
        for prompt in prompts:
            answers, took = {}, {}
            for side in (WITHOUT, WITH)[:: 1 if iteration % 2 else -1]:
                most = 0 if side == WITHOUT else None
                stream = model.generate(
                    prompt, max_new_tokens=NEW, stream=True, prompt_lookup_num_tokens=most, **options
                )
                first = next(stream)  # which has read the prompt
                begun = time.perf_counter()
                pieces = [first, *stream]
                took[side] = time.perf_counter() - begun
                answers[side] = _joined(pieces)
                if side == WITH:
                    steps += len(pieces)
                    tokens += sum(_length(model, answer) for answer in answers[side])
            compared += 1
            equal += answers[WITH] == answers[WITHOUT]
            if iteration >= 0:
                ratios.append(took[WITHOUT] / took[WITH])
                for side, value in took.items():
                    seconds[side].append(value)
    ratio = sum(seconds[WITHOUT]) / sum(seconds[WITH])
    report.claims.append(Claim(f"{name}: tokens a second over those without", ratio, at_least=at_least))
    report.claims.append(Claim(f"{name}: answers that are not equal", compared - equal, at_most=0))
    return {
        "prompts": name.partition(", ")[2] or name,
        "without, s": statistics.median(seconds[WITHOUT]),
        "with, s": statistics.median(seconds[WITH]),
        "faster": ratio,
        "median of pairs": statistics.median(ratios),
        "equal": f"{equal} of {compared}",
        "tokens a step": tokens / max(steps, 1),
    }


def _length(model: OrtModel, answer: Any) -> int:
    return len(model.tokenizer(answer)["input_ids"] if isinstance(answer, str) else answer)


def _joined(pieces: Sequence[Any]) -> list[Any]:
    """Return the whole answers of a stream, each a text or token ids."""
    if isinstance(pieces[0], str):
        return ["".join(pieces)]
    if pieces[0] and isinstance(pieces[0][0], (str, list)):
        rows = list(zip(*pieces, strict=True))
        return ["".join(row) if isinstance(row[0], str) else [*itertools.chain(*row)] for row in rows]
    return [[*itertools.chain(*pieces)]]


def _steps(model: OrtModel, precision: str, context: int = 400, iterations: int = 10) -> Table:
    """Measure steps of several tokens relative to steps of one, in turns."""
    progress(f"{precision}, steps")
    decoder = model.decoder(rows=1, capacity=context + 32, chunk=64)
    row = decoder.open()
    tokens = [(37 * index) % 40000 + 10 for index in range(context + 32)]
    for start in range(0, context, 64):
        decoder.step({row: tokens[start : min(start + 64, context)]})
    sizes = (0, 1, 2, 3, 4, 6, 8, 12, 17)  # 0: one token, in a text that does not repeat itself
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for iteration in range(-2, iterations):
        for size in sizes:
            decoder.rewind(row, context)
            started = time.perf_counter()
            decoder.step({row: tokens[: max(size, 1)]}, {row: size} if size else {})
            if iteration >= 0:
                seconds[size].append(time.perf_counter() - started)
    base = statistics.median(seconds[0])
    rows = [
        {"tokens": "1" if size == 0 else "1, as one of several" if size == 1 else str(size)}
        | {"ms": 1e3 * statistics.median(times), "over 1": statistics.median(times) / base}
        for size, times in seconds.items()
    ]
    return Table(f"{precision}: a step after {context} tokens", rows)


def _random_model(folder: Path) -> OrtModel:
    sizes: Any = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, eos_token_id=None, **sizes)).eval()
    export_onnx(trace(model, task="text-generation-with-past"), folder / "onnx", verify=False)
    return load(folder / "onnx", threads=THREADS)
