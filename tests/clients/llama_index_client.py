"""LlamaIndex: python llama_index_client.py TEXT_URL EMBEDDING_URL."""

import json
import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

text_url, embedding_url = sys.argv[1:]
ASKED = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hello")]
LIKELIEST = {"temperature": 0, "max_tokens": 8}


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Rome", "Paris"]
    is_warm: bool


def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """Return the weather in a city."""
    return f"sunny in {city}"


tools = [FunctionTool.from_defaults(get_weather)]
own = {"model": "base", "api_base": text_url, "api_key": "none", "is_chat_model": True}
chat = OpenAILike(**own, is_function_calling_model=True)
schemas = OpenAILike(**own, should_use_structured_outputs=True)
# it knows the contexts of OpenAI's models alone, so the name is given beside one of them
responses = OpenAIResponses(
    model="gpt-4o-mini", api_base=text_url, api_key="none", additional_kwargs={"model": "base"}, max_output_tokens=300
)
completion = OpenAILike(**{**own, "is_chat_model": False})
embeddings = OpenAILikeEmbedding(model_name="onnx", api_base=embedding_url, api_key="none")
found = {
    "chat": {
        "whole": chat.chat(ASKED, **LIKELIEST).message.content,
        "streamed": "".join(chunk.delta for chunk in chat.stream_chat(ASKED, **LIKELIEST)),
        "tools": chat.predict_and_call(tools, user_msg="Hello", tool_required=True).response,
        "forms": [type(model.as_structured_llm(Weather).complete("Hello").raw).__name__ for model in (chat, schemas)],
    },
    "responses": {
        "whole": responses.chat(ASKED).message.content,
        "streamed": "".join(chunk.delta for chunk in responses.stream_chat(ASKED)),
        "tools": responses.predict_and_call(tools, user_msg="Hello", tool_required=True).response,
    },
    "completion": {
        "whole": completion.complete("Hello", **LIKELIEST).text,
        "streamed": "".join(chunk.delta for chunk in completion.stream_complete("Hello", **LIKELIEST)),
    },
    "embeddings": [embeddings.get_query_embedding("a"), *embeddings.get_text_embedding_batch(["a", "b c"])],
}
print(json.dumps(found))
