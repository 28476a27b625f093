"""Adapters of a served model: loaded, named in calls, bound, used in generation and by several threads."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapters_as_data import KINDS, Exports, arrays, copy_export, expected_of, fields_of, output_of, saved
from tiny_tokenizers import tiny_tokenizer
from traces import relative_error

from gralora_fx import GraloraModel
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.serving import OrtModel, load

KIND = KINDS["llama"]
PROMPT = [5, 9, 12, 40, 3]


class Two:
    """An export, two adapters of it that PEFT saved, and their files outside the export."""

    def __init__(self, exports: Exports, root: Path) -> None:
        self.export, self.folder = root / "onnx", root / "files"
        copy_export(exports.adapted("llama", 2), self.export)
        self.peft: dict[str, peft.PeftModel] = {}
        self.expected: dict[str | None, torch.Tensor] = {None: expected_of(KIND.make(), KIND)}
        for name, adapter in (("formal", "gralora-8-4"), ("brief", "lora-patterns")):
            self.peft[name] = saved(KIND, root / name, **fields_of(adapter, KIND, 2))
            self.expected[name] = expected_of(self.peft[name], KIND)
            file = export_adapter(root / name, self.export, name)
            self.folder.mkdir(exist_ok=True)
            for path in (file, file.with_suffix(".json")):
                path.rename(self.folder / path.name)

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.onnx_adapter"


@pytest.fixture(scope="module")
def two(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Two:
    return Two(exports, tmp_path_factory.mktemp("two"))


@pytest.fixture
def served(two: Two) -> OrtModel:
    model = load(two.export)
    for name in two.peft:
        model.load_adapter(name, two.file(name))
    return model


def assert_is(model: OrtModel, two: Two, adapter: str | None, expected: str | None) -> None:
    assert relative_error(output_of(model, KIND, adapter), two.expected[expected]) < 1e-4


# -- load, switch, unload ----------------------------------------------------------------------------------------------


def test_calls_choose_an_adapter_or_none(served: OrtModel, two: Two) -> None:
    assert list(served.adapters.loaded) == ["brief", "formal"]
    for name in ("formal", None, "brief", "formal", None):
        assert_is(served, two, name, name)
    assert relative_error(two.expected["formal"], two.expected["brief"]) > 1e-2


def test_an_unloaded_adapter_is_gone_and_its_name_is_free(served: OrtModel, two: Two) -> None:
    served.unload_adapter("formal")
    assert list(served.adapters.loaded) == ["brief"]
    with pytest.raises(ServingError, match="no adapter 'formal'; there is brief, default: load it with load_adapter"):
        served(adapter="formal", input_ids=[PROMPT])
    with pytest.raises(ServingError, match="no adapter 'formal' is loaded; loaded is brief"):
        served.unload_adapter("formal")
    assert_is(served, two, "brief", "brief")
    served.load_adapter("formal", two.file("brief"))
    assert_is(served, two, "formal", "brief")


def test_a_name_is_taken_once(served: OrtModel, two: Two) -> None:
    with pytest.raises(ServingError, match="an adapter 'formal' is loaded already; unload it first, or take another"):
        served.load_adapter("formal", two.file("brief"))
    assert_is(served, two, "formal", "formal")


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "a" * 129, None, 3, "ä"])
def test_a_name_is_letters_digits_dots_dashes_and_underscores(served: OrtModel, two: Two, name: Any) -> None:
    with pytest.raises(ServingError, match="is not a name for an adapter: take letters, digits"):
        served.load_adapter(name, two.file("brief"))
    assert list(served.adapters.loaded) == ["brief", "formal"]


def test_adapters_of_the_export_itself_need_no_loading(two: Two) -> None:
    model = load(two.export)
    assert list(model.adapters) == ["default"]  # what a call can name
    assert "default" in model.adapters
    assert "formal" not in model.adapters
    assert list(model.adapters.loaded) == []
    assert_is(model, two, "default", None)  # it was exported untrained, so that it changes nothing
    assert list(model.adapters.loaded) == ["default"]


@pytest.mark.parametrize("adapter", [["formal", "brief"], ("formal",), 3])
def test_one_adapter_runs_in_a_call(served: OrtModel, adapter: Any) -> None:
    with pytest.raises(ServingError, match=r"adapter must be one name or None, but got .*: one adapter runs in a call"):
        served(adapter=adapter, input_ids=[PROMPT])


@pytest.mark.parametrize(("limit", "is_taken"), [(4, False), (7, False), (8, True), (None, True)])
def test_a_rank_above_the_limit_is_refused(two: Two, limit: int | None, is_taken: bool) -> None:
    model = load(two.export, max_rank=limit)
    if is_taken:
        model.load_adapter("formal", two.file("formal"))
    else:
        with pytest.raises(ServingError, match=rf"has rank 8, above the limit of {limit} \(max_rank\)"):
            model.load_adapter("formal", two.file("formal"))
    assert list(model.adapters.loaded) == (["formal"] if is_taken else [])


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "8"])
def test_a_limit_is_a_positive_integer(two: Two, limit: Any) -> None:
    with pytest.raises(ServingError, match="max_rank must be a positive integer or None, but got"):
        load(two.export, max_rank=limit)


def test_a_merged_export_takes_no_adapters(exports: Exports, two: Two) -> None:
    model = exports.base("llama")
    for call in (
        lambda: model.load_adapter("formal", two.file("formal")),
        lambda: model.unload_adapter("formal"),
        lambda: model(adapter="formal", input_ids=[PROMPT]),
        lambda: model.generate(PROMPT, adapter="formal"),
    ):
        with pytest.raises(ServingError, match="takes no adapters: it was exported with adapters='merged'"):
            call()
    with pytest.raises(ExportError, match=r"takes no adapters.*, or fold the adapter into it with fold_onnx"):
        export_adapter(two.folder, model.directory)


@pytest.mark.parametrize(("mode", "name"), [("inputs", "llama"), ("inputs", "t5")])
def test_required_inputs_need_no_adapter(exports: Exports, mode: str, name: str) -> None:
    model = exports.adapted(name, 2, mode)
    expected = expected_of(KINDS[name].make(), KINDS[name])
    assert relative_error(output_of(model, KINDS[name]), expected) < 1e-4
    assert not [value for value in model.input_names if "gralora" in value]


# -- I/O binding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["data", "inputs"])
def test_an_adapter_is_bound(exports: Exports, two: Two, mode: str) -> None:
    model = exports.adapted("llama", 2, mode)
    inputs = model.call_inputs.arrays(arrays(KIND.batch()))
    names: list[str | None] = ["formal", None, "brief"]
    try:
        for name in two.peft:
            model.load_adapter(name, two.file(name))
        binding = model.session.io_binding()  # one binding, bound anew
        for name in names:
            model.bind_adapter(binding, name)
            for key, value in inputs.items():
                binding.bind_cpu_input(key, value)
            for output in model.output_names:
                binding.bind_output(output)
            model.session.run_with_iobinding(binding)
            logits = torch.from_numpy(binding.copy_outputs_to_cpu()[model.output_names.index("logits")])
            assert relative_error(logits.flatten(0, 1), two.expected[name]) < 1e-4
        with pytest.raises(ServingError, match="no adapter 'other'"):
            model.bind_adapter(binding, "other")
    finally:
        for name in list(model.adapters.loaded):
            model.unload_adapter(name)


# -- generation --------------------------------------------------------------------------------------------------------


def test_generated_tokens_are_those_of_a_merged_export(two: Two, served: OrtModel, tmp_path: Path) -> None:
    answers: list[list[int]] = [served.generate(PROMPT, max_new_tokens=12)]
    for name in two.peft:
        model = GraloraModel.from_pretrained(KIND.trace(KIND.make()), two.export.parent / name)
        export_onnx(model, tmp_path / name, verify=False)
        answers.append(served.generate(PROMPT, max_new_tokens=12, adapter=name))
        assert answers[-1] == load(tmp_path / name).generate(PROMPT, max_new_tokens=12)
    assert served.generate(PROMPT, max_new_tokens=12) == answers[0]
    assert len({tuple(answer) for answer in answers}) == 3
    both = served.generate([PROMPT, PROMPT[:3]], max_new_tokens=4, adapter="formal")
    assert both[0] == answers[1][:4]
    assert list(served.generate(PROMPT, max_new_tokens=4, adapter="formal", stream=True)) == [
        [token] for token in answers[1][:4]
    ]


def test_answers_are_those_of_the_file_that_was_loaded(two: Two, tmp_path: Path) -> None:
    model = load(two.export)
    for path in two.folder.glob("formal.*"):
        shutil.copy(path, tmp_path)
    model.load_adapter("formal", tmp_path / "formal.onnx_adapter")
    with pytest.raises(ServingError, match="no adapter 'other'"):
        model.generate(PROMPT, adapter="other")
    whole = model.generate(PROMPT, adapter="formal", max_new_tokens=2)
    data = bytearray((tmp_path / "formal.onnx_adapter").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "formal.onnx_adapter").write_bytes(data)
    assert model.generate(PROMPT, adapter="formal", max_new_tokens=2) == whole
    assert_is(model, two, "formal", "formal")


def test_texts_are_answered_with_an_adapter(two: Two, tmp_path: Path) -> None:
    shutil.copytree(two.export, tmp_path / "onnx")
    tiny_tokenizer().save_pretrained(tmp_path / "onnx")
    model = load(tmp_path / "onnx")
    model.load_adapter("formal", two.file("formal"))
    assert isinstance(model.generate("abc", max_new_tokens=3, adapter="formal"), str)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_get_the_results_of_their_own_adapters(served: OrtModel, two: Two) -> None:
    names: list[str | None] = list(itertools.islice(itertools.cycle(["formal", "brief", None]), 60))
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(lambda name: output_of(served, KIND, name), names))
    for name, output in zip(names, outputs, strict=True):
        assert relative_error(output, two.expected[name]) < 1e-4


def test_two_threads_generate_with_two_adapters(served: OrtModel, two: Two) -> None:
    expected = {name: served.generate(PROMPT, max_new_tokens=8, adapter=name) for name in two.peft}
    names = ["formal", "brief"] * 8
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda name: served.generate(PROMPT, max_new_tokens=8, adapter=name), names))
    assert answers == [expected[name] for name in names]


def test_adapters_come_and_go_while_others_run(served: OrtModel, two: Two) -> None:
    def load_and_unload(index: int) -> Iterator[None]:
        for _ in range(5):
            served.load_adapter(f"own-{index}", two.file("formal"))
            assert_is(served, two, f"own-{index}", "formal")
            served.unload_adapter(f"own-{index}")
        yield

    def run(_: int) -> None:
        for _ in range(10):
            assert_is(served, two, "brief", "brief")

    with ThreadPoolExecutor(6) as pool:
        runs = [pool.submit(run, index) for index in range(2)]
        changes = [pool.submit(lambda i=index: list(load_and_unload(i))) for index in range(4)]
        for future in (*runs, *changes):
            future.result()
    assert list(served.adapters.loaded) == ["brief", "formal"]


def test_one_of_many_threads_that_load_a_name_gets_it(two: Two) -> None:
    model = load(two.export)

    def take(_: int) -> str:
        try:
            model.load_adapter("formal", two.file("formal"))
        except ServingError as error:
            return str(error)
        return "loaded"

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(take, range(8)))
    assert sorted("is loaded already" in text for text in said) == [False] + [True] * 7
    assert said.count("loaded") == 1
    assert np.isfinite(output_of(model, KIND, "formal").numpy()).all()


# -- OpenVINO's plug-in, where it is installed and has a device --------------------------------------------------------


@pytest.mark.parametrize("mode", ["data", "inputs"])
def test_adapters_run_on_openvino(exports: Exports, two: Two, openvino: Any, mode: str) -> None:
    exact = {"load_config": {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}}
    model = load(exports.adapted("llama", 2, mode).directory, ("OpenVINOExecutionProvider", exact))
    for name in two.peft:
        model.load_adapter(name, two.file(name))
    for adapter in (None, *two.peft):
        assert_is(model, two, adapter, adapter)
