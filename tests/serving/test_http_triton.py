"""The Open Inference Protocol, spoken by Triton's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import tritonclient.http as triton
from running_service import serving
from served_exports import adapted, chat_tokenizer
from starlette.testclient import TestClient
from tiny_models import text_batch
from tritonclient.utils import InferenceServerException

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ServingError, shown
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from gralora_fx.service.protocols.inference.requests import datatype_of, from_bytes, from_json, to_bytes, to_numbers
from gralora_fx.serving import load

LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    model, _ = adapted("bert", folder, targets=["query", "value", "dense"], num_labels=3, pad_token_id=0)
    export_onnx(model, folder / "base", adapters="data", verify=False, tokenizer=chat_tokenizer())
    return folder / "base"


@pytest.fixture(scope="module")
def client(encoder: Path) -> Iterator[triton.InferenceServerClient]:
    with serving(create_app(ServiceSettings(encoder))) as address:
        client = triton.InferenceServerClient("{}:{}".format(*address))
        yield client
        client.close()


def tensors(inputs: dict[str, Any], *, binary: bool = True) -> list[Any]:
    made = []
    for name, array in inputs.items():
        made.append(triton.InferInput(name, list(array.shape), "INT64"))
        made[-1].set_data_from_numpy(array, binary_data=binary)
    return made


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("base")
    assert client.is_model_ready("wide", "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("wide", "2")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    found = client.get_model_metadata("wide", "1")
    assert found == client.get_model_metadata("wide")
    assert found["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
    assert (found["versions"], found["outputs"]) == (["1"], [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}])


def test_answers_are_those_of_the_model(client: triton.InferenceServerClient, encoder: Path) -> None:
    model = load(encoder)
    inputs = {name: value.numpy() for name, value in text_batch(3, 7).items()}
    for adapter in (None, "small", "wide"):
        expected = model(**inputs, adapter=[adapter] * 3)["logits"]
        assert np.allclose(model(**inputs, adapter=adapter)["logits"], expected, atol=1e-6)  # of model.onnx
        for binary_in in (True, False):
            for binary_out in (True, False, None):
                outputs = None if binary_out is None else [triton.InferRequestedOutput("logits", binary_out)]
                found = client.infer(
                    adapter or "base", tensors(inputs, binary=binary_in), outputs=outputs, request_id="7"
                )
                assert np.array_equal(found.as_numpy("logits"), expected)
                assert found.get_response()["id"] == "7"
                assert ("data" in found.get_output("logits")) == (binary_out is False)
    for packing in ("gzip", "deflate"):
        options = {"request_compression_algorithm": packing, "response_compression_algorithm": packing}
        found = client.infer("wide", tensors(inputs), model_version="1", **options)
        assert np.array_equal(found.as_numpy("logits"), expected)


def test_errors_reach_the_client(client: triton.InferenceServerClient) -> None:
    good = tensors({"input_ids": np.full((1, 3), 5)})
    outside = tensors({"input_ids": np.full((1, 3), 101)})
    types = tensors({"input_ids": np.full((1, 3), 5), "token_type_ids": np.full((1, 3), 2)})
    classes = [triton.InferRequestedOutput("logits", class_count=2)]
    shared = triton.InferInput("input_ids", [1, 3], "INT64")
    shared.set_shared_memory("region", 24)
    for model, inputs, options, status, message in (
        ("other", good, {}, "404", "no model 'other'"),
        ("wide", good, {"model_version": "2"}, "404", "no version '2'"),
        ("wide", outside, {}, "400", "outside the vocabulary of 101 tokens"),
        ("wide", types, {}, "400", "the model has 2 types, from 0"),
        ("wide", tensors({"input_ids": np.zeros((0, 3), int)}), {}, "400", "is empty"),
        ("wide", good, {"priority": 1}, "400", r"parameters\.priority is not supported"),
        ("wide", good, {"sequence_id": 5}, "400", r"parameters\.sequence_id is not supported"),
        ("wide", good, {"outputs": classes}, "400", "classification is not supported"),
        ("wide", [shared], {}, "400", "shared_memory_region is not supported"),
    ):
        with pytest.raises(InferenceServerException, match=message) as error:
            client.infer(model, inputs, **options)
        assert error.value.status() == status
    for unknown in (client.get_model_config, client.get_inference_statistics, client.load_model):
        with pytest.raises(InferenceServerException, match="there is no"):
            unknown("wide")


class Cast(torch.nn.Module):
    """Numbers of one type, doubled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.logical_not(x) if x.dtype == torch.bool else x + x


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "FP32"),
        (torch.float64, "FP64"),
        (torch.int8, "INT8"),
        (torch.int16, "INT16"),
        (torch.int32, "INT32"),
        (torch.int64, "INT64"),
        (torch.uint8, "UINT8"),
        (torch.bool, "BOOL"),
    ],
)
def test_types(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    sample = torch.tensor([[1, 0, 3], [4, 5, 0]]).to(dtype)
    export_onnx(trace(Cast(), (sample,)), tmp_path / "net", verify=False)
    values, expected = sample[:1].numpy(), Cast()(sample[:1]).numpy()
    with TestClient(create_app(ServiceSettings(tmp_path / "net"))) as client:
        (described,) = client.get("/v2/models/net").json()["inputs"]
        assert described["datatype"] == name
        fields = {"name": described["name"], "shape": [1, 3], "datatype": name}
        numbers = {"inputs": [{**fields, "data": values.tolist()}]}
        found = client.post("/v2/models/net/infer", json=numbers).raise_for_status().json()["outputs"][0]
        assert (found["datatype"], found["data"]) == (name, expected.ravel().tolist())
        head = {"inputs": [{**fields, "parameters": {"binary_data_size": values.nbytes}}]}
        head |= {"parameters": {"binary_data_output": True}}
        answer = post(client, head, values.tobytes()).raise_for_status()
        start = int(answer.headers[LENGTH])
        assert json.loads(answer.content[:start])["outputs"][0]["parameters"] == {"binary_data_size": expected.nbytes}
        assert answer.content[start:] == expected.tobytes()


@pytest.mark.parametrize("kind", ["float16", "uint16", "uint32", "uint64", "int8", "bool"])
def test_types_that_few_exports_have(kind: str) -> None:
    datatype = datatype_of(SimpleNamespace(name="x", type=f"tensor({kind})"))
    values = np.array([[1, 0, 1]], kind)
    assert np.array_equal(from_bytes("x", memoryview(values.tobytes()), [1, 3], datatype), values)
    assert np.array_equal(from_json("x", values.tolist(), [1, 3], datatype), values)
    assert to_bytes(values, datatype) == values.tobytes()
    assert orjson.loads(orjson.dumps(to_numbers("x", values), option=orjson.OPT_SERIALIZE_NUMPY)) == [1, 0, 1]
    with pytest.raises(ServingError, match=r"not of|does not hold"):
        from_json("x", [2**70], [1], datatype)
    with pytest.raises(ServingError, match="which the Open Inference Protocol does not have"):
        datatype_of(SimpleNamespace(name="x", type="tensor(bfloat16)"))


def post(client: TestClient, head: dict[str, Any], tail: bytes, length: str | None = None) -> Any:
    content = json.dumps(head).encode()
    headers = {LENGTH: str(len(content)) if length is None else length, "Content-Type": "application/octet-stream"}
    return client.post("/v2/models/net/infer", content=content + tail, headers=headers)


def test_binary_tensors_may_be_infinite_and_json_may_not(tmp_path: Path) -> None:
    export_onnx(trace(Cast(), (torch.ones(2, 3),)), tmp_path / "net", verify=False)
    values = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    with TestClient(create_app(ServiceSettings(tmp_path / "net"))) as client:
        (name,) = [value["name"] for value in client.get("/v2/models/net").json()["inputs"]]
        fields = {"name": name, "shape": [1, 3], "datatype": "FP32"}
        head: dict[str, Any] = {"inputs": [{**fields, "parameters": {"binary_data_size": 12}}]}
        answer = post(client, {**head, "parameters": {"binary_data_output": True}}, values.tobytes())
        start = int(answer.headers[LENGTH])
        assert np.array_equal(np.frombuffer(answer.content[start:], "<f4"), values[0], equal_nan=True)
        refused = post(client, head, values.tobytes())
        assert refused.status_code == 400
        assert "not finite for these inputs; ask for it as binary data" in refused.json()["error"]


def announces(size: int, left: int = 12) -> str:
    return f"announces {shown(size)} bytes by binary_data_size, and {left} are there for it"


def no_count(size: object) -> str:
    return f"is {shown(size)}; it is a whole number of bytes, and 12 are there for it"


@pytest.mark.parametrize(
    ("fields", "tail", "length", "message"),
    [
        ({"parameters": {"binary_data_size": 11}}, bytes(11), None, "has 11 bytes, not those of FP32 in shape [1, 3]"),
        (
            {"parameters": {"binary_data_size": 12}},
            bytes(13),
            None,
            "13 bytes follow the JSON object, and 1 of them belong to no input",
        ),
        *[
            ({"parameters": {"binary_data_size": size}}, bytes(12), None, announces(size))
            for size in (13, 10**12, 2**63, 2**64 - 4, 2**64 + 12, 2**70, 10**400)
        ],
        (
            {"parameters": {"binary_data_size": 12}},
            b"",
            None,
            "announces 12 bytes by binary_data_size, and 0 are there",
        ),
        (
            {"parameters": {"binary_data_size": 8}},
            bytes(12),
            None,
            "has 8 bytes, not those of FP32 in shape [1, 3], which are 12",
        ),
        (
            {"parameters": {"binary_data_size": 12}, "shape": [1, -3]},
            bytes(12),
            None,
            "in shape [1, -3], which no tensor has",
        ),
        *[
            ({"parameters": {"binary_data_size": size}}, bytes(12), None, no_count(size))
            for size in (-1, -(2**70), 12.0, 11.5, 1e400, "12", True, [12], {"size": 12})
        ],
        ({"parameters": {"binary_data_size": None}}, bytes(12), None, "either data or binary_data_size"),
        (
            {"datatype": "BYTES", "parameters": {"binary_data_size": 12}},
            b"\xff" * 12,
            None,
            "'BYTES', but the model takes",
        ),
        ({"parameters": {"binary_data_size": 12}, "data": [1]}, bytes(12), None, "either data or binary_data_size"),
        ({}, b"", None, "either data or binary_data_size"),
        ({"parameters": {"binary_data_size": 0}, "shape": [0, 3]}, b"", None, "is empty"),
        ({"parameters": {"binary_data_size": 0}, "shape": [0, 10**30]}, b"", None, "cannot have shape"),
        ({"data": [1], "shape": [1] * 100}, b"", None, "cannot have shape"),
        ({"data": [1], "shape": []}, b"", None, "but the model takes"),
        (
            {"parameters": {"binary_data_size": 12}},
            bytes(12),
            "0",
            "the first 0 bytes of the body are not a JSON object",
        ),
        (
            {"parameters": {"binary_data_size": 12}},
            bytes(12),
            "1",
            "the first 1 bytes of the body are not a JSON object",
        ),
        ({"parameters": {"binary_data_size": 12}}, bytes(12), "110", "the first 110 bytes of the body are not a JSON"),
        ({"parameters": {"binary_data_size": 12}}, bytes(12), "99999", "length of the JSON object"),
        ({"parameters": {"binary_data_size": 12}}, bytes(12), "-1", "length of the JSON object"),
        ({"parameters": {"binary_data_size": 12}}, bytes(12), "9" * 5000, "length of the JSON object"),
        ({"parameters": {"binary_data_size": 12}}, bytes(12), "0" * 5000, "length of the JSON object"),
        ({"data": [1], "shape": [2] * 3_000_000}, b"", None, "cannot have shape"),  # whose product takes minutes
        ({"parameters": {"binary_data_size": 12}, "shape": [2] * 3_000_000}, bytes(12), None, "cannot have shape"),
        # texts of this length at every place would be 60 GB
        ({"data": [*range(1000), "a" * 15_000_000], "shape": [1001]}, b"", None, "is not of FP32"),
    ],
)
def test_bad_binary_tensors(
    plain: TestClient, fields: dict[str, Any], tail: bytes, length: str | None, message: str
) -> None:
    (name,) = [value["name"] for value in plain.get("/v2/models/net").json()["inputs"]]
    found = post(plain, {"inputs": [{"name": name, "shape": [1, 3], "datatype": "FP32", **fields}]}, tail, length)
    assert found.status_code == 400
    assert message in found.json()["error"]
    if "there for it" in message:
        assert repr(name) in found.json()["error"]


class Pair(torch.nn.Module):
    """A sum of two inputs, and a difference."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + y, x - y


def test_bytes_of_two_tensors(tmp_path: Path) -> None:
    """Each input has what it announces, and no input the bytes of another or fewer than it announces."""
    export_onnx(trace(Pair(), (torch.ones(2, 3), torch.ones(2, 3))), tmp_path / "net", verify=False)
    values = np.arange(6, dtype=np.float32).reshape(2, 1, 3)
    with TestClient(create_app(ServiceSettings(tmp_path / "net"))) as client:
        described = client.get("/v2/models/net").json()
        x, y = (value["name"] for value in described["inputs"])
        names = [value["name"] for value in described["outputs"]]

        def ask(*sizes: Any, **more: Any) -> Any:
            inputs = []
            for name, size, array in zip((x, y), sizes, values, strict=True):
                given = {"data": array.tolist()} if size is None else {"parameters": {"binary_data_size": size}}
                inputs.append({"name": name, "shape": [1, 3], "datatype": "FP32", **given})
            tail = b"".join(array.tobytes() for array, size in zip(values, sizes, strict=True) if size is not None)
            return post(client, {"inputs": inputs, **more}, tail)

        for sizes in ((12, 12), (None, 12), (12, None)):
            first = ask(*sizes).raise_for_status().json()["outputs"][0]
            assert first["data"] == (values[0] + values[1]).ravel().tolist()
        for sizes, place, problem in (
            ((12, 16), y, announces(16)),
            ((12, 2**70), y, announces(2**70)),
            ((2**70, 12), x, announces(2**70, 24)),
            ((24, 12), x, "has 24 bytes, not those of FP32 in shape [1, 3], which are 12"),
            ((8, 16), x, "has 8 bytes, not those of FP32 in shape [1, 3], which are 12"),
            ((None, 16), y, announces(16)),
            ((12, -1), y, no_count(-1)),
        ):
            found = ask(*sizes)
            assert found.status_code == 400
            assert repr(place) in found.json()["error"]
            assert problem in found.json()["error"]

        def forms(**more: Any) -> dict[str, bool]:
            answer = ask(12, 12, **more).raise_for_status()
            head = json.loads(answer.content[: int(answer.headers.get(LENGTH, len(answer.content)))])
            return {output["name"]: "data" not in output for output in head["outputs"]}

        asked = {"outputs": [{"name": names[0]}, {"name": names[1], "parameters": {"binary_data": False}}]}
        assert forms(**asked) == {names[0]: False, names[1]: False}
        everything = {"parameters": {"binary_data_output": True}}
        assert forms(**everything) == {names[0]: True, names[1]: True}
        assert forms(**asked, **everything) == {names[0]: True, names[1]: False}  # an output's own word counts
        for parameters in ({"binary_data_size": 12}, {"binary_data": "yes"}, {"binary_data": 1}):
            found = ask(12, 12, outputs=[{"name": names[0], "parameters": parameters}])
            assert found.status_code == 400
            assert next(iter(parameters)) in found.json()["error"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    path = tmp_path_factory.mktemp("plain") / "net"
    export_onnx(trace(Cast(), (torch.ones(2, 3),)), path, verify=False)
    with TestClient(create_app(ServiceSettings(path))) as client:
        yield client


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'"\\ud800"',
        b'{"inputs": [{"name": "\\ud800", "shape": [1], "datatype": "FP32", "data": [1]}]}',
        DEEP,
        b'{"inputs": ' + DEEP,
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": ' + DEEP,
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": ' + b"[" * 150 + b"]" * 150 + b"}]}",
        b'{"inputs": [{"name": "x", "shape": [' + b"9" * 5000 + b'], "datatype": "FP32", "data": [1]}]}',
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [' + b"9" * 5000 + b"]}]}",
        b'{"inputs": [], "inputs": 5}',
    ],
)
def test_bad_json(plain: TestClient, content: bytes) -> None:
    (name,) = [value["name"] for value in plain.get("/v2/models/net").json()["inputs"]]
    content = content.replace(b'"x"', json.dumps(name).encode())
    for kind in ("application/json", "text/plain", "application/xml", ""):
        found = plain.post("/v2/models/net/infer", content=content, headers={"Content-Type": kind})
        assert found.status_code == 400
        assert isinstance(found.json()["error"], str)


@pytest.mark.parametrize("name", ["..", "../net", "%2e%2e", "net%2F..", "a%00b", "%00", "x" * 20_000, "%ED%A0%80", "ü"])
def test_strange_names(plain: TestClient, name: str) -> None:
    for path in (f"/v2/models/{name}", f"/v2/models/{name}/infer", f"/v2/models/net/versions/{name}/infer"):
        found = plain.post(path, content=b"{}")
        assert found.status_code in (400, 404, 405)
        assert isinstance(found.json()["error"], str)
