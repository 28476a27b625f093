"""The tools of the Berkeley function-calling leaderboard: each schema compiled or refused, called by a random model.

The functions are those of every data file of the package `bfcl-eval` (`pip install --no-deps --target DIR bfcl-eval`,
and DIR in PYTHONPATH), with their types translated to JSON schema's, as the package does for OpenAI's clients. An
untrained tiny Llama must call each one over HTTP; the package jsonschema checks its arguments.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harness import Claim, Report, Table, progress
from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app

CONTEXT, ROWS, SPECIAL = 4096, 16, 3
# by token id: keeps random strings and lists short
ENDINGS = {str(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()).index(letter)): 3.0 for letter in '"]}'}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{# tools are not told to what cannot read #}"
VALID, CUT, REFUSED, WRONG = "called with valid arguments", "cut by the context", "refused by name", "anything else"


def run(iterations: int = 1) -> Report:
    """Count the outcomes of all schemas, with `iterations` answers to each, drawn with different seeds."""
    files, functions = _functions()
    report = Report("tool_schemas", f"tool schemas: {len(functions)} functions of {files} files of bfcl-eval")
    outcomes: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(ServiceSettings(_export(Path(folder) / "tiny"), max_batch=ROWS, max_queue=4 * ROWS))
        with TestClient(app) as client, ThreadPoolExecutor(2 * ROWS) as pool:

            def outcome(job: tuple[int, tuple[str, Mapping[str, Any]]]) -> tuple[str, str, str]:
                seed, (file, function) = job
                return file, *_outcome(client, function, seed)

            jobs = [(seed, item) for seed in range(iterations) for item in functions]
            for number, (file, kind, reason) in enumerate(pool.map(outcome, jobs)):
                outcomes.setdefault(file, Counter())[kind] += 1
                if reason:
                    reasons[reason] += 1
                if number % 500 == 0:
                    progress(f"tool-schemas, {number} of {len(jobs)}")
    kinds = (VALID, CUT, REFUSED, WRONG)
    rows = [{"file": file, **{kind: counts[kind] for kind in kinds}} for file, counts in sorted(outcomes.items())]
    whole = sum(outcomes.values(), Counter())
    report.tables.append(Table("by file", [*rows, {"file": "all", **{kind: whole[kind] for kind in kinds}}]))
    report.tables.append(Table("refused", [{"reason": reason, "schemas": n} for reason, n in reasons.most_common()]))
    answered = whole[VALID] + whole[CUT]
    report.claims.append(Claim("schemas neither compiled nor refused by name", float(whole[WRONG]), at_most=0))
    report.claims.append(Claim("answers that are valid, of those compiled", whole[VALID] / answered, at_least=1))
    return report


def _outcome(client: TestClient, function: Mapping[str, Any], seed: int) -> tuple[str, str]:
    """Return a schema's outcome, and why it is refused."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": function["name"]}},
        "seed": seed,
        "logit_bias": ENDINGS,
    }
    response = client.post("/v1/chat/completions", json=body)
    answer = response.json()
    if response.status_code != 200:
        error = answer["error"]
        is_named = response.status_code == 400 and error["param"] == "tools.0.function.parameters"
        return (REFUSED, error["message"][:90]) if is_named else (WRONG, error["message"][:200])
    (choice,) = answer["choices"]
    if choice["finish_reason"] == "length":
        return CUT, ""
    (call,) = choice["message"]["tool_calls"]
    try:
        jsonschema.validate(json.loads(call["function"]["arguments"]), function["parameters"])
    except (ValueError, jsonschema.ValidationError, jsonschema.SchemaError) as error:
        return WRONG, f"{function['name']}: {error}"[:200]
    return VALID, ""


def _functions() -> tuple[int, list[tuple[str, Mapping[str, Any]]]]:
    """Return the number of files with functions, and each function once, with its first file."""
    spec = find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "the package bfcl-eval is needed: pip install --no-deps --target DIR bfcl-eval, and PYTHONPATH=DIR"
        )
    from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI

    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    files = set()
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("data/**/*.json")):
        for function in (one for entry in _entries(path) for one in _within(entry)):
            files.add(path.name)
            name = function["name"].replace(".", "_")  # as the package does
            own = {"name": name, "parameters": _translated(function["parameters"], GORILLA_TO_OPENAPI)}
            found.setdefault(json.dumps(own), (path.name, own))
    return len(files), list(found.values())


def _entries(path: Path) -> list[Any]:
    """Return a file's entries: one value, or one per line."""
    text = path.read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def _within(entry: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the functions of an entry: a question's, or a single one."""
    functions = entry.get("function", entry) if isinstance(entry, dict) else ()
    for function in [functions] if isinstance(functions, dict) else functions:
        if isinstance(function, dict) and isinstance(function.get("parameters"), dict) and "name" in function:
            yield function


def _translated(schema: Any, types: Mapping[str, str]) -> Any:
    """Return a schema with JSON schema's types; unknown ones stay, and are refused."""
    if not isinstance(schema, dict):
        return schema
    own = dict(schema)
    if isinstance(kind := own.get("type"), str):
        own["type"] = types.get(kind, kind)
    if isinstance(properties := own.get("properties"), dict):
        own["properties"] = {name: _translated(value, types) for name, value in properties.items()}
    for name in ("items", "additionalProperties"):
        if name in own:
            own[name] = _translated(own[name], types)
    return own


def _export(directory: Path) -> Path:
    """Make a tiny model of random weights, whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ("<pad>", "<s>", "</s>")
    own = Tokenizer(models.BPE({token: index for index, token in enumerate((*special, *alphabet))}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**sizes, **ends, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT)
    traced = trace(LlamaForCausalLM(config).eval(), task="text-generation-with-past")
    export_onnx(traced, directory, tokenizer=tokenizer, verify=False)
    return directory
