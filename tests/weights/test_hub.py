"""Fetching a repository: with the library itself from a small hub on this machine, and every reason it may fail for."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save

from farthing.base.errors import UserError
from farthing.weights import hub
from farthing.weights.chat_template import read_templates
from farthing.weights.sources import resolve

WEIGHTS = save({"a": torch.zeros(25_000)})
SHA = "0123456789abcdef0123456789abcdef01234567"


class Server(BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/a/b/revision/main"):
            self.answer(json.dumps({"id": "a/b", "modelId": "a/b", "sha": SHA, "siblings": []}).encode())
        elif path == f"/api/models/a/b/tree/{SHA}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{hash(name) & 0xFFFFFF:040x}"}
                for name, data in self.files.items()
            ]
            self.answer(json.dumps(tree).encode())
        elif path.startswith("/a/b/resolve/") and (name := path.split("/", 5)[5]) in self.files:
            self.answer(self.files[name], name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    do_HEAD = do_GET

    def answer(self, data: bytes, name: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hash(name) & 0xFFFFFF:040x}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of the repository a/b, on a hub that the library asks."""
    from huggingface_hub import constants

    Server.files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "onnx/model.json": b"{}"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here, template = f"http://127.0.0.1:{server.server_port}", constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, here))
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield Server.files
    server.shutdown()
    server.server_close()


def test_templates_in_a_folder_of_their_own_come_too(
    served: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    served["chat_template.jinja"] = b"plain"
    served["additional_chat_templates/tools.jinja"] = b"with tools"
    served["additional_chat_templates/evil.py"] = b"raise SystemExit"
    folder = resolve("hf:a/b").location
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "additional_chat_templates/tools.jinja", "chat_template.jinja", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert read_templates(folder, {}) == {"default": "plain", "tools": "with tools"}
    assert resolve("hf:a/b").location == folder, "from the library's cache"
    said = capfd.readouterr()
    assert said.out + said.err == "", "no bars of the library's"


def test_what_is_not_on_the_hub(served: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(
        UserError, match="no such public model is on the Hugging Face hub; check the spelling"
    ) as e:
        resolve("hf:a/other")
    assert "\n" not in str(e.value)


def test_how_far_a_download_is(served: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    meters: list[Any] = []
    monkeypatch.setattr(hub, "Transfer", lambda what, measure: meters.append(measure) or Silence())
    resolve("hf:a/b")
    [measure] = meters
    assert measure() == (len(WEIGHTS) + 2, len(WEIGHTS) + 2)


class Silence:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def failed(name: str = "HfHubHTTPError", status: int | None = None) -> Exception:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error: Exception = kind.__new__(kind)
    if status is not None:
        error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


def hidden(cause: Exception) -> Exception:
    """The library's last error, which says nothing of the first."""
    outer = failed("LocalEntryNotFoundError")
    outer.__cause__ = RuntimeError("client has failed")
    outer.__cause__.__context__ = cause
    return outer


@pytest.mark.parametrize(
    ("error", "token", "said"),
    [
        (failed("GatedRepoError", 401), False, "accept its licence at https://huggingface.co/a/b and set HF_TOKEN"),
        (failed("GatedRepoError", 403), True, "accept its licence at https://huggingface.co/a/b with the account"),
        (failed("RepositoryNotFoundError", 404), False, "check the spelling, or set HF_TOKEN if the model is private"),
        (failed("RepositoryNotFoundError", 404), True, "check the spelling, or whether your HF_TOKEN may read it"),
        (failed("RepositoryNotFoundError", 401), False, "no such public model"),
        (failed("HfHubHTTPError", 401), True, "does not accept your HF_TOKEN; renew it"),
        (failed("RevisionNotFoundError", 404), False, "no such revision; leave @REVISION out"),
        (failed("DisabledRepoError", 403), False, "is disabled"),
        (failed("OfflineModeIsEnabled"), False, "HF_HUB_OFFLINE keeps from downloading it; unset it"),
        (failed(status=429), False, "too many requests"),
        (failed(status=503), False, "answers 503; try again later"),
        (OSError(-2, "Name or service not known"), False, "cannot be reached (Name or service not known); connect"),
        (TimeoutError("timed out"), False, "cannot be reached (timed out); connect"),
        (OSError(), False, "cannot be reached (client has failed)"),
    ],
)  # fmt: skip
def test_the_reason_is_found_where_the_library_hides_it(
    error: Exception, token: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x" if token else None)

    def fails(*_: Any, **options: Any) -> str:
        raise failed("LocalEntryNotFoundError") if options["local_files_only"] else hidden(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(UserError) as caught:
        resolve("hf:a/b")
    assert said in str(caught.value)
    assert str(caught.value).startswith("hf:a/b ")
    assert "LocalEntry" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_retries_are_not_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any, **options: Any) -> str:
        if options["local_files_only"]:
            raise failed("LocalEntryNotFoundError")
        for number in range(5):
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s [Retry %d/5].", number)
        raise hidden(OSError(101, "Network is unreachable"))

    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(UserError, match="Network is unreachable"):
        resolve("hf:a/b")
    assert caplog.records == []
    assert logger.level == before
