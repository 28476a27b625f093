"""The command line on local models and adapters, run as a user runs it."""

from __future__ import annotations

import gc
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from terminals import in_terminal, plain_lines
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from transformers import AutoModelForSequenceClassification, OpenAIGPTConfig, OpenAIGPTLMHeadModel
from typer.testing import CliRunner

from gralora_fx.cli import app, main
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.errors import CheckpointError, ExportError, GraloraError, TraceError
from gralora_fx.format.tasks import task_names
from gralora_fx.serving import load

LLAMA: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("bert", num_labels=3)
    model.bert.save_pretrained(folder / "base")
    model.save_pretrained(folder / "classifier")
    config = peft.GraloraConfig(
        r=8, target_modules=["query", "value"], task_type="SEQ_CLS", init_weights=False, inference_mode=False
    )
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base with a tokenizer, and an adapter of it that PEFT saved."""
    folder = tmp_path_factory.mktemp("decoder")
    model = tiny_model("llama", **LLAMA)
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    config = peft.GraloraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def merged_export(decoder: Path) -> Path:
    """Return an export of the base with the adapter merged, for tests to copy."""
    given = ("--model", decoder / "base", "--adapter", decoder / "adapter", "--output", decoder / "merged")
    run("export", *given, "--no-verify")
    return decoder / "merged"


def run_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a process of the command line; return its output; it must succeed."""
    command = [sys.executable, "-m", "gralora_fx.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@dataclass(frozen=True)
class Printed:
    """The output of a run of the command line."""

    stdout: str
    stderr: str


def run(*arguments: object, expect: int = 0) -> Printed:
    """Return the same in this process, which has imported PyTorch already; `expect` is the exit status."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    argv = patch.object(sys, "argv", ["gralora-fx", *map(str, arguments)])
    with argv, redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        main()
    signal.signal(signal.SIGTERM, handler)
    gc.unfreeze()
    assert (end.value.code or 0) == expect, out.getvalue() + err.getvalue()
    return Printed(out.getvalue(), err.getvalue())


@pytest.mark.quick
def test_export_then_verify(checkpoint: Path, tmp_path: Path) -> None:
    # the base has no head of its own: its size comes from the adapter's copy of it
    arguments = ("--model", checkpoint / "base", "--adapter", checkpoint / "adapter", "--output", tmp_path / "onnx")
    result = run("export", *arguments, "-v")
    assert result.stdout.startswith("passed: 4 inputs compared with PyTorch, largest difference ")
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    assert "quick verification, compared with the PyTorch model with 'default' active" in result.stdout
    verified = run("verify", *arguments, "--provider", "CPUExecutionProvider", "--verbose").stdout
    assert "full verification" in verified
    assert "run on CPUExecutionProvider " in verified
    weights = tmp_path / "onnx" / "model.onnx_data"
    data = bytearray(weights.read_bytes())
    data[64] ^= 1
    weights.write_bytes(data)
    changed = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert isinstance(changed.exception, ExportError)
    assert "model.onnx_data" in str(changed.exception)


def test_a_lora_adapter_is_exported_and_verified_like_one_of_gralora(decoder: Path, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        tiny_model("llama", **LLAMA),
        peft.LoraConfig(
            r=4,
            use_rslora=True,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 2},
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        ),
    ).eval()
    theirs.save_pretrained(str(tmp_path / "lora"))
    given = ("--model", decoder / "base", "--adapter", tmp_path / "lora", "--output", tmp_path / "onnx")
    assert "r=2" in run("inspect", *given[:4]).stdout
    assert "compared with the PyTorch model with 'default' active" in run("export", *given, "-v").stdout
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    logits = load(tmp_path / "onnx")(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    assert torch.allclose(torch.as_tensor(logits)[:, -1], expected[:, -1], atol=1e-4 * float(expected.abs().max()))
    assert "full verification" in run("verify", *given).stdout
    entry = json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())["adapters"]["default"]
    assert (entry["config"]["peft_type"], entry["config"]["use_rslora"]) == ("LORA", True)
    other = CliRunner().invoke(app, ["verify", *map(str, (*given[:3], decoder / "adapter", *given[4:]))])
    assert isinstance(other.exception, ExportError)
    assert "r=4, lora_alpha=8, use_rslora=True" in str(other.exception)
    assert "peft_type='GRALORA' instead of 'LORA'" in str(other.exception)


def test_an_adapter_that_changes_nothing_or_is_of_another_base_is_named(decoder: Path, tmp_path: Path) -> None:
    shutil.copytree(decoder / "adapter", tmp_path / "zero")
    path = tmp_path / "zero" / "adapter_model.safetensors"
    tensors = {k: torch.zeros_like(v) if "gralora_B" in k else v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "zero" / "adapter_config.json").read_text())
    named = json.dumps({**config, "base_model_name_or_path": "org/another"})
    (tmp_path / "zero" / "adapter_config.json").write_text(named)
    with pytest.warns(UserWarning, match="zero") as caught:
        load_traced(str(decoder / "base"), str(tmp_path / "zero"), "text-generation")
    said = "\n".join(str(warning.message) for warning in caught)
    assert "zero changes nothing: all of its updates are zero" in said
    assert f"zero was made for org/another, and is used with {decoder / 'base'}" in said


def test_an_adapter_is_folded_into_an_export_and_verified(decoder: Path, tmp_path: Path) -> None:
    base, adapter = decoder / "base", decoder / "adapter"
    run("export", "--model", base, "--output", tmp_path / "base", "--task", "text-generation-with-past", "--no-verify")
    folding = ("fold", "--onnx", tmp_path / "base", "--adapter", adapter, "--output", tmp_path / "onnx")
    printed = run(*folding, "--base", base, "-v")
    assert "layers (" in printed.stdout
    assert "as recorded" in printed.stdout
    comparison = f"gralora-fx verify --onnx {tmp_path / 'onnx'} --model {base} --adapter {adapter}"
    assert printed.stdout.startswith(f"folded 2 layers; not compared with PyTorch, to do so: {comparison}\n")
    assert "passed" in run(*shlex.split(comparison)[1:]).stdout
    refused = run(*folding, "--requantize", expect=1).stderr.strip()
    assert "--requantize has no effect: no weight that changes is quantized; leave it out" in refused
    assert "is the export" in run(*folding[:-1], tmp_path / "base", expect=1).stderr


def test_verify_says_at_once_which_adapter_an_export_has(decoder: Path, merged_export: Path, tmp_path: Path) -> None:
    """A base that cannot be loaded shows that the adapter is looked at first."""
    arguments = ["--adapter", str(decoder / "adapter"), "--output", str(tmp_path / "onnx")]
    shutil.copytree(merged_export, tmp_path / "onnx")
    base = ["--model", "/no/such/model", "--output", str(tmp_path / "onnx")]
    none = CliRunner().invoke(app, ["verify", *base])
    assert isinstance(none.exception, ExportError)
    sizes = "the adapter 'default' (r=4, hybrid_r=0, alpha=64, gralora_k=2, made for "
    assert f"was exported with {sizes}" in str(none.exception)
    assert "give its directory as adapter=..." in str(none.exception)

    def changed(name: str, tensors: dict[str, Any] | None = None, **fields: Any) -> str:
        shutil.copytree(decoder / "adapter", tmp_path / name)
        config = json.loads((decoder / "adapter" / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        state = load_file(decoder / "adapter" / "adapter_model.safetensors") | (tensors or {})
        save_file(state, tmp_path / name / "adapter_model.safetensors", metadata={"format": "pt"})
        return str(tmp_path / name)

    key = "base_model.model.model.layers.0.mlp.up_proj.gralora_A"
    for adapter, message in (
        (changed("other", {key: torch.ones(2, 16, 4)}), "is another one: its tensors have another SHA-256"),
        (changed("scaled", alpha=32), "is another one: alpha=32 instead of 64"),
    ):
        wrong = CliRunner().invoke(app, ["verify", *base, "--adapter", adapter])
        assert isinstance(wrong.exception, ExportError)
        assert message in str(wrong.exception)
    # a copy of the embedding, as PEFT adds it, and half precision do not make it another one
    embedding = tiny_model("llama", **LLAMA).get_input_embeddings().weight
    same = changed("same", {"base_model.model.model.embed_tokens.weight": embedding.detach()})
    verified = CliRunner().invoke(app, ["verify", "--model", str(decoder / "base"), *arguments[2:], "--adapter", same])
    assert verified.exit_code == 0, verified.output
    task = CliRunner().invoke(app, ["verify", *base, "--task", "text-generation"])
    assert "was exported for the task text-generation-with-past, not text-generation" in str(task.exception)
    (tmp_path / "onnx").rename(tmp_path / "adapted")
    plain = CliRunner().invoke(
        app, ["export", "--model", str(decoder / "base"), "--no-verify", "--output", str(tmp_path / "onnx")]
    )
    assert plain.exit_code == 0, plain.output
    wrong = CliRunner().invoke(app, ["verify", *base, "--adapter", str(decoder / "adapter")])
    assert f"was exported without an adapter; leave adapter={str(decoder / 'adapter')!r} out" in str(wrong.exception)


@pytest.mark.filterwarnings("default")  # the command line shows them
def test_an_encoder_decoder_is_exported_with_its_cache_and_a_warning_is_shown_once(tmp_path: Path) -> None:
    model = tiny_model("t5", num_layers=1, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    model.save_pretrained(tmp_path / "base")
    config = peft.GraloraConfig(r=4, target_modules=["q"], task_type="SEQ_2_SEQ_LM", init_weights=False)
    if Version(peft.__version__) < Version("0.21.2"):
        pytest.skip(f"peft {peft.__version__} does not wrap an encoder-decoder of today's transformers")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_pattern": "block"}))
    arguments = ("--model", tmp_path / "base", "--adapter", tmp_path / "adapter")
    printed = run("export", *arguments, "--output", tmp_path / "onnx", "--no-verify")
    assert {"encoder_model.onnx", "decoder_model_merged.onnx"} <= {file.name for file in (tmp_path / "onnx").iterdir()}
    assert printed.stderr.count("layers_pattern='block' is ignored, as PEFT ignores it") == 1


def test_export_asks_before_it_replaces_an_export_of_another_task(decoder: Path, tmp_path: Path) -> None:
    named = ["export", "--model", str(decoder / "base"), "--output", str(tmp_path / "onnx"), "--no-verify"]
    assert CliRunner().invoke(app, [*named, "--task", "text-generation"]).exit_code == 0
    again = ["--model", "/no/such/model", "--output", str(tmp_path / "onnx"), "--task", "text-classification"]
    refused = CliRunner().invoke(app, ["export", *again])
    message = "holds an export for the task text-generation, not text-classification; give overwrite=True"
    assert message in str(refused.exception)
    assert "no model can be loaded" in str(CliRunner().invoke(app, ["export", *again, "--overwrite"]).exception)
    assert CliRunner().invoke(app, [*named, "--task", "text-generation"]).exit_code == 0
    assert CliRunner().invoke(app, [*named, "--overwrite"]).exit_code == 0


def test_inspect_lists_sites_or_the_plan(checkpoint: Path) -> None:
    sites = run("inspect", "--model", checkpoint / "classifier").stdout
    planned = run("inspect", "--model", checkpoint / "classifier", "--adapter", checkpoint / "adapter").stdout
    assert "4 of 14 sites adapted" in planned
    heading, own = (next(line for line in text.splitlines() if line[:4] == "site") for text in (planned, sites))
    assert heading.split() == [*own.split(), "adapter"]
    for path in ("bert.encoder.layer.1.attention.self.query", "classifier"):
        with_adapter, without = (next(x for x in text.splitlines() if x.startswith(path)) for text in (planned, sites))
        assert with_adapter.split()[:5] == without.split()
    count = AutoModelForSequenceClassification.from_pretrained(checkpoint / "classifier").num_parameters()
    assert f"14 sites; parameters: {count:,}" in sites


def test_inspect_draws(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--model", checkpoint / "classifier", "--adapter", checkpoint / "adapter")
    result = run("inspect", *arguments, "--html", tmp_path / "out.html", "--svg", tmp_path / "out.svg")
    assert f"wrote {tmp_path / 'out.html'}" in result.stderr
    assert "4 of 14 sites adapted" in result.stdout
    page, svg = (tmp_path / "out.html").read_text(), (tmp_path / "out.svg").read_text()
    assert page.startswith("<!doctype html>")
    assert svg.startswith("<")
    assert "default: r=8 k=2" in page
    assert "error: cannot write" in run("inspect", *arguments, "--html", tmp_path, expect=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect",), "error: no model was named; give --model"),
        (("inspect", "--model", "/no/such/model"), "error: no model can be loaded from /no/such/model"),
        (("inspect", "--model", "{base}", "--task", "poetry"), "error: unknown task 'poetry'; take one of"),
        (("export", "--model", "{base}", "--output", "{base}"), "is not empty and holds no gralora_export.json"),
        (("verify", "--model", "{base}", "--output", "{new}"), "error: no gralora_export.json in"),
        (("inspect", "--model", "{base}", "--adapter", "{base}"), "error: no adapter_config.json in"),
    ],
)
def test_bad_input_ends_with_one_line(
    checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    filled = [argument.format(base=checkpoint / "base", new=tmp_path / "new") for argument in arguments]
    result = run(*filled, expect=1)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_wrong_option_shows_the_usage() -> None:
    assert "No such option" in run("export", "--modle", "x", expect=2).stderr


STAGES = ("importing", "loading", "tracing", "adding adapters", "preparing", "converting", "writing", "comparing")


def test_an_adapter_of_a_decoder_is_exported_so_that_it_generates(decoder: Path, tmp_path: Path) -> None:
    arguments = ("--model", decoder / "base", "--adapter", decoder / "adapter", "--output", tmp_path / "onnx")
    assert run_process("export", *arguments).stderr == ""
    files = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "model.onnx_data", "genai_config.json", "config.json", "tokenizer.json"} <= files
    assert load(tmp_path / "onnx").generate("abc", max_new_tokens=4)
    assert "passed" in run("verify", *arguments).stdout


def test_a_named_task_is_taken_as_it_is(decoder: Path, tmp_path: Path) -> None:
    arguments = ["export", "--model", decoder / "base", "--task", "text-generation", "--output", tmp_path / "onnx"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--no-verify", "--dump", str(tmp_path / "dump")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "dump" / "01-graph-fx-functionalize.txt").is_file()
    assert json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())["task"] == "text-generation"
    assert not (tmp_path / "onnx" / "genai_config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "int3"), "quantize='int3' is not available; take"),
        (("--logits", "first"), "logits='first' is not available; take 'last' or 'all'"),
        (("--precision", "fp8"), "precision='fp8' is not available; take 'fp32' or 'fp16' or 'bf16'"),
        (("--quantize", "int4", "--block-size", "24"), "block_size=24 is not a block size; take a power of two"),
        (("--quantize", "int4", "--block-size", "8"), "block_size=8 is not a block size; take a power of two"),
        (("--quantize", "int4", "--accuracy-level", "5"), "accuracy_level=5 is not an accuracy level; take 0"),
        (("--block-size", "32"), "--block-size has no effect without --quantize"),
        (("--accuracy-level", "1"), "--accuracy-level has no effect without --quantize"),
        (
            ("--quantize", "int8-dynamic", "--block-size", "32"),
            "block_size=32 has no effect with quantize='int8-dynamic'",
        ),
        (("--texts", "texts"), "--texts has no effect without --quantize"),
        (("--quantize", "int8", "--texts", "texts", "--no-verify"), "--texts contradicts --no-verify"),
        (("--quantize", "int8", "--texts", "texts", "--no-tokenizer"), "--texts contradicts --no-tokenizer"),
        (("--task", "poetry"), "unknown task 'poetry'; take one of feature-extraction, "),
        (("--model", " "), "take a local directory or a hub id, but one of them is empty"),
        (("--verify", "slow"), "verify='slow' is not available; take 'quick' or 'full'"),
        (("--verify", "full", "--no-verify"), "--verify full contradicts --no-verify"),
        (("--adapter", ""), "take a local directory or a hub id, but one of them is empty"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    model = [] if "--model" in options else ["--model", "/no/such/model"]
    arguments = ["export", *model, "--output", str(tmp_path / "onnx"), *options]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, GraloraError)
    assert message in str(result.exception)
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "export", "verify"])
def test_help_lists_tasks_and_choices(command: str) -> None:
    text = " ".join(CliRunner().invoke(app, [command, "--help"]).stdout.split())
    assert f"Use the model for this task: {', '.join(task_names())}." in text
    assert command != "export" or all(
        f"[{choices}]" in text for choices in ("fp32|fp16|bf16", "int4|int8|int8-dynamic|kept|float", "last|all")
    )


def test_a_decoder_without_a_cache_is_named(tmp_path: Path) -> None:
    config = OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=101, n_positions=64)
    OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "base")
    result = CliRunner().invoke(app, ["export", "--model", str(tmp_path / "base"), "--output", str(tmp_path / "onnx")])
    assert isinstance(result.exception, TraceError)
    assert "OpenAIGPTLMHeadModel" in str(result.exception)
    assert str(result.exception).endswith("task='text-generation' traces it without a cache")
    assert not (tmp_path / "onnx").exists()


def test_an_adapter_of_another_base_is_refused_by_its_shapes(decoder: Path, tmp_path: Path) -> None:
    tiny_model("llama", **LLAMA, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "wider")
    arguments = ["--model", str(tmp_path / "wider"), "--adapter", str(decoder / "adapter")]
    result = CliRunner().invoke(app, ["export", *arguments, "--output", str(tmp_path / "onnx")])
    assert isinstance(result.exception, CheckpointError)
    message = str(result.exception)
    assert f"the adapter {decoder / 'adapter'} does not fit {tmp_path / 'wider'} (LlamaForCausalLM)" in message
    key = "base_model.model.model.layers.0.mlp.up_proj.gralora_A"
    assert f"\n- {key} has shape [2, 16, 4] instead of [2, 32, 4]" in message
    assert not (tmp_path / "onnx").exists()


def test_an_export_of_another_base_is_refused_in_one_line(decoder: Path, merged_export: Path, tmp_path: Path) -> None:
    other = tiny_model("llama", seed=1, **LLAMA)
    other.save_pretrained(tmp_path / "other")
    arguments = ["--adapter", str(decoder / "adapter"), "--output", str(tmp_path / "onnx")]
    shutil.copytree(merged_export, tmp_path / "onnx")
    result = CliRunner().invoke(app, ["verify", "--model", str(tmp_path / "other"), *arguments])
    assert isinstance(result.exception, ExportError)
    assert "was exported from another base: its weights have fingerprint" in str(result.exception)
    verified = CliRunner().invoke(
        app, ["verify", "--model", str(decoder / "base"), *arguments, "--prompt", "a", "--prompt", "bc", "-v"]
    )
    assert verified.exit_code == 0, verified.output
    assert "2 given prompts of 1 to 2 tokens padded left" in verified.stdout


def test_stages_are_live_on_a_terminal(decoder: Path, tmp_path: Path) -> None:
    """Every stage is drawn while it runs, with what it took left standing at the end."""
    arguments = ("--model", decoder / "base", "--adapter", decoder / "adapter", "--output", tmp_path / "onnx")
    command = [sys.executable, "-m", "gralora_fx.cli", "export", *map(str, arguments)]
    text = in_terminal(command, 60, GRALORA_FX_PROGRESS="1")
    assert any(spinner in text for spinner in "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
    found = [re.fullmatch(r"  (\w+(?: \w+)?) +(\d+\.\d) s", line) for line in plain_lines(text)]
    seconds = {match[1]: float(match[2]) for match in found if match is not None}  # of each line the last drawn
    assert tuple(seconds) == (*STAGES, "total")
    assert sum(seconds[stage] for stage in STAGES) <= seconds["total"] + 0.05 * len(STAGES)  # each is rounded


def test_help_and_wrong_options_wait_for_no_library() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from gralora_fx.cli import app\n"
        "assert CliRunner().invoke(app, ['export', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'onnx', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"gralora-fx {version('gralora-fx')}\n"


@pytest.mark.parametrize("arguments", [["--version"], ["export", "--help"]])
def test_a_reader_that_has_gone_is_not_an_error(arguments: list[str]) -> None:
    """As `| head` leaves it: what is printed at once and what is printed at the end."""
    command = [sys.executable, "-m", "gralora_fx.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() != 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "--output", "x", "--prompt", "fine", "--prompt", "no \udcff"),
        ("export", "--output", "\udcff"),
        ("inspect", "--model", "\udcff"),
        ("inspect", "--task", "\udcff"),
    ],
)
def test_bytes_that_are_not_text_are_refused(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gralora-fx", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert re.fullmatch(r"error: '(no )?\\udcff' is not valid UTF-8; give text in UTF-8", shown[0])


def test_problems_stand_on_lines_of_their_own(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--model", str(checkpoint / "base"), "--task", "text-classification", "--output", "/no/such/output"]
    monkeypatch.setattr(sys, "argv", ["gralora-fx", "export", *named])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().err.splitlines()
    assert shown[-3].startswith(f"error: {checkpoint / 'base'} does not hold all of BertForSequenceClassification")
    assert shown[-2:] == ["- missing classifier.bias [3]", "- missing classifier.weight [3, 32]"]


@pytest.mark.filterwarnings("default")
def test_warnings_are_lines_of_their_own(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint / "adapter", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    changed = {"gralora_dropout": -1, "base_model_name_or_path": str(tmp_path / "nowhere")}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    output = str(tmp_path / "lora")
    monkeypatch.setattr(sys, "argv", ["gralora-fx", "to-lora", "--adapter", str(tmp_path), "--output", output])
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().err.splitlines()
    assert f"warning: {tmp_path / 'adapter_config.json'}: gralora_dropout=-1 is read as 0, as PEFT reads it" in lines


def test_export_streams_quantizes_and_is_verified(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    named = ("--model", tmp_path / "base", "--task", "text-generation-with-past", "--output", tmp_path / "onnx")
    result = run("export", *named, "--stream", "--quantize", "int4", "--block-size", 16)
    assert "not compared" not in result.stdout
    assert "passed" in run("verify", "--stream", "--model", tmp_path / "base", "--output", tmp_path / "onnx").stdout


def test_an_int8_export_is_compared_on_the_texts_of_a_file(decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("rates rose again\n\nthe match was lost\n")
    named = ("--model", decoder / "base", "--task", "text-generation", "--output", tmp_path / "onnx")
    result = run("export", *named, "--quantize", "int8", "--texts", tmp_path / "texts", "-v")
    assert "compared with the float32 model on 2 given texts:\n  logits: argmax equal in " in result.stdout
    assert json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())["quality"]["inputs"] == "2 given texts"


@pytest.mark.parametrize(
    ("content", "message"), [("\n \n", "holds no text; write one on each line"), (None, "does not exist; give a file")]
)
def test_a_file_of_texts_that_has_none_is_one_error(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "texts").write_text(content)
    arguments = ["export", "--model", "/no/such/model", "--output", str(tmp_path / "onnx"), "--quantize", "int8"]
    result = CliRunner().invoke(app, [*arguments, "--texts", str(tmp_path / "texts")])
    assert isinstance(result.exception, GraloraError)
    assert message in str(result.exception)


def test_an_adapter_is_written_as_lora(decoder: Path, tmp_path: Path) -> None:
    printed = run("to-lora", "--adapter", decoder / "adapter", "--output", tmp_path / "lora")
    assert "rank 8 at 2 layers" in printed.stdout
    printed = run("to-lora", "--adapter", decoder / "adapter", "--output", tmp_path / "cut", "--rank", 3, "-v")
    assert "error over all layers" in printed.stdout
    printed = run("to-lora", "--adapter", tmp_path / "lora", "--output", tmp_path / "again", expect=1)
    assert printed.stderr.splitlines()[-1].startswith("error: ")
    assert "is a LoRA adapter already" in printed.stderr
    for rank in (0, 100):
        run("to-lora", "--adapter", decoder / "adapter", "--output", tmp_path / "none", "--rank", rank, expect=1)
    assert not (tmp_path / "none").exists()


def test_an_adapter_is_merged_into_files(decoder: Path, tmp_path: Path) -> None:
    arguments = (
        "merge",
        "--model",
        decoder / "base",
        "--adapter",
        decoder / "adapter",
        "--output",
        tmp_path / "merged",
    )
    assert run(*arguments).stdout.startswith("merged 2 weights; every value is finite\n")
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    assert "--overwrite" in run(*arguments, expect=1).stderr
    run(*arguments, "--overwrite")
    wrong = run(
        "merge", "--model", tmp_path / "no", "--adapter", decoder / "adapter", "--output", tmp_path / "x", expect=1
    )
    assert "error: no " in wrong.stderr
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def as_data(decoder: Path) -> Path:
    """Return an export that takes adapters as data."""
    path = decoder / "data"
    given = ("--model", decoder / "base", "--adapter", decoder / "adapter", "--output", path)
    assert "adapters/default.onnx_adapter" in run("export", *given, "--adapters", "data", "-v").stdout
    return path


def lora(folder: Path, targets: list[str], **fields: Any) -> Path:
    """Return a LoRA adapter of the decoder that PEFT saved."""
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    peft.get_peft_model(tiny_model("llama", **LLAMA), config).save_pretrained(str(folder))
    return folder


def test_adapters_are_added_to_an_export_and_verified(decoder: Path, as_data: Path, tmp_path: Path) -> None:
    shutil.copytree(as_data, tmp_path / "onnx")
    adapter = lora(tmp_path / "lora", ["q_proj"])
    added = run_process("export-adapter", "--adapter", adapter, "--onnx", tmp_path / "onnx", "--name", "lora")
    assert f"wrote {tmp_path / 'onnx' / 'adapters' / 'lora.onnx_adapter'}: " in added.stdout
    given = ("--model", decoder / "base", "--output", tmp_path / "onnx")
    for options in ((), ("--adapter", decoder / "adapter")):
        assert "passed" in run("verify", *given, *options, "--verify", "quick").stdout
    model = load(tmp_path / "onnx", check=True)
    answers = [model.generate("abc", max_new_tokens=8, adapter=name) for name in (None, "default", "lora")]
    assert len(set(answers)) > 1
    logits = [model(input_ids=[[5, 6, 7]], adapter=name).logits for name in (None, "default", "lora")]
    assert not (logits[0] == logits[1]).all()
    assert not (logits[0] == logits[2]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter", "{lora}", "--onnx", "{onnx}", "--name", "default"), "exists; give --overwrite"),
        (("--adapter", "{lora}", "--onnx", "{onnx}", "--name", "a/b"), "'a/b' is not a name for an adapter"),
        (
            ("--adapter", "{lora}", "--onnx", "{base}"),
            "is a model, not an export; export it first: gralora-fx export --model ",
        ),
        (("--adapter", "{base}", "--onnx", "{onnx}", "--name", "x"), "no adapter_config.json in"),
        (
            ("--adapter", "{other}", "--onnx", "{onnx}", "--name", "x"),
            "model.layers.0.self_attn.v_proj; give one of this base, or export a model that has an adapter there too",
        ),
        (
            ("--adapter", "{k4}", "--onnx", "{onnx}", "--name", "x"),
            "; give one of gralora_k=2, or convert it with gralora-fx to-lora, which gives the plain LoRA that it e",
        ),
        (("--adapter", "{saves}", "--onnx", "{onnx}", "--name", "x"), "(modules_to_save or bias)"),
        (
            ("--adapter", "{lora}", "--onnx", "{merged}", "--name", "x"),
            "takes no adapters: it was exported with --adapters merged",
        ),
    ],
)
def test_an_adapter_that_cannot_be_added_is_one_line(
    decoder: Path, as_data: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {"onnx": as_data, "base": decoder / "base", "lora": lora(tmp_path / "lora", ["q_proj"])}
    if "{other}" in arguments:
        places["other"] = lora(tmp_path / "other", ["q_proj", "v_proj"])
    if "{saves}" in arguments:
        places["saves"] = lora(tmp_path / "saves", ["q_proj"], modules_to_save=["norm"])
    if "{k4}" in arguments:
        config = peft.GraloraConfig(r=4, gralora_k=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        places["k4"] = tmp_path / "k4"
        peft.get_peft_model(tiny_model("llama", **LLAMA), config).save_pretrained(str(places["k4"]))
    if "{merged}" in arguments:
        places["merged"] = tmp_path / "merged"
        run("export", "--model", decoder / "base", "--output", places["merged"], "--no-verify")
    before = sorted(path.name for path in (as_data / "adapters").iterdir())
    printed = run("export-adapter", *(argument.format(**places) for argument in arguments), expect=1)
    assert printed.stderr.strip().splitlines()[-1].startswith("error: ")
    assert message in printed.stderr
    assert "Traceback" not in printed.stderr
    assert sorted(path.name for path in (as_data / "adapters").iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapters", "data"), "--adapters data needs a model with an adapter"),
        (("--adapters", "swapable"), "--adapters swapable is not available; take 'merged' or 'data' or 'inputs'"),
    ],
)
def test_an_export_that_cannot_take_adapters_is_one_line(
    decoder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    printed = run("export", "--model", decoder / "base", "--output", tmp_path / "onnx", *options, expect=1)
    assert message in printed.stderr
    assert "Traceback" not in printed.stderr
    assert not (tmp_path / "onnx").exists()


def test_verify_names_an_adapter_that_the_export_lacks(decoder: Path, as_data: Path, tmp_path: Path) -> None:
    adapter = lora(tmp_path / "lora", ["q_proj"])
    given = ("--model", decoder / "base", "--adapter", adapter, "--output", as_data)
    assert "another adapter than the model's 'default'" in run("verify", *given, expect=1).stderr


def test_verify_takes_every_name_that_export_adapter_does(decoder: Path, as_data: Path, tmp_path: Path) -> None:
    """Names of files are wider than those in a graph: with dots, keywords, and attributes of every module."""
    onnx, adapter = tmp_path / "onnx", decoder / "adapter"
    shutil.copytree(as_data, onnx)
    run("export-adapter", "--adapter", adapter, "--onnx", onnx, "--name", "v1.2")
    for file in (onnx / "adapters").glob("default.*"):
        file.unlink()
    given = ("--model", decoder / "base", "--adapter", adapter, "--onnx", onnx, "--verify", "quick")
    printed = run("verify", *given, "-v").stdout  # the only one
    assert "quick verification, compared with the PyTorch model, then with 'v1.2'" in printed
    for name in ("class", "half"):
        run("export-adapter", "--adapter", adapter, "--onnx", onnx, "--name", name)
        assert (
            f"compared with the PyTorch model, then with {name!r}, tolerance"
            in run("verify", *given, "--adapter-name", name).stdout
        )
    assert "the model's adapter 'v2' is not in" in run("verify", *given, "--adapter-name", "v2", expect=1).stderr
    alone = ("--model", decoder / "base", "--onnx", onnx, "--adapter-name", "v1.2")
    assert "--adapter-name v1.2 has no effect without --adapter" in run("verify", *alone, expect=1).stderr
    wrong = run("export-adapter", "--adapter", adapter, "--onnx", "none", "--name", "a b", expect=1)
    assert "'a b' is not a name for an adapter" in wrong.stderr
