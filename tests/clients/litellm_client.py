"""LiteLLM, with its providers for services like this one: python litellm_client.py TEXT_URL EMBEDDING_URL."""

import json
import os
import sys
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices

import litellm
from pydantic import BaseModel

text_url, embedding_url = sys.argv[1:]
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": CITY}}]
LIKELIEST = {"temperature": 0, "max_tokens": 8}


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]
    is_warm: bool


def tool_loop(model):
    call = ask(model, tools=TOOLS, tool_choice="required").choices[0].message
    results = [
        {"role": "tool", "tool_call_id": each.id, "name": each.function.name, "content": "sunny"}
        for each in call.tool_calls
    ]
    answer = ask(model, messages=[*ASKED, call, *results], tools=TOOLS)
    return call.tool_calls[0].function.name, answer.choices[0].message.content


def ask(model, **options):
    return litellm.completion(model=model, api_base=text_url, api_key="none", **{"messages": ASKED, **options})


found = {}
for provider in ("openai", "hosted_vllm"):
    model = f"{provider}/base"
    chunks = ask(model, stream=True, **LIKELIEST)
    found[provider] = {
        "whole": ask(model, **LIKELIEST).choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "tools": tool_loop(model),
        "form": Weather.model_validate_json(
            ask(model, response_format=Weather).choices[0].message.content
        ).model_dump(),
        "idle": ask(model, user="me", store=True, service_tier="flex").choices[0].message.content,
    }
    vectors = litellm.embedding(model=f"{provider}/onnx", api_base=embedding_url, api_key="none", input=["a", "b c"])
    found[provider]["embeddings"] = [each["embedding"] for each in vectors.data]
options = {"model": "openai/base", "api_base": text_url, "api_key": "none", "input": "Hello"}
found["responses"] = {
    "status": litellm.responses(**options).status,
    "streamed": [event.type for event in litellm.responses(**options, stream=True)][-1],
}
text = litellm.text_completion(
    model="text-completion-openai/base", api_base=text_url, api_key="none", prompt="Hello", **LIKELIEST
)
found["completion"] = {"whole": text.choices[0].text}
print(json.dumps(found))
