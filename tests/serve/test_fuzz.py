"""What no client should send: every request is answered, none with a 5xx, and the server outlives them all."""

import contextlib
import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "1 + 2 ="}]
SHORT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES, "max_tokens": 2},
    TEXT: {"prompt": "1 2", "max_tokens": 2},
    RESPONSES: {"input": "1 2", "max_output_tokens": 16},
    "/tokenize": {"prompt": "1 2"},
    "/detokenize": {"tokens": [1, 2]},
}
HALF = "\ud800"  # half a character


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Any], tiny_model: Path) -> Iterator[Any]:
    """A server of 256 tokens of context, so that no answer is long; it must outlive every test without a fault."""
    server = start_server(f"tiny={tiny_model}")
    yield server
    assert server.process.poll() is None, server.said[-4000:]
    assert "Traceback" not in server.said, server.said[-4000:]


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(autouse=True)
def _answers_still(http: httpx.Client) -> Iterator[None]:
    yield
    assert http.post(TEXT, json=SHORT[TEXT]).status_code == 200


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    """Send JSON as Python writes it: NaN, halves of characters and all."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(path, content=text, headers={"Content-Type": "application/json"})


def refused(answer: Any, status: int = 400) -> dict[str, Any]:
    """The error of an answer, in OpenAI's form."""
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert len(error["message"]) < 2000
    found: dict[str, Any] = error
    return found


# ---- requests drawn from the server's own description ----


def brief(body: Any) -> Any:
    """A body that asks for a short answer, if it asks for one."""
    if not isinstance(body, dict) or not body.keys() & {"messages", "prompt", "input"}:
        return body
    name = "max_output_tokens" if "input" in body else "max_tokens"
    longest = {
        key: 2 for key in (name, "max_completion_tokens") if type(body.get(key)) is int and body[key] > 2
    }
    return {name: 2, **body, **longest, **({"n": 2} if type(body.get("n")) is int and body["n"] > 2 else {})}


def drawn_requests(http: httpx.Client, server: Any, cases: int) -> None:
    schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= set(SHORT)
    statuses: list[int] = []

    for operation in operations:
        bodies = operation.path in SHORT  # others take none, so that there is little to draw
        strategies = (
            [operation.as_strategy(mode) for mode in GenerationMode] if bodies else [operation.as_strategy()]
        )

        @given(case=st.one_of(*strategies))
        @settings(max_examples=cases // len(SHORT) if bodies else 3, suppress_health_check=list(HealthCheck))
        def ask(case: Any) -> None:
            case.body = brief(case.body)
            answer = case.call(base_url=server.url, timeout=120)
            statuses.append(answer.status_code)
            assert answer.status_code < 500, (case.as_curl_command(), answer.text[:500])
            if answer.status_code >= 400:
                error = refused(answer, answer.status_code)
                if answer.status_code == 400 and isinstance(case.body, dict):
                    assert error["param"], (case.as_curl_command(), error)

        ask()
    assert len(statuses) >= cases * 3 // 4
    assert statuses.count(200) > cases // 10
    assert statuses.count(400) > cases // 10


def test_requests_drawn_from_the_description(http: httpx.Client, server: Any) -> None:
    drawn_requests(http, server, 150)


@pytest.mark.slow
def test_thousands_of_requests_drawn_from_the_description(http: httpx.Client, server: Any) -> None:
    drawn_requests(http, server, 2000)


# ---- bodies ----


@pytest.mark.parametrize("path", SHORT)
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"7", b'"text"', b"\xff\xfe{}", b'{"prompt": "\xff\xff"}', b"\x00" * 99,
        b'{"model": "tiny"', b"{}" * 9, b"NaN", b"-Infinity", b'{"prompt": ' + b"9" * 9999 + b"}",
        b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b'"' + b"\\ud800" * 999 + b'"',
    ],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_bodies_that_are_no_request(http: httpx.Client, path: str, body: bytes) -> None:
    refused(post(http, path, body))


def test_a_body_of_a_megabyte(http: httpx.Client) -> None:
    def of(size: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "x" * size}]}

    assert refused(post(http, CHAT, of(1_000_000)), 413)["code"] == "body_too_large"
    assert refused(post(http, CHAT, of(990_000)))["code"] == "context_length_exceeded"
    pieces = (b" " * 100_000 for _ in range(20))  # in chunks, and no length said
    refused(http.post(CHAT, content=pieces, headers={"Content-Type": "application/json"}), 413)


@pytest.mark.parametrize("levels", [60, 500, 900, 5000, 90_000])
@pytest.mark.parametrize(
    "around",
    [
        '{"messages": M, "chat_template_kwargs": {"a": X}}',
        '{"messages": M, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": X}}}',
        '{"messages": M, "tools": [{"type": "function", "function": {"name": "a", "parameters": X}}]}',
        '{"messages": M, "metadata": X, "unheard_of": X}',
        '{"messages": [{"role": "user", "content": X}]}',
        '{"messages": M, "logit_bias": X}',
        '{"messages": X}',
    ],
)
def test_deeply_nested_fields(http: httpx.Client, around: str, levels: int) -> None:
    for deep in ('{"a":' * levels + "1" + "}" * levels, '{"not":' * levels + "{}" + "}" * levels):
        text = around.replace("M", json.dumps(MESSAGES)).replace("X", deep)
        answer = post(http, CHAT, text[:-1].encode() + b', "max_tokens": 2}')
        assert answer.status_code in (200, 400, 413), answer.text[:300]
        if answer.status_code != 200:
            refused(answer, answer.status_code)


NUMBERS = [
    -1, 0, -(2**63) - 1, 2**31 + 1, 2**64, 10**400, 1e308, math.nan, math.inf, -0.0, 5e-324, True, "1", {}, 0.5,
]  # fmt: skip
FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "n",
    "seed", "max_tokens", "top_logprobs", "logprobs", "stop", "stop_token_ids", "logit_bias", "stream_options",
    "response_format", "tools", "tool_choice", "model", "max_completion_tokens", "thinking_budget",
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "field"),
    [
        *((CHAT, field) for field in FIELDS),
        *((TEXT, field) for field in ("prompt", "best_of", "logprobs", "echo")),
    ],
)
def test_numbers_out_of_range_and_of_no_kind(http: httpx.Client, path: str, field: str) -> None:
    for value in NUMBERS:
        for body in ({field: value}, {field: [value]}, {field: {"a": value}}, {field: {"1": value}}):
            answer = post(http, path, {**SHORT[path], **body})
            assert answer.status_code in (200, 400, 404), (body, answer.text[:300])
            if answer.status_code != 200:
                assert (refused(answer, answer.status_code)["param"] or "").startswith(field), (
                    body,
                    answer.text,
                )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": HALF}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}),
        (CHAT, {"messages": [{"role": HALF, "content": "a"}]}),
        (CHAT, {"messages": MESSAGES, "stop": HALF}),
        (CHAT, {"messages": MESSAGES, "model": HALF}),
        (CHAT, {"messages": MESSAGES, "logit_bias": {HALF: 1}}),
        (CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"a": HALF, HALF: 1}}),
        (CHAT, {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": HALF}}]}),
        (CHAT, {"messages": MESSAGES, "tools": [
            {"type": "function", "function": {"name": "a", "parameters": {"description": HALF}}}]}),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "regex", "regex": HALF}}),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "regex", "regex": "(" * 5000}}),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "regex", "regex": "(a{999}){999}"}}),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "regex", "regex": "(a{1000}){1000}"}}),
        (CHAT, {"messages": MESSAGES, "response_format": {
            "type": "json_schema", "json_schema": {"name": "a", "schema": {"const": HALF}}}}),
        (CHAT, {"messages": MESSAGES, "response_format": {
            "type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/a"}}}}),
        (CHAT, {"messages": MESSAGES, "response_format": {
            "type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "file:///etc/passwd"}}}}),
        (TEXT, {"prompt": HALF}),
        (TEXT, {"prompt": ["a", HALF]}),
        (TEXT, {"prompt": [[1], "a"]}),
        (TEXT, {"prompt": [[]]}),
        (TEXT, {"prompt": [10**9]}),
        (TEXT, {"prompt": ["a"] * 5000}),
        (RESPONSES, {"input": HALF}),
        (RESPONSES, {"input": []}),
        (RESPONSES, {"input": [{"type": "image"}]}),
        ("/tokenize", {"prompt": HALF}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**9]}),
    ],
)  # fmt: skip
def test_texts_that_are_none(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = post(http, path, {"max_tokens": 2, "max_output_tokens": 16, **body})
    assert answer.status_code in (200, 400, 404), answer.text[:300]
    if answer.status_code != 200:
        assert refused(answer, answer.status_code)["param"]


# ---- paths and methods ----


def test_methods_and_paths_that_are_not_there(http: httpx.Client) -> None:
    for method in ("GET", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS", "BREW"):
        for path in (
            *SHORT,
            "/health",
            "/metrics",
            "/v1/nothing",
            "/v1/models/nothing",
            "/..%2f..%2fetc/passwd",
        ):
            answer = http.request(method, path)
            assert answer.status_code < 500, (method, path, answer.text)
            if answer.status_code >= 400:
                refused(answer, answer.status_code)
    assert refused(http.get("/v1/models/a%00b%ff/c"), 404)["param"] == "model"
    assert http.head("/health").status_code < 500


def test_a_websocket_is_not_taken(server: Any) -> None:
    with connected(server) as line:
        line.sendall(
            b"GET /v1/chat/completions HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert line.recv(999).startswith(b"HTTP/1.1 4")


# ---- connections ----


def connected(server: Any) -> socket.socket:
    line = socket.create_connection(("127.0.0.1", server.port), timeout=90)
    line.settimeout(90)
    return line


def said(line: socket.socket) -> bytes:
    """All that comes until the server hangs up, however it does."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := line.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        bytes(range(128, 256)) + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{",
    ],
    ids=lambda sent: repr(sent[:24]),
)  # fmt: skip
def test_what_is_not_http(server: Any, sent: bytes) -> None:
    with connected(server) as line:
        with contextlib.suppress(OSError):  # it may have hung up by now
            line.sendall(sent)
            line.shutdown(socket.SHUT_WR)
        first = said(line).partition(b"\r\n")[0]
        assert first == b"" or first.startswith(b"HTTP/1.1 4"), first


def test_half_closed_and_dropped_connections(server: Any) -> None:
    body = json.dumps({"prompt": "1 2", "max_tokens": 200, "stream": True, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for number in range(12):
        line = connected(server)
        line.sendall((head % len(body) + body)[: None if number % 2 else 120])
        if number % 3:
            line.shutdown(socket.SHUT_WR)
        if number % 2:
            line.recv(64)
        line.close()
    assert server.settles("vllm:num_requests_running", 0)


@pytest.mark.slow
def test_clients_that_dawdle_are_hung_up_on(server: Any) -> None:
    """Headers and bodies that come byte by byte; others are answered meanwhile."""

    def dawdle(first: bytes) -> tuple[float, bytes]:
        began = time.monotonic()
        with connected(server) as line:
            line.sendall(first)
            line.settimeout(1.0)
            answer = b""
            while time.monotonic() - began < 60:
                try:
                    piece = line.recv(4096)
                    answer += piece
                    if not piece:
                        break
                except TimeoutError:
                    line.sendall(b"x")
                except OSError:
                    break
            return time.monotonic() - began, answer

    slow_head = b"GET /health HTTP/1.1\r\nX-Slow: "
    slow_body = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900\r\n\r\n"
    with ThreadPoolExecutor(120) as pool:
        heads = [pool.submit(dawdle, slow_head) for _ in range(60)]
        bodies = [pool.submit(dawdle, slow_body) for _ in range(60)]
        time.sleep(3)
        began = time.monotonic()
        assert httpx.post(f"{server.url}{TEXT}", json=SHORT[TEXT], timeout=60).status_code == 200
        assert time.monotonic() - began < 30
        assert all(seconds < 50 for seconds, _ in (each.result() for each in heads))
        assert all(
            b" 408 " in answer.partition(b"\r\n")[0] for _, answer in (each.result() for each in bodies)
        )
