"""The chat page of a server: Gradio's parts, our own list of conversations, and no request to another machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from farthing.serve.page.talk import Gateway

_FILES = Path(__file__).parent / "static"


def mount(app: FastAPI, gateway: Gateway) -> Callable[[], None]:
    """Serve the page at `/` of `app`. Called last: paths that no earlier route of `app` has are the page's.

    Returns:
        What closes the connections that open pages hold as long as they are shown.
    """
    import gradio as gr
    from fastapi.staticfiles import StaticFiles
    from starlette.routing import Mount

    from farthing.serve.page.guard import Guard
    from farthing.serve.page.layout import build

    app.mount("/page", StaticFiles(directory=_FILES))
    gr.mount_gradio_app(
        app,
        build(gateway),
        path="/",
        css_paths=_FILES / "page.css",
        theme=_theme(),
        favicon_path=str(_FILES / "favicon.png"),
        footer_links=[],
        run_history=False,  # else Gradio keeps its own list of calls in the browser
        ssr_mode=False,  # no Node
        enable_monitoring=False,
        mcp_server=False,
        show_error=False,
    )
    page = app.routes[-1]
    assert isinstance(page, Mount)
    end: Callable[[], None] = page.app.stop_event.set  # type: ignore[attr-defined]
    page.app = Guard(page.app)
    return end


def _theme() -> gr.themes.Base:
    from gradio.themes import Soft

    return Soft(
        primary_hue="amber",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
