"""Headers of the page, whatever it is that serves it."""

import asyncio
import re

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from farthing.serve.page.guard import Guard

PAGE = '<head><script>let a = 1;</script><script src="x.js"></script></head>'


async def page(request: Request) -> Response:
    return HTMLResponse(PAGE)


async def pieces(request: Request) -> Response:
    return StreamingResponse(iter([PAGE[:30], PAGE[30:]]), media_type="text/html")


async def data(request: Request) -> Response:
    return JSONResponse({"a": "<script>"})


def get(path: str) -> httpx.Response:
    app = Guard(Starlette(routes=[Route("/", page), Route("/pieces", pieces), Route("/data", data)]))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_scripts_of_the_page_have_the_nonce_of_its_policy() -> None:
    for path in ("/", "/pieces"):
        answer = get(path)
        [nonce] = re.findall(r"'nonce-([\w-]{20,})'", answer.headers["content-security-policy"])
        assert answer.text == PAGE.replace("<script", f'<script nonce="{nonce}"')
    assert get("/").text != get("/").text
    assert (
        "unsafe-inline" not in answer.headers["content-security-policy"].split("script-src")[1].split(";")[0]
    )


def test_nothing_else_is_changed() -> None:
    answer = get("/data")
    assert answer.json() == {"a": "<script>"}
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_serves_no_files() -> None:
    assert get("/gradio_api/file=pyproject.toml").status_code == 404
    assert get("/gradio_api/upload").text == "not found"
