"""OpenAI Agents, with both of its models: python agents_client.py TEXT_URL EMBEDDING_URL."""

import asyncio
import json
import sys
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=sys.argv[1], api_key="none")


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]
    is_warm: bool


@function_tool
def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """Return the weather in a city."""
    return f"sunny in {city}"


async def deltas(agent):
    run = Runner.run_streamed(agent, "Hello")
    async for _ in run.stream_events():
        pass
    return run.final_output


async def main():
    found = {}
    for name, kind in {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}.items():
        own = {"name": "helper", "instructions": "Be brief.", "model": kind("base", client)}
        likeliest = Agent(**own, model_settings=ModelSettings(temperature=0, top_p=1))
        kept = ModelSettings(store=True, metadata={"a": "b"}, include_usage=True)
        required = Agent(**own, tools=[get_weather], model_settings=ModelSettings(tool_choice="required"))
        called = await Runner.run(required, "Hello")  # the call and its result go back, and the choice is free then
        found[name] = {
            "whole": (await Runner.run(likeliest, "Hello")).final_output,
            "streamed": await deltas(likeliest),
            "tools": [item.type for item in called.new_items],
            "result": called.new_items[1].output,
            "answer": called.final_output,
            "form": (await Runner.run(Agent(**own, output_type=Weather), "Hello")).final_output.model_dump(),
            "kept": (await Runner.run(Agent(**own, model_settings=kept), "Hello")).final_output,
        }
    await client.close()
    print(json.dumps(found))


asyncio.run(main())
