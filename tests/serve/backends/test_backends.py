"""A real server over a stand-in with vLLM's command line and paths, as a client sees it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

STAND_IN = Path(__file__).with_name("vllm_stand_in.py")


class Server:
    """A `farthing serve` in a process of its own."""

    def __init__(self, folder: Path, model: Path, *options: str) -> None:
        program = folder / "vllm"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
        program.chmod(0o755)
        self.log = folder / "stand-in.jsonl"
        environment = {
            **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "STAND_IN_LOG": str(self.log),
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "farthing",
            "serve",
            f"tiny={model}",
            "--backend",
            "vllm",
            "--port",
            "0",
        ]
        command += ["--no-page", "--api-key", "a-secret-key", *options]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def wait(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"http://\S+", line):
                headers = {"Authorization": "Bearer a-secret-key"}
                self.client = httpx.Client(base_url=found[0], headers=headers, timeout=30, trust_env=False)
                return
        raise AssertionError("the server ended")

    def noted(self, what: str) -> list:
        lines = map(json.loads, self.log.read_text().splitlines())
        return [line[what] for line in lines if what in line]

    def chat(self, said: str, **more: object) -> dict:
        answer = self.client.post("/v1/chat/completions", json=body(said, **more))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def body(said: str, **more: object) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": said}], "max_tokens": 20, **more}


def wait_until(holds, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backend")
    (folder / "policy.txt").write_text("Be kind.")
    running = Server(
        folder, tiny_model, "--ledger", str(folder / "serving.jsonl"), "--usd-per-hour", "3600",
        "--policy", str(folder / "policy.txt"), "--max-batch", "8",
    )  # fmt: skip
    running.wait()
    yield running
    running.process.kill()
    running.process.wait()


def test_the_engine_is_started_for_the_folder_and_told_its_name(server, tiny_model):
    started = server.noted("started")[0]
    assert started["model"] == str(tiny_model)
    assert (started["served_model_name"], started["host"], started["max_num_seqs"]) == (
        "tiny",
        "127.0.0.1",
        8,
    )


def test_a_whole_answer_with_its_cost(server):
    found = server.chat("hi")
    assert found["model"] == "tiny"
    assert found["choices"][0]["message"]["content"] == "you said hi"
    assert found["choices"][0]["finish_reason"] == "stop"
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 5)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2
    assert 0 < usage["cost"]["seconds"] < 30
    assert usage["cost"]["usd"] == pytest.approx(usage["cost"]["seconds"], abs=1e-4)
    asked = server.noted("asked")[-1]["body"]
    assert asked["messages"][0] == {"role": "system", "content": "Be kind."}
    assert asked["max_tokens"] == 20
    assert asked["temperature"] == 1.0


def test_a_stream_and_several_choices(server):
    answer = server.client.post(
        "/v1/chat/completions", json=body("hi", n=2, stream=True, stream_options={"include_usage": True})
    )
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == ["you said hi"] * 2
    assert chunks[-1]["usage"]["cost"]["usd"] > 0
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("said", ["think", "think apart"])
def test_thinking_is_told_apart_whoever_does_it(server, said):
    message = server.chat(said)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("one two", "three")


def test_calls_of_tools_come_whole(server):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    choice = server.chat("call", tools=tools)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert choice["message"]["tool_calls"] == [{"id": "c1", "type": "function", "function": function}]


def test_tokens_are_counted_where_the_engine_does_not(server):
    tokens = server.client.post(
        "/tokenize", json={"prompt": "you said uncounted", "add_special_tokens": False}
    )
    usage = server.chat("uncounted")["usage"]
    assert usage["completion_tokens"] == tokens.json()["count"]
    assert usage["prompt_tokens"] > 0


def test_completions_and_responses(server):
    found = server.client.post("/v1/completions", json={"prompt": ["one", "two"], "max_tokens": 4}).json()
    assert [choice["text"] for choice in found["choices"]] == ["one and on", "two and on"]
    assert found["usage"]["completion_tokens"] == 8
    found = server.client.post("/v1/responses", json={"model": "tiny", "input": "hi"}).json()
    assert found["output"][0]["content"][0]["text"] == "you said hi"


def test_errors_are_in_the_form_of_openai(server):
    answer = server.client.post("/v1/chat/completions", json=body("refuse"))
    assert answer.status_code == 400
    error = {"message": "no such thing", "type": "invalid_request_error", "param": "tools", "code": None}
    assert answer.json() == {"error": error}
    answer = server.client.post("/v1/chat/completions", json=body("hi", thinking_budget=3))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "thinking_budget")
    answer = server.client.post(
        "/v1/chat/completions", json=body("hi"), headers={"Authorization": "Bearer wrong"}
    )
    assert answer.status_code == 401
    answer = server.client.post("/v1/chat/completions", json=body("hi", max_tokens=100_000))
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_client_that_leaves_ends_the_answer_there(server):
    with server.client.stream("POST", "/v1/chat/completions", json=body("forever", stream=True)) as answer:
        lines = answer.iter_lines()
        for _ in range(10):
            next(lines)
    wait_until(lambda: "forever" in server.noted("left"))


def test_an_engine_that_dies_is_started_again(server):
    died = server.noted("started")[-1]["pid"]
    answer = server.client.post("/v1/chat/completions", json=body("die"))
    assert answer.status_code in (502, 503)
    assert "engine of tiny" in answer.json()["error"]["message"]
    wait_until(lambda: server.noted("started")[-1]["pid"] != died)
    wait_until(lambda: server.client.get("/health").status_code == 200)
    assert server.chat("hi")["choices"][0]["message"]["content"] == "you said hi"


def test_metrics_count_what_was_relayed(server):
    text = server.client.get("/metrics").text
    tokens = re.search(r'vllm:generation_tokens_total{model_name="tiny"} (\S+)', text)
    assert tokens is not None
    assert float(tokens[1]) > 0


def test_it_ends_with_us_and_the_books_are_kept(server):
    pid = server.noted("started")[-1]["pid"]
    server.stop()
    assert not alive(pid)
    lines = [json.loads(line) for line in (server.log.parent / "serving.jsonl").read_text().splitlines()]
    work = next(line for line in lines if line["activity"] == "generate")
    assert work["tokens_out"] > 0
    assert work["flops"] > 0
    assert 0 < work["usd"] == pytest.approx(work["seconds"], abs=1e-4)


def test_it_ends_even_if_we_are_killed(tiny_model, tmp_path):
    running = Server(tmp_path, tiny_model)
    running.wait()
    running.process.kill()
    running.process.wait()
    wait_until(lambda: not alive(running.noted("started")[0]["pid"]))


def test_an_engine_that_does_not_start_is_told_of_in_a_line(tiny_model, tmp_path):
    running = Server(tmp_path, tiny_model, "--backend-args", "--fails")
    _, said = running.process.communicate(timeout=60)
    assert running.process.returncode == 2
    assert (
        "the engine of tiny ended before it was ready (exit code 1): ValueError: this model is not for me"
        in said
    )
    assert "Traceback" not in said
