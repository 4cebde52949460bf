"""A stand-in for the gateway: answers by a script that the question names, piece by piece."""

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from farthing.serve.errors import ApiError
from farthing.serve.keys import single

CODE = (
    "Here it is:\n\n```python\ndef reverse(items):\n    return items[::-1]\n```\n\n"
    "and $$\\sum_{i=1}^n i = \\frac{n(n+1)}{2}$$ of $5 and $10 for $x^2$."
)
HOSTILE = (
    '<img src="https://example.com/pixel.png" onerror="window.hacked = 1"> '
    "![leak](https://example.com/leak.png) <script>window.hacked = 2</script> "
    '<a href="javascript:window.hacked=3">press</a> <b onmouseover="window.hacked=4">bold</b>'
)


class FakeGateway:
    """`pause` seconds lie between two pieces. What it was asked, by which key, and how it ended, is kept."""

    def __init__(self, models: list[str] | None = None, pause: float = 0.005) -> None:
        self.models = models or ["trained", "base"]
        self.pause = pause
        self.asked: list[dict[str, Any]] = []
        self.asked_by: list[str | None] = []
        self.keys = single("sk-secret")
        self.running = 0

    async def chat(self, body: dict[str, Any], key: str | None) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(body)
        self.asked_by.append(key)
        said = body["messages"][-1]["content"]
        if "too long" in said:
            raise ApiError("the conversation is longer than the 2,048 tokens that this model reads.")
        if "broken" in said:
            raise RuntimeError("a fault of the server's")
        thinking, answer = self.script(body["model"], said)
        said_so_far = 0
        self.running += 1
        try:
            for name, text in (("reasoning_content", thinking), ("content", answer)):
                for piece in re.findall(r"\s*\S+", text):
                    await asyncio.sleep(self.pause)
                    said_so_far += 1
                    yield chunk({name: piece}) | {"usage": {"completion_tokens": said_so_far}}
            yield chunk({}, finish_reason="stop")
            yield {"choices": [], "usage": usage(said, thinking, answer)}
        finally:
            self.running -= 1

    @staticmethod
    def script(model: str, said: str) -> tuple[str, str]:
        if "think" in said:
            return "First the tens, then the ones. " * 4, "It is **408**."
        if "long" in said:
            return "", " ".join(f"word{n}" for n in range(2000))
        if "code" in said:
            return "", CODE
        if "hostile" in said:
            return "", HOSTILE
        return "", f"I am {model}, and you said: {said}"


def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": None}


def usage(said: str, thinking: str, answer: str) -> dict[str, Any]:
    prompt, reasoning, tokens = len(said.split()), len(thinking.split()), len(answer.split())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": reasoning + tokens,
        "total_tokens": prompt + reasoning + tokens,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "prompt_tokens_details": {"cached_tokens": 0},
        "cost": {"usd": 1.4e-5, "joules": 3.2, "seconds": 0.5},
    }


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture(scope="session")
def gateways() -> type[FakeGateway]:
    return FakeGateway
