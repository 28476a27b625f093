"""Instructor, in the modes of OpenAI's protocol: python instructor_client.py TEXT_URL EMBEDDING_URL."""

import json
import sys
from typing import Literal

import instructor
import openai
from instructor import Mode
from pydantic import BaseModel

ASKED = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_retries": 0}


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]
    is_warm: bool


found = {}
for mode in (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS):
    client = instructor.from_openai(openai.OpenAI(base_url=sys.argv[1], api_key="none"), mode=mode)
    whole = client.chat.completions.create(response_model=Weather, **ASKED)
    *_, last = client.chat.completions.create_partial(response_model=Weather, **ASKED)
    found[mode.name] = [whole.model_dump(), last.model_dump()]
print(json.dumps(found))
