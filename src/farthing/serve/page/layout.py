"""The page's parts and what joins them. Conversations live in the browser, where `static/page.js` keeps them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import gradio as gr
from gradio.components.chatbot import ChatbotDataMessages

from farthing.serve.api.guard import key_of
from farthing.serve.page import answers
from farthing.serve.page.talk import Column, Gateway, Settings, replies

Values = dict[Any, Any]  # by component: Gradio's form for many inputs or outputs

_STARTERS = (
    "Explain in plain words why the sky is blue.",
    "What is 17 × 24? Think step by step.",
    "Write a Python function that reverses a list, with a test.",
    "Write a short poem about a penny.",
)
_FORMULAS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
_MODULE = 'import(new URL("page/page.js", document.baseURI))'


class Parts:
    """The components, laid out as they are made."""

    def __init__(self, models: list[str]) -> None:
        with gr.Sidebar(width=300, elem_id="side"):
            self.browser = gr.HTML(
                html_template="",
                js_on_load=f'{_MODULE}.then((page) => page.start(element, () => trigger("open")))',
                elem_id="conversations",
            )
            with gr.Accordion("Settings", open=False):
                self.system = gr.Textbox(label="System prompt", lines=3)
                self.temperature = gr.Slider(0, 2, Settings.temperature, step=0.05, label="Temperature")
                self.length = gr.Slider(
                    0,
                    8192,
                    Settings.length,
                    step=16,
                    label="Longest answer",
                    info="In tokens; 0 has no limit but the context.",
                )
        with gr.Row(elem_id="columns", equal_height=True):
            with gr.Column(min_width=280):
                self.left_model, self.left = _column("left", models, models[0])
            with gr.Column(min_width=280, visible=False) as self.beside:
                self.right_model, self.right = _column("right", models, models[-1])
        self.prompt = gr.Textbox(
            label="Message",
            show_label=False,
            placeholder="Ask anything",
            max_lines=12,
            autofocus=True,
            submit_btn=True,
            elem_id="prompt",
        )
        with gr.Row(elem_id="below"):
            self.compare = gr.Checkbox(
                label="Compare two models", visible=len(models) > 1, container=False, elem_id="compare"
            )
            gr.HTML("What a model writes may be wrong.", elem_id="caveat")
        self.kept = [  # what a conversation is, in the order of static/page.js
            self.left, self.right, self.left_model, self.right_model,
            self.compare, self.system, self.temperature, self.length,
        ]  # fmt: skip

    def settings(self, values: Values) -> Settings:
        return Settings(values[self.system] or "", values[self.temperature], int(values[self.length]))

    def columns(self, values: Values) -> list[Column]:
        """The left, and the right where two models are compared."""
        both = [
            Column(values[self.left_model], values[self.left]),
            Column(values[self.right_model], values[self.right]),
        ]
        return both if values[self.compare] else both[:1]


def build(gateway: Gateway) -> gr.Blocks:
    """The page, over a gateway."""
    with gr.Blocks(title="Farthing", analytics_enabled=False, fill_height=True) as page:
        parts = Parts(gateway.models)
        _wire(parts, gateway)
    page.queue(default_concurrency_limit=None, api_open=False)  # the gateway has its own queue and limits
    return page


def _column(name: str, models: list[str], model: str) -> tuple[gr.Dropdown, gr.Chatbot]:
    dropdown = gr.Dropdown(
        models, value=model, label=f"Model of the {name} column", show_label=False, container=False,
        filterable=len(models) > 9, elem_id=f"{name}-model", elem_classes="model",
    )  # fmt: skip
    talk = gr.Chatbot(
        label=f"Conversation with the {name} model",
        show_label=False,
        elem_id=name,
        elem_classes="talk",
        height=None,
        autoscroll=False,  # static/page.js does it, and lets go of who scrolls up
        scale=1,
        editable="user",
        latex_delimiters=_FORMULAS,
        buttons=["copy"],
        layout="bubble",
        allow_tags=False,
        examples=[{"text": text} for text in _STARTERS] if name == "left" else None,
        placeholder="## What shall we talk about?" if name == "left" else "## The same prompt goes to both",
    )
    talk.preprocess = _text_alone(talk.preprocess)  # type: ignore[assignment, method-assign]
    return dropdown, talk


def _text_alone(preprocess: Callable[[Any], Any]) -> Callable[[ChatbotDataMessages | None], Any]:
    """Only text comes from a browser: of other parts Gradio would make components, and open the files they name.

    Wrapped and not overridden, as Gradio writes a stub beside each module that derives from a component.
    """

    def checked(payload: ChatbotDataMessages | None) -> Any:
        messages = payload.root if payload else []
        if any(part.type != "text" for message in messages for part in message.content):
            raise gr.Error("A conversation is text.")
        return preprocess(payload)

    return checked


def _wire(parts: Parts, gateway: Gateway) -> None:
    sides, prompt = (parts.left, parts.right), parts.prompt
    answering: dict[str, asyncio.Event] = {}  # by the browser's tab; set to stop its answers

    async def reply(values: Values, columns: list[Column], request: gr.Request) -> AsyncIterator[Values]:
        tab, key = request.session_hash or "", key_of(request.headers)
        if tab in answering:
            return
        stop = answering[tab] = asyncio.Event()
        yield {prompt: gr.Textbox(value="", submit_btn=False, stop_btn=True)}
        try:
            async with aclosing(replies(gateway, columns, parts.settings(values), key, stop)) as updates:
                async for shown in updates:
                    yield dict(zip(sides, shown, strict=False))
        finally:
            del answering[tab]
        yield {prompt: gr.Textbox(submit_btn=True, stop_btn=False)}

    async def stop(request: gr.Request) -> None:
        if request.session_hash in answering:
            answering[request.session_hash].set()

    async def ask(values: Values, text: str, request: gr.Request) -> AsyncIterator[Values]:
        if text.strip():
            columns = parts.columns(values)
            for column in columns:
                column.shown = [*column.shown, answers.question(text.strip())]
            async for update in reply(values, columns, request):
                yield update

    async def send(values: Values, request: gr.Request) -> AsyncIterator[Values]:
        async for update in ask(values, values[prompt], request):
            yield update

    async def start(values: Values, chosen: gr.SelectData, request: gr.Request) -> AsyncIterator[Values]:
        async for update in ask(values, chosen.value["text"], request):
            yield update

    def retry(side: int) -> Callable[[Values, gr.Request], AsyncIterator[Values]]:
        async def again(values: Values, request: gr.Request) -> AsyncIterator[Values]:
            columns = parts.columns(values)
            columns[side].shown = answers.up_to_question(columns[side].shown)
            async for update in reply(values, columns, request):
                yield update

        return again

    def edit(side: int) -> Callable[[Values, gr.EditData, gr.Request], AsyncIterator[Values]]:
        async def edited(values: Values, change: gr.EditData, request: gr.Request) -> AsyncIterator[Values]:
            if not change.value.strip():
                return
            columns = parts.columns(values)
            assert isinstance(change.index, int)  # pairs are of another form of messages
            turns = answers.turns(columns[side].shown[: change.index])
            for column in _alike(columns, side):
                column.shown = [*answers.before(column.shown, turns), answers.question(change.value)]
            async for update in reply(values, columns, request):
                yield update

        return edited

    def undo(side: int) -> Callable[[Values], Values]:
        def back(values: Values) -> Values:
            columns = parts.columns(values)
            *_, last = answers.up_to_question(columns[side].shown)
            for column in _alike(columns, side):
                column.shown = answers.up_to_question(column.shown)[:-1]
            return {prompt: answers.text(last)} | {
                part: column.shown for part, column in zip(sides, columns, strict=False)
            }

        return back

    seen, changed = {prompt, *parts.kept}, [*sides, prompt]
    how: dict[str, Any] = {"inputs": seen, "outputs": changed, "show_progress": "hidden"}
    replying = [prompt.submit(send, **how), parts.left.example_select(start, **how)]
    for side, talk in enumerate(sides):
        replying += [talk.retry(retry(side), **how), talk.edit(edit(side), **how)]
    undone = [talk.undo(undo(side), **how) for side, talk in enumerate(sides)]
    prompt.stop(stop, None, None)
    for event in [*replying, *undone]:
        event.then(None, parts.kept, None, js=_script("save(...values)"))
    parts.left.change(None, parts.kept, None, js=_script("changed(...values)"))
    parts.browser.open(None, None, parts.kept, js=_script(f"opened({json.dumps(gateway.models)})"))
    parts.compare.change(lambda on: gr.Column(visible=on), parts.compare, parts.beside)


def _alike(columns: list[Column], side: int) -> list[Column]:
    """The columns that have heard as many questions as one of them: those that a change of its questions is for."""
    heard = answers.turns(columns[side].shown)
    return [column for column in columns if answers.turns(column.shown) == heard]


def _script(call: str) -> str:
    """A listener that runs in the browser: a call of a function of static/page.js."""
    return f"async (...values) => (await {_MODULE}).{call}"
