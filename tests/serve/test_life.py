"""A server's end: told to end it finishes what it began; killed, its clients find the next one by their own retries."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

ASKED: Any = [{"role": "user", "content": "Count to ten."}]


def test_no_running_answer_is_cut_by_sigterm(start_server: Callable[..., Any], roomy_model: Path) -> None:
    server = start_server(f"tiny={roomy_model}")
    endless: Any = {
        "model": "tiny", "messages": ASKED, "max_tokens": 1500, "extra_body": {"ignore_eos": True}
    }  # fmt: skip
    client = server.openai()
    with ThreadPoolExecutor(3) as pool:
        streams = [client.chat.completions.create(**endless, stream=True) for _ in range(2)]
        whole = pool.submit(client.chat.completions.create, **endless)
        firsts = [next(stream) for stream in streams]
        assert server.settles("vllm:num_requests_running", 3)
        server.process.send_signal(signal.SIGTERM)
        reasons = [
            [chunk.choices[0].finish_reason for chunk in [first, *stream]][-1]
            for first, stream in zip(firsts, streams, strict=True)
        ]
        assert reasons == ["length", "length"]
        answer = whole.result()
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 1500
    assert server.process.wait(timeout=60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_an_open_page_keeps_no_server_from_its_end(
    start_server: Callable[..., Any], tiny_model: Path
) -> None:
    pytest.importorskip("gradio")
    server = start_server(f"tiny={tiny_model}", "--page")
    with httpx.stream("GET", f"{server.url}/gradio_api/heartbeat/a-browser", timeout=60) as alive:
        lines = alive.iter_lines()
        assert next(lines) == "data: ALIVE"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0


def test_clients_outlive_a_server_that_is_killed(start_server: Callable[..., Any], roomy_model: Path) -> None:
    server = start_server(f"tiny={roomy_model}")
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=40)
    begun, answers, failures = threading.Event(), [], []
    over = time.monotonic() + 600

    def ask(number: int) -> None:
        """Ask until the second server has answered three times."""
        again = 0
        while again < 3 and time.monotonic() < over:
            try:
                made = client.chat.completions.create(
                    model="tiny", messages=ASKED, max_tokens=32, seed=number, extra_body={"ignore_eos": True}
                )
            except Exception as error:
                failures.append(error)
                return
            answers.append(made.choices[0].message.content)
            again += revived.is_set()
            if len(answers) > 8:
                begun.set()

    revived = threading.Event()
    askers = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for asker in askers:
        asker.start()
    assert begun.wait(120)
    server.kill()
    second = start_server(f"tiny={roomy_model}", port=server.port)
    revived.set()
    for asker in askers:
        asker.join()
    assert not failures
    assert len(answers) >= 8 + 8 * 3
    assert second.settles("vllm:num_requests_running", 0)
