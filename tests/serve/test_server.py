"""What uvicorn is held to: connections that dawdle are hung up on, and no others."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from fastapi import FastAPI

from farthing.serve import server
from farthing.serve.server import listen, server_of

PATIENCE = 0.5
GET = b"GET /soon HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A connection to a server that is less patient than ours."""
    monkeypatch.setattr(server, "HEADER_SECONDS", PATIENCE)
    app = FastAPI()

    @app.get("/soon")
    def soon() -> int:
        return 1

    @app.get("/late")
    def late() -> int:
        time.sleep(3 * PATIENCE)
        return 2

    serving, listening = server_of(app, lambda: False, lambda: None), listen("127.0.0.1", 0)
    thread = threading.Thread(target=serving.run, args=([listening],), daemon=True)
    thread.start()
    with socket.create_connection(listening.getsockname(), timeout=20) as line:
        yield line
    serving.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def answer(line: socket.socket) -> bytes:
    """Read until the body, of one figure, or to the end of the connection."""
    said = b""
    while not said.endswith((b"\r\n\r\n1", b"\r\n\r\n2")) and (piece := line.recv(4096)):
        said += piece
    return said


@pytest.mark.parametrize("before", [0, 1, 2])
def test_headers_that_never_end(line: socket.socket, before: int) -> None:
    for _ in range(before):
        line.sendall(GET)
        assert answer(line).endswith(b"1")
    line.sendall(b"GET /soon HTTP/1.1\r\nX-Slow: ")
    assert answer(line) == b""


def test_a_slow_answer_and_a_pause_between_requests_are_no_fault_of_the_client(line: socket.socket) -> None:
    for _ in range(2):
        line.sendall(GET.replace(b"soon", b"late"))
        assert answer(line).endswith(b"2")
        time.sleep(2 * PATIENCE)
