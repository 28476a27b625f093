"""`gralora-fx generate` answers one prompt as transformers does, from every kind of export that generates."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from running import run
from served_exports import chat_tokenizer, decoders, greedy
from tiny_models import WIDE, tiny_model
from tiny_tokenizers import tiny_tokenizer
from traces import fresh

from gralora_fx import GraloraModel, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

PROMPT, COUNT = "rates rose", 9


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Path], Mapping[str | None, Any]]:
    """Return exports by how they hold adapters, of "merged" the adapter `small`; models of PEFT by adapter."""
    folder = tmp_path_factory.mktemp("generate")
    directories, oracles = decoders(folder, "data", "inputs")
    sizes = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    traced = trace(tiny_model("llama", **sizes), task="text-generation-with-past")
    model = GraloraModel.from_pretrained(traced, folder / "small")
    export_onnx(model, folder / "merged", verify=False, tokenizer=chat_tokenizer())
    return {**directories, "merged": folder / "merged", "peft": folder}, oracles


def answer(oracle: Any, prompt: str, count: int = COUNT) -> str:
    tokenizer = chat_tokenizer()
    return str(tokenizer.decode(greedy(oracle, tokenizer(prompt)["input_ids"], count), skip_special_tokens=True))


@pytest.mark.parametrize(
    ("mode", "adapter"),
    [
        ("merged", None),
        *((mode, name) for mode in ("data", "inputs") for name in (None, "small", "wide")),
    ],
)
def test_the_answer_is_that_of_transformers(exported: Any, mode: str, adapter: str | None) -> None:
    directories, oracles = exported
    expected = answer(oracles["small" if mode == "merged" else adapter], PROMPT)
    chosen = () if adapter is None else ("--adapter", adapter)
    given = ("generate", "--onnx", directories[mode], "--prompt", PROMPT, "--max-new-tokens", COUNT, *chosen)
    printed = run(*given)
    assert printed.stdout == f"{expected}\n", printed.stderr
    assert printed.status == 0
    assert "has a chat template, which --chat uses" in printed.stderr


def test_a_prompt_comes_from_stdin_and_a_chat_from_the_template(exported: Any) -> None:
    directories, oracles = exported
    given = ("generate", directories["data"], "--max-new-tokens", COUNT, "--adapter", "wide", "--prompt", "-")
    assert run(*given, stdin=f"{PROMPT}\n".encode()).stdout == f"{answer(oracles['wide'], PROMPT)}\n"
    printed = run(*given, "--chat", stdin=PROMPT.encode())
    assert printed.stdout == f"{answer(oracles['wide'], f'user: {PROMPT} assistant: ')}\n"
    assert "template" not in printed.stderr


def test_an_adapter_is_loaded_from_a_file_or_from_what_peft_saved(exported: Any, tmp_path: Path) -> None:
    directories, oracles = exported
    own = directories["data"] / "adapters"
    for suffix in (".onnx_adapter", ".json"):
        shutil.copy(own / f"wide{suffix}", tmp_path / f"copy{suffix}")
    for path in (tmp_path / "copy.onnx_adapter", directories["peft"] / "wide"):
        given = ("--prompt", PROMPT, "--max-new-tokens", COUNT, "--adapter", f"other={path}")
        assert run("generate", "--onnx", directories["data"], *given).stdout == f"{answer(oracles['wide'], PROMPT)}\n"


def test_draws_are_repeated_by_their_seed(exported: Any) -> None:
    directories, _ = exported
    given = ("generate", "--onnx", directories["merged"], "--prompt", PROMPT, "--temperature", 2, "--top-p", 0.95)
    first, again, other = (run(*given, "--seed", seed).stdout for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapter", "none"), "no adapter 'none'; there is small, wide: load it with --adapter NAME=PATH"),
        (("--adapter", "a/b"), "'a/b' is not a name for an adapter"),
        (("--adapter", "x="), "--adapter takes a name, or a name and a path as NAME=PATH, but got 'x='"),
        (("--adapter", "x=/no/such"), "there is no adapter at /no/such; give an .onnx_adapter file or a directory"),
        (("--adapter", f"x={'n' * 300}"), f"'{'n' * 96}... is not a usable path (File name too long); give an .onnx"),
        (("--adapter", f"x={__file__}"), f"{__file__} is neither an .onnx_adapter file nor a directory"),
        (("--temperature", "-1"), "--temperature takes a number from 0 on, but got -1.0"),
        (("--top-p", "2"), "--top-p takes a number above 0, at most 1, but got 2.0"),
        (("--temperature", "0", "--seed", "1"), "--seed has no effect with --temperature 0"),
        (("--prompt", ""), "the prompt is empty; give --prompt TEXT"),
    ],
)
def test_bad_input_is_one_line(exported: Any, options: tuple[str, ...], message: str) -> None:
    prompt = () if "--prompt" in options else ("--prompt", PROMPT)
    printed = run("generate", "--onnx", exported[0]["data"], *prompt, *options)
    assert printed.status == 1
    assert printed.error.startswith(message)


def test_an_adapter_for_a_merged_export_is_refused_before_it_is_opened(exported: Any) -> None:
    error = run("generate", "--onnx", exported[0]["merged"], "--prompt", PROMPT, "--adapter", "small").error
    assert "takes no adapters: it was exported with --adapters merged and has default merged into its weights" in error
    assert "leave --adapter out, or export the model with --adapters data" in error


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("text-classification", "serve it: gralora-fx serve --onnx {directory}"),
        ("text-generation", "export the model with --task text-generation-with-past"),
        ("text2text-generation", "export the model with --task text2text-generation-with-past"),
    ],
)
def test_an_export_that_does_not_generate_says_what_it_does(
    exported: Any, tmp_path: Path, task: str, message: str
) -> None:
    manifest = (exported[0]["merged"] / "gralora_export.json").read_text()
    (tmp_path / "gralora_export.json").write_text(manifest.replace("text-generation-with-past", task))
    error = run("generate", "--onnx", tmp_path, "--prompt", PROMPT).error
    assert f"{tmp_path} was exported for the task {task}, which does not continue text: " in error
    assert message.format(directory=tmp_path) in error
    assert "Python" not in error


def test_what_is_wrong_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom gralora_fx.cli import main\n"
        f"sys.argv = ['gralora-fx', 'generate', '--onnx', {str(tmp_path)!r}, '--prompt', 'x']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"
    assert "is empty; give the directory of an export" in done.stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an encoder-decoder."""
    folder = tmp_path_factory.mktemp("pair") / "t5"
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    traced = fresh("t5", task="text2text-generation-with-past", num_layers=1, **special, **WIDE["t5"])[1]
    export_onnx(traced, folder, tokenizer=tiny_tokenizer(), verify=False)
    return folder


def test_an_encoder_decoder_answers_texts(pair: Path) -> None:
    printed = run("generate", "--onnx", pair, "--prompt", "some text", "--max-new-tokens", "8")
    assert printed.stdout == load(pair).generate("some text", max_new_tokens=8) + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is nothing to answer; give --prompt TEXT"),
        (("--prompt", "a", "--chat"), "{folder} has no chat template: write one to chat_template.jinja"),
    ],
)
def test_what_an_encoder_decoder_does_not_take_is_one_line(pair: Path, options: tuple[str, ...], message: str) -> None:
    printed = run("generate", "--onnx", pair, *options)
    assert printed.status == 1
    *stages, error = printed.stderr.splitlines()
    assert error.startswith("error: ")
    assert message.format(folder=pair) in error
    assert all(line.startswith(("import", "open", "read")) for line in stages)
    assert printed.stdout == ""
