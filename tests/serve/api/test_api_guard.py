"""What is refused before any route sees it, and how a browser gets in."""

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from farthing.serve.api.guard import Guard
from farthing.serve.errors import ApiError
from farthing.serve.gateway import Bounds
from farthing.serve.keys import Caller, Keys, single

KEY = "sk-0123456789"
COOKIE = "farthing_key_8000"  # of this port: a host's other ports get it too


class Stub:
    """As much of a gateway as a guard asks."""

    ready, bounds = True, Bounds(body_bytes=1000)

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def caller(self, key: str | None) -> Caller:
        if (found := self.keys.caller(key)) is None:
            raise ApiError("no key", status=401)
        return found


async def answer(request: Request) -> Response:
    return JSONResponse({"path": request.url.path})


def get(path: str, keys: Keys, headers: Mapping[str, str] | None = None) -> httpx.Response:
    app = Guard(Starlette(routes=[Route("/{path:path}", answer)]), cast(Any, Stub(keys)))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.get(f"http://127.0.0.1:8000{path}", headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize("path", ["/v1/models", "//v1/models", "/%76%31/models", "/health/", "/docs"])
def test_every_path_but_health_wants_the_key(path: str) -> None:
    assert get(path, single(KEY)).status_code == 401
    for headers in ({"Authorization": f"bearer  {KEY} "}, {"x-api-key": KEY}, {"Cookie": f"{COOKIE}={KEY}"}):
        assert get(path, single(KEY), headers).status_code == 200
    assert get("/health", single(KEY)).status_code == 200


def test_a_browser_gets_in_by_its_address() -> None:
    found = get(f"/?key={KEY}", single(KEY))
    assert (found.status_code, found.headers["location"]) == (303, "/")
    cookie = found.headers["set-cookie"].lower()
    assert f"{COOKIE}={KEY}" in cookie
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert get("/?key=sk-another-one", single(KEY)).status_code == 401


def test_another_servers_cookie_counts_for_nothing() -> None:
    for cookie in (f"farthing_key_8001={KEY}", f"farthing_key={KEY}"):
        assert get("/v1/models", single(KEY), {"Cookie": cookie}).status_code == 401
    both = f"farthing_key_8001=sk-its-own; {COOKIE}={KEY}"
    assert get("/v1/models", single(KEY), {"Cookie": both}).status_code == 200


def test_an_older_cookie_does_not_keep_a_browser_out() -> None:
    found = get(f"/?key={KEY}", single(KEY), {"Cookie": f"{COOKIE}=sk-of-the-last-server"})
    assert found.status_code == 303
    assert KEY in found.headers["set-cookie"]


@pytest.mark.parametrize("path", ["//elsewhere.example/", "///elsewhere.example"])
def test_the_address_leads_to_no_other_host(path: str) -> None:
    place = get(f"{path}?key={KEY}", single(KEY)).headers["location"]
    assert place.startswith("/elsewhere.example")


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "[::1]:8000", "localhost", "LOCALHOST:80", "chat.localhost", "10.1.2.3"]
)
def test_without_keys_this_machine_is_asked_by_its_own_names(host: str) -> None:
    assert get("/v1/models", Keys(), {"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["elsewhere.example", "localhost.elsewhere.example:8000", "127.0.0.1.example", "[bad"]
)
def test_without_keys_no_page_of_another_site_is_answered(host: str) -> None:
    found = get("/v1/models", Keys(), {"Host": host})
    assert found.status_code == 403
    assert "--api-key" in found.json()["error"]["message"]
    assert get("/v1/models", single(KEY), {"Host": host, "x-api-key": KEY}).status_code == 200
