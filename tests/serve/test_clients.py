"""OpenAI's own client, and LangChain's, against a real server: what they send is understood, and they understand it."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

ASKED = "State the final answer to the following arithmetic problem: 6 - 4 ="
MESSAGES: Any = [{"role": "user", "content": ASKED}]


class Verdict(BaseModel):
    """What a structured answer must be; all of it is bounded, as a model of 100k parameters stops nowhere."""

    answer: int = Field(ge=0, le=99)
    sign: Literal["plus", "minus"]
    sure: bool


ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two digits.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 9},
                "b": {"type": "integer", "minimum": 0, "maximum": 9},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
NEGATE: Any = {
    "type": "function",
    "function": {
        "name": "negate",
        "parameters": {
            "type": "object",
            "properties": {"of": {"enum": [1, 2, 3]}},
            "required": ["of"],
            "additionalProperties": False,
        },
    },
}


# ---- chat ----


def test_an_answer_and_its_usage(client: OpenAI) -> None:
    made = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
    assert made.choices[0].finish_reason == "stop"
    assert (made.choices[0].message.content or "").isdigit()
    assert made.usage is not None
    assert made.usage.prompt_tokens == 18
    assert made.usage.total_tokens == 18 + made.usage.completion_tokens
    cost = made.usage.cost  # type: ignore[attr-defined]
    assert cost["seconds"] > 0
    assert cost["usd"] > 0


def test_a_stream_is_the_same_answer_in_pieces(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "seed": 4, "max_tokens": 24, "n": 3}
    whole = client.chat.completions.create(**asked)
    texts, reasons = ["", "", ""], [""] * 3
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) > 1
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_streaming_helper_reads_events(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, max_tokens=8, seed=1) as stream:
        kinds = [event.type for event in stream]
        whole = stream.get_final_completion()
    assert "content.delta" in kinds
    assert kinds[-1] == "content.done"
    assert whole.choices[0].message.content


def test_a_seed_decides_an_answer(client: OpenAI) -> None:
    def answer(seed: int) -> str | None:
        made = client.chat.completions.create(
            model="tiny", messages=MESSAGES, seed=seed, max_tokens=24, temperature=1.5
        )
        return made.choices[0].message.content

    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(answer, range(8)))
    assert first == [answer(seed) for seed in range(8)]
    assert len(set(first)) > 1


def test_stops_and_lengths(client: OpenAI) -> None:
    asked: Any = {
        "model": "tiny", "prompt": ASKED, "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}
    }  # fmt: skip
    whole = client.completions.create(**asked)
    free = whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    stop = free[len(free) // 2 :][:2]
    cut = client.completions.create(**asked, stop=[stop])
    assert cut.choices[0].text == free.partition(stop)[0]
    assert cut.choices[0].finish_reason == "stop"


def test_log_probabilities(client: OpenAI) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3
    )
    assert made.choices[0].logprobs is not None
    entries = made.choices[0].logprobs.content
    assert entries
    assert "".join(entry.token for entry in entries) == made.choices[0].message.content
    for entry in entries:
        best = entry.top_logprobs
        assert len(best) == 3
        assert (best[0].token, best[0].logprob) == (entry.token, entry.logprob)
        assert best[0].logprob >= best[1].logprob >= best[2].logprob
        assert bytes(entry.bytes or ()).decode() == entry.token
    streamed = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    again = [
        entry.logprob
        for chunk in streamed
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content or ()
    ]
    assert again == pytest.approx([entry.logprob for entry in entries], abs=1e-4)


def test_biases_and_penalties_bend_an_answer(client: OpenAI, server: Any) -> None:
    import httpx

    (seven,) = httpx.post(f"{server.url}/tokenize", json={"prompt": "7"}).json()["tokens"]
    asked: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 6}
    made = client.chat.completions.create(**asked, logit_bias={str(seven): 100})
    assert made.choices[0].message.content == "777777"
    bent = client.chat.completions.create(**asked, logit_bias={str(seven): 3}, frequency_penalty=2)
    assert (bent.choices[0].message.content or "").count("7") < 6


# ---- structured output and tools ----


def test_a_pydantic_model_is_parsed(client: OpenAI) -> None:
    made = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Verdict, temperature=1.5, seed=2, n=3
    )
    for choice in made.choices:
        assert isinstance(choice.message.parsed, Verdict)
        assert choice.finish_reason == "stop"


def test_a_regular_expression_is_followed(client: OpenAI) -> None:
    body = {"response_format": {"type": "regex", "regex": "[a-f]{3}-(yes|no)"}}
    made = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=body, temperature=2)
    said = made.choices[0].message.content or ""
    assert set(said[:3]) <= set("abcdef")
    assert said[3:] in ("-yes", "-no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "negate"}}])
def test_a_tool_must_be_called(client: OpenAI, choice: Any) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[ADD, NEGATE], tool_choice=choice, temperature=1.5, seed=3
    )
    message = made.choices[0].message
    assert made.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    (call,) = message.tool_calls or ()
    assert call.type == "function"
    if choice != "required":
        assert call.function.name == "negate"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == ({"of"} if call.function.name == "negate" else {"a", "b"})
    streamed = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        tools=[ADD, NEGATE],
        tool_choice=choice,
        temperature=1.5,
        seed=3,
        stream=True,
    )
    deltas = [d for chunk in streamed for c in chunk.choices for d in c.delta.tool_calls or ()]
    assert "".join((d.function.arguments or "") for d in deltas if d.function) == call.function.arguments
    assert deltas[0].function is not None
    assert deltas[0].function.name == call.function.name


def test_tools_that_may_be_called_leave_the_answer_free(client: OpenAI) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[ADD], tool_choice="auto", max_tokens=8, temperature=0
    )
    assert made.choices[0].message.content
    assert made.choices[0].message.tool_calls is None


def test_a_conversation_with_calls_and_their_results_is_taken_back(client: OpenAI) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[ADD], tool_choice="required", seed=1
    )
    message = made.choices[0].message
    (call,) = message.tool_calls or ()
    told: Any = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "7"}]
    after = client.chat.completions.create(model="tiny", messages=told, tools=[ADD], max_tokens=4)
    assert after.choices[0].message.role == "assistant"


# ---- responses ----


def test_responses(client: OpenAI) -> None:
    made = client.responses.create(model="tiny", input=ASKED, temperature=0, instructions="Be brief.")
    assert made.status == "completed"
    assert made.output_text
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    text, last = "", None
    with client.responses.stream(
        model="tiny", input=ASKED, temperature=0, instructions="Be brief."
    ) as stream:
        for event in stream:
            text += event.delta if event.type == "response.output_text.delta" else ""
            last = event.type
        whole = stream.get_final_response()
    assert last == "response.completed"
    assert text == whole.output_text == made.output_text


def test_responses_are_parsed_and_call_tools(client: OpenAI) -> None:
    parsed = client.responses.parse(model="tiny", input=ASKED, text_format=Verdict)
    assert isinstance(parsed.output_parsed, Verdict)
    flat: Any = {"type": "function", **ADD["function"], "strict": True}
    called = client.responses.create(model="tiny", input=ASKED, tools=[flat], tool_choice="required")
    (call,) = called.output
    assert call.type == "function_call"
    assert call.name == "add"


# ---- completions, models ----


def test_completions_of_texts_and_tokens(client: OpenAI, server: Any) -> None:
    import httpx

    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": ASKED}).json()["tokens"]
    asked: Any = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    text = client.completions.create(**asked, prompt=ASKED).choices[0].text
    several = client.completions.create(**asked, prompt=[ids, ids[:5]])
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == text
    streamed = client.completions.create(**asked, prompt=ASKED, stream=True)
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == text


def test_an_echo_scores_the_prompt(client: OpenAI) -> None:
    made = client.completions.create(
        model="tiny", prompt=ASKED, echo=True, logprobs=2, max_tokens=1, temperature=0
    )
    (choice,) = made.choices
    scores = choice.logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert "".join(scores.tokens) == choice.text
    assert choice.text.startswith(ASKED)
    assert scores.token_logprobs[0] is None
    assert all(score <= 0 for score in scores.token_logprobs[1:])
    assert made.usage is not None
    assert len(scores.tokens) == made.usage.total_tokens
    alone = client.completions.create(model="tiny", prompt=ASKED, echo=True, logprobs=2, max_tokens=0)
    again = alone.choices[0].logprobs
    assert alone.choices[0].text == ASKED
    assert again is not None
    assert again.token_logprobs is not None
    assert again.token_logprobs[1:] == pytest.approx(scores.token_logprobs[1:-1], abs=1e-4)


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "farthing"


# ---- several at once ----


def test_the_asynchronous_client_asks_many_at_once(server: Any) -> None:
    async def answers() -> list[str]:
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def one(number: int) -> str:
            stream = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, seed=number % 5, max_tokens=16, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return await asyncio.gather(*(one(number) for number in range(40)))

    found = asyncio.run(answers())
    assert found[:5] * 8 == found


def test_an_answer_that_nobody_waits_for_is_given_up(server: Any, client: OpenAI) -> None:
    endless: Any = {
        "model": "tiny", "prompt": ASKED, "max_tokens": 3000, "extra_body": {"ignore_eos": True}
    }  # fmt: skip
    stream = client.completions.create(**endless, stream=True)
    next(stream)
    assert server.settles("vllm:num_requests_running", 1)
    stream.close()
    assert server.settles("vllm:num_requests_running", 0)
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(**endless, timeout=0.1)  # a fast machine needs half a second
    assert server.settles("vllm:num_requests_running", 0)
    assert server.settles("vllm:kv_cache_usage_perc", 0)


# ---- errors ----


@pytest.mark.parametrize(
    ("changed", "kind", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 6000}]}, openai.BadRequestError, "messages"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
            openai.BadRequestError,
            "response_format.json_schema",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_openais_exceptions_and_name_the_field(
    client: OpenAI, changed: dict[str, Any], kind: type[openai.APIStatusError], param: str
) -> None:
    body: Any = {"model": "tiny", "messages": MESSAGES, **changed}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**body)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_keys_and_their_limits(start_server: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "- {name: few, key: sk-few-few, requests_per_minute: 2}\n"
        "- {name: short, key: sk-short-short, tokens_per_minute: 10}\n"
        "- {name: free, key: sk-free-free}\n"
    )
    server = start_server(f"tiny={tiny_model}", "--keys", str(keys), "--max-waiting", "3", key="sk-free-free")

    def ask(key: str, **options: Any) -> Any:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **options}
        return server.openai(api_key=key).chat.completions.create(**asked)

    with pytest.raises(openai.AuthenticationError):
        ask("sk-wrong-wrong")
    for _ in range(2):
        ask("sk-few-few")
    with pytest.raises(openai.RateLimitError) as caught:
        ask("sk-few-few")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    ask("sk-short-short")
    with pytest.raises(openai.RateLimitError, match="tokens"):
        ask("sk-short-short")
    with pytest.raises(openai.InternalServerError) as full:  # openai's name for every 5xx
        server.openai().completions.create(model="tiny", prompt=["1 2"] * 4, max_tokens=2)
    assert full.value.status_code == 503
    assert full.value.response.headers["retry-after"]
    ask("sk-free-free")
    server.kill()


# ---- LangChain ----


@pytest.fixture
def chain(server: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model="tiny",
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        max_tokens=512,
        temperature=0,
    )


def test_langchain_invokes_and_streams(chain: Any) -> None:
    whole = chain.invoke(ASKED)
    assert whole.content
    assert whole.usage_metadata["input_tokens"] == 18
    assert "".join(piece.content for piece in chain.stream(ASKED)) == whole.content
    assert [answer.content for answer in chain.batch([ASKED] * 3)] == [whole.content] * 3


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_output(chain: Any, method: str) -> None:
    assert isinstance(chain.with_structured_output(Verdict, method=method).invoke(ASKED), Verdict)


def test_langchain_binds_tools(chain: Any) -> None:
    from langchain_core.tools import tool

    @tool
    def double(digit: Literal[1, 2, 3]) -> int:
        """Twice a digit."""
        return 2 * digit

    (call,) = chain.bind_tools([double], tool_choice="required").invoke(ASKED).tool_calls
    assert call["name"] == "double"
    assert call["args"]["digit"] in (1, 2, 3)
