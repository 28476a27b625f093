"""Pydantic AI, with both of its models: python pydantic_ai_client.py TEXT_URL EMBEDDING_URL."""

import asyncio
import json
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, Embedder, NativeOutput, Tool
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

text_url, embedding_url = sys.argv[1:]


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]
    is_warm: bool


def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """Return the weather in a city."""
    return f"sunny in {city}"


async def at_first(context, definition):
    """Offer a tool in the first step of a run alone, so that the next one answers."""
    return definition if context.run_step == 1 else None


def results(run):
    parts = [part for message in run.new_messages() for part in message.parts]
    return [part.content for part in parts if part.part_kind == "tool-return" and part.tool_name == "get_weather"]


async def streamed(agent):
    async with agent.run_stream("Hello") as run:
        return "".join([delta async for delta in run.stream_text(delta=True, debounce_by=None)])


async def main():
    found = {}
    for name, kind in {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}.items():
        model = kind("base", provider=OpenAIProvider(base_url=text_url, api_key="none"))
        likeliest = Agent(model, instructions="Be brief.", model_settings={"temperature": 0, "max_tokens": 8})
        called = Agent(model, output_type=Weather, tools=[Tool(get_weather, prepare=at_first)])
        first = await called.run("Hello")
        again = await called.run("And now?", message_history=first.all_messages())
        found[name] = {
            "whole": (await likeliest.run("Hello")).output,
            "streamed": await streamed(likeliest),
            "tools": [type(run.output).__name__ for run in (first, again)],
            "results": [*results(first), *results(again)],
            "form": (await Agent(model, output_type=NativeOutput(Weather)).run("Hello")).output.model_dump(),
        }
    embedder = Embedder(OpenAIEmbeddingModel("onnx", provider=OpenAIProvider(base_url=embedding_url, api_key="none")))
    found["embeddings"] = [list(vector) for vector in (await embedder.embed_documents(["a", "b c"])).embeddings]
    print(json.dumps(found))


asyncio.run(main())
