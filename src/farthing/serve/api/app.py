"""The server's routes: OpenAI's operations, what harnesses and monitors ask for, and the description of it all.

Every route exists with and without /v1, as clients differ. Errors are in OpenAI's form, whatever their cause.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from farthing.base.errors import UserError
from farthing.serve.api import chat, completions, responses
from farthing.serve.api.guard import Guard
from farthing.serve.api.stream import EventStream, Gone, to_json, unless_gone
from farthing.serve.errors import ApiError, from_validation
from farthing.serve.gateway import Gateway
from farthing.serve.keys import Caller
from farthing.serve.metrics import CONTENT_TYPE
from farthing.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

CLIENT_CLOSED = 499  # nginx's status for an answer that nobody waits for


_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class Json(JSONResponse):
    """JSON as `stream.to_json` writes it."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


def create_app(gateway: Gateway, load: Callable[[], Awaitable[None]]) -> FastAPI:
    """The application; the page is mounted by `serve.page`.

    Args:
        load: loads the models and starts the gateway, while `/health` says so.
    """

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(load())
        try:
            yield
        finally:
            loading.cancel()
            await gateway.stop()

    app = FastAPIOffline(
        title="Farthing",
        version=version("farthing"),
        description="Language models over OpenAI's API, with what each answer cost.",
        lifespan=life,
        redoc_url=None,
        default_response_class=Json,
    )
    routes = _openai(gateway)
    app.include_router(routes, prefix="/v1")
    app.include_router(routes, include_in_schema=False)
    app.include_router(_tokens(gateway))
    app.include_router(_state(gateway))

    @app.api_route("/v1/{path:path}", methods=_METHODS, include_in_schema=False)
    async def nothing(path: str, request: Request) -> Response:  # before a page at / has its say
        raise HTTPException(404)

    app.add_middleware(Guard, gateway=gateway)
    _errors(app)
    return app


def _openai(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.post("/chat/completions", summary="Answer a conversation.")
    async def create_chat(body: ChatRequest, request: Request) -> Response:
        conversation = await unless_gone(request, gateway.conversation(body, _caller(request)))
        if not body.stream:
            return Json(await unless_gone(request, chat.completion(conversation)))
        return EventStream(_unnamed(chat.chunks(conversation, body.says_usage, body.says_each_usage)))

    @router.post("/completions", summary="Continue a text.")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        asked = await unless_gone(request, gateway.completions(body, _caller(request)))
        if not body.stream:
            return Json(await unless_gone(request, completions.completion(asked)))
        return EventStream(_unnamed(completions.chunks(asked, body.says_usage)))

    @router.post("/responses", summary="Answer a conversation, in the newer form.")
    async def create_response(body: responses.ResponsesRequest, request: Request) -> Response:
        translated = body.chat(gateway.lenient)
        conversation = await unless_gone(request, gateway.conversation(translated, _caller(request)))
        if not body.stream:
            return Json(await unless_gone(request, responses.whole(conversation, body)))
        return EventStream(responses.events(conversation, body), done="")

    @router.get("/models", summary="The models that are served.")
    async def list_models() -> Response:
        return Json({"object": "list", "data": [served.card for served in gateway.served.values()]})

    @router.get("/models/{model:path}", summary="One model.")
    async def retrieve_model(model: str) -> Response:
        return Json(gateway.model(model).card)

    @router.delete("/models/{model:path}", summary="Deletes nothing: models are served from folders.")
    async def delete_model(model: str) -> Response:
        return Json({"id": gateway.model(model).name, "object": "model", "deleted": False})

    return router


def _tokens(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", summary="A text's tokens.")
    def tokenize(body: TokenizeRequest) -> Response:
        served = gateway.model(body.model)
        text = body.prompt if body.prompt is not None else body.content
        if body.messages is not None:
            ids = served.chat_prompt(ChatRequest.model_construct(messages=body.messages)).ids
        elif body.add_special_tokens:
            ids = served.tokenizer.encode(text or "")
        else:
            ids = served.tokenizer.raw_encode(text or "")
        made: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": served.context}
        if body.return_token_strs:
            made["token_strs"] = [served.tokenizer.token_text(token) for token in ids]
        return Json(made)

    @router.post("/detokenize", summary="The text of tokens.")
    def detokenize(body: DetokenizeRequest) -> Response:
        served = gateway.model(body.model)
        served.check_tokens(body.tokens, "tokens")
        text = served.tokenizer.text_of(body.tokens)
        return Json({"prompt": text, "content": text})

    @router.get("/tokenizer_info", summary="A model's tokenizer: its marks and chat template.")
    def tokenizer_info(model: str | None = None) -> Response:
        served = gateway.model(model)
        return Json({**served.tokenizer.marks, "chat_template": served.template or None})

    return router


def _state(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.get("/health", summary="Whether requests are answered.")
    async def health() -> Response:
        return Json({"status": "ok"}) if gateway.ready else Json({"status": "loading"}, 503)

    @router.get("/metrics", summary="Prometheus metrics.")
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)

    return router


def _caller(request: Request) -> Caller:
    """Who asks; `Guard` has found out."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


async def _unnamed(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[tuple[str, Any], None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            yield "", chunk


def _errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    def answer(error: ApiError) -> Response:
        return Json(error.body, error.status, headers=error.headers)

    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {}

    async def ours(request: Request, error: ApiError) -> Response:
        return answer(error)

    async def users(request: Request, error: UserError) -> Response:
        return answer(ApiError(str(error)))

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(from_validation(error.errors()))

    async def http(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # of reading the body, which FastAPI does
            return answer(error.__cause__)
        said = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not allowed here"}
        message = said.get(error.status_code, str(error.detail))
        return answer(ApiError(message, status=error.status_code, code=None))

    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    async def fault(request: Request, error: Exception) -> Response:
        said = "the server made a mistake; its log says which"
        return answer(ApiError(said, status=500, kind="server_error"))

    handlers.update({ApiError: ours, UserError: users, RequestValidationError: invalid})
    handlers.update({HTTPException: http, Gone: gone, Exception: fault})
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
