"""Servers in processes of their own, as people start them."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

START_SECONDS = 300.0  # a busy machine compiles the kernels for a while


class Server:
    """`farthing serve` on a free port, ready to answer.

    Args:
        given: sources and options of the command.
        log: where its stderr goes.
    """

    def __init__(self, given: list[str], log: Path, port: int = 0, key: str | None = None) -> None:
        self.log, self.key = log, key
        if "--page" not in given:
            given = [*given, "--no-page"]
        command = [sys.executable, "-m", "farthing", "serve", *given, "--port", str(port)]
        environment = {**os.environ, "COLUMNS": "500", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment)
        try:
            self.url = self._address()
        except BaseException:
            self.kill()
            raise

    def _address(self) -> str:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            if found := re.search(r"at (http://\S+)", self.said):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{found[1]}/health").status_code == 200:
                        return found[1]
            time.sleep(0.05)
        raise AssertionError(f"no server: {self.said[-2000:]}")

    @property
    def said(self) -> str:
        """Its stderr so far."""
        return self.log.read_text("utf-8", "replace")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def openai(self, **options: Any) -> OpenAI:
        """OpenAI's own client of it."""
        return OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": self.key or "none", "max_retries": 0, **options}
        )

    def metric(self, name: str) -> float:
        """A number of /metrics, summed over its labels."""
        headers = {"x-api-key": self.key} if self.key else {}
        text = httpx.get(f"{self.url}/metrics", headers=headers).text
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        return sum(map(float, found))

    def settles(self, name: str, value: float, seconds: float = 10.0) -> bool:
        """Whether a metric takes a value within so many seconds."""
        until = time.monotonic() + seconds
        while self.metric(name) != value:
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """A function that starts a server; `key` is demanded of its clients, and it ends with the tests at the latest."""
    started: list[Server] = []

    def start(*given: str, port: int = 0, key: str | None = None) -> Server:
        log = tmp_path_factory.mktemp("server") / "log"
        demanded = ("--api-key", key) if key and "--keys" not in given else ()
        started.append(Server([*given, *demanded], log, port, key))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def roomy_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with a context of 4,096 tokens: few of its tokens are words, so that tools take hundreds."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server], roomy_model: Path) -> Iterator[Server]:
    """A server of `roomy_model`, by the name `tiny`; it must outlive every test without a fault."""
    server = start_server(f"tiny={roomy_model}")
    yield server
    assert server.process.poll() is None, server.said[-4000:]
    assert "Traceback" not in server.said, server.said[-4000:]


@pytest.fixture
def client(server: Server) -> OpenAI:
    return server.openai()
