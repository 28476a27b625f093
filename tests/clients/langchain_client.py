"""LangChain: python langchain_client.py TEXT_URL EMBEDDING_URL."""

import json
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

text_url, embedding_url = sys.argv[1:]
ASKED = [SystemMessage("Be brief."), HumanMessage("Hello")]


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]
    is_warm: bool


@tool
def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """Return the weather in a city."""
    return f"sunny in {city}"


def tool_loop(model):
    call = model.bind_tools([get_weather], tool_choice="any").invoke(ASKED)
    results = [ToolMessage(get_weather.invoke(each["args"]), tool_call_id=each["id"]) for each in call.tool_calls]
    answer = model.bind_tools([get_weather]).invoke([*ASKED, call, *results])
    return [each["name"] for each in call.tool_calls][:1], answer.text


def streamed_call(model):
    whole = None
    for chunk in model.bind_tools([get_weather], tool_choice="any").stream(ASKED):
        whole = chunk if whole is None else whole + chunk
    return whole.tool_calls[0]["args"]["city"] in ("Rome", "Paris")


found = {}
for name, options in {"chat": {}, "responses": {"use_responses_api": True}}.items():
    model = ChatOpenAI(model="base", base_url=text_url, api_key="none", **options)
    likeliest = model.bind(temperature=0, max_tokens=8)
    found[name] = {
        "whole": likeliest.invoke(ASKED).text,
        "streamed": "".join(chunk.text for chunk in likeliest.stream(ASKED)),
        "tools": tool_loop(model),
        "streamed call": streamed_call(model),
        "forms": [
            type(model.with_structured_output(Weather, method=method).invoke("json")).__name__
            for method in ("json_schema", "function_calling")
        ],
    }
completion = OpenAI(model="base", base_url=text_url, api_key="none", temperature=0, max_tokens=8)
found["completion"] = {"whole": completion.invoke("Hello"), "streamed": "".join(completion.stream("Hello"))}
embeddings = OpenAIEmbeddings(
    model="onnx", base_url=embedding_url, api_key="none", chunk_size=64, check_embedding_ctx_length=False
)
found["embeddings"] = [embeddings.embed_query("a"), *embeddings.embed_documents(["a", "b c"])]
print(json.dumps(found))
