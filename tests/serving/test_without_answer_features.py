"""Without a feature of answers texts are served as ever, and its fields and options are refused by their names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pruned_tree import copy_without, run_on
from served_exports import decoders

CALLED = {"model": "data", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
TOOL = {"type": "function", "function": {"name": "now"}}
HISTORY = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "tool_call_id": "c"}]
NOT_THERE = "no installed feature can constrain"
# by feature: requests of chats, with what they are told
REFUSED: dict[str, list[tuple[dict[str, object], str]]] = {
    "tools": [
        ({"tools": [TOOL]}, "tools is not supported; leave it out"),
        ({"tool_choice": "none"}, "tool_choice is not supported; leave it out"),
        ({"messages": HISTORY}, "messages.1.role: Input should be 'system', 'developer', 'user' or 'assistant'"),
    ],
    "speculation": [],
    "structured_outputs": [
        ({"response_format": {"type": "json_object"}}, "response_format is not supported; leave it out"),
        ({"guided_regex": "a"}, "guided_regex is not supported; leave it out"),
        ({"tools": [TOOL]}, f"tools: {NOT_THERE} tool calls; leave it out"),
    ],
}
PROGRAM = """
import json, sys
from pathlib import Path

from starlette.testclient import TestClient
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import GraloraError
from gralora_fx.service.app import create_app
from gralora_fx.serving import load

export, plain, asked = sys.argv[1], *map(json.loads, sys.argv[2:])
with TestClient(create_app(ServiceSettings(Path(export)))) as client:
    path = "/v1/chat/completions"
    client.post(path, json=plain).raise_for_status()
    client.post("/v1/responses", json={"model": "data", "input": "a", "max_output_tokens": 3}).raise_for_status()
    for more in asked:
        answer = client.post(path, json={**plain, **more})
        print(answer.status_code, answer.json()["error"]["message"])
    client.get("/openapi.json").raise_for_status()
model = load(export)
for options in ({}, {"regex": "ab"}, {"prompt_lookup_num_tokens": 3}):
    try:
        print(*options, model.generate("a", max_new_tokens=2, **options) and "answered")
    except GraloraError as error:
        print(*options, error)
"""


@pytest.mark.parametrize("feature", REFUSED)
def test_its_fields_are_refused_and_texts_are_served(feature: str, tmp_path: Path) -> None:
    exports, _ = decoders(tmp_path / "exports", "data")
    asked = [more for more, _ in REFUSED[feature]]
    printed = run_on(
        copy_without(tmp_path / "tree", feature), PROGRAM, exports["data"], *map(json.dumps, (CALLED, asked))
    )
    *refused, plain, regex, drafts = printed.splitlines()
    assert refused == [f"400 {message}" for _, message in REFUSED[feature]]
    assert plain == "answered"
    proposed = "3 proposed tokens are asked for, and no feature that is installed proposes any; install gralora-fx"
    expected = f"{NOT_THERE} answers; install gralora-fx with all of its features"
    assert regex == ("regex " + (expected if feature == "structured_outputs" else "answered"))
    told = f"{proposed} with all of its features" if feature == "speculation" else "answered"
    assert drafts == f"prompt_lookup_num_tokens {told}"
