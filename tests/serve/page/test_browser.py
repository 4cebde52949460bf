"""The page in a real browser: headless Chromium, driven by Playwright. Skipped where there is no Chromium."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Dialog, Page, expect, sync_playwright

from farthing.serve.api.app import create_app
from farthing.serve.errors import ApiError
from farthing.serve.gateway import Bounds
from farthing.serve.keys import Caller
from farthing.serve.page import mount

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
expect.set_options(timeout=30_000)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of `app`, served by a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def fake(gateways: Any) -> Any:
    return gateways(pause=0.01)


@pytest.fixture(scope="module")
def address(fake: Any) -> Iterator[str]:
    app = FastAPI()
    mount(app, fake)
    with served(app) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A new visitor's page. No script of it fails, and no request leaves the machine."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    elsewhere: list[str] = []
    failed: list[str] = []
    page.on(
        "request",
        lambda request: None if request.url.startswith(local(address)) else elsewhere.append(request.url),
    )
    page.on("requestfailed", lambda request: request.failure == "csp" and elsewhere.remove(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    visit(page, address)
    yield page
    context.close()
    assert (elsewhere, failed) == ([], [])


def local(address: str) -> tuple[str, ...]:
    return (address, "data:", "blob:")


def visit(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("#prompt textarea")).to_be_visible()
    expect(page.locator("#conversations .new")).to_be_attached()


def ask(page: Page, text: str) -> None:
    page.locator("#prompt textarea").fill(text)
    page.locator("#prompt textarea").press("Enter")


def answered(page: Page, text: str, side: str = "left") -> None:
    """Wait until the last answer of a side says `text`, has its figures and is kept."""
    expect(page.locator(f"#{side} .bot-row").last).to_contain_text(text)
    idle(page)


def idle(page: Page) -> None:
    expect(page.locator("#prompt .submit-button")).to_be_visible()
    expect(page.locator("#conversations .heard")).to_have_text("The answer is complete.")


def kept(page: Page) -> list[dict[str, Any]]:
    """The conversations that the browser keeps."""
    return [
        json.loads(text)
        for text in page.evaluate("Object.values(localStorage).filter((v) => v.startsWith('{'))")
    ]


def test_a_conversation_with_code_formulas_and_figures(page: Page) -> None:
    ask(page, "show me code")
    answered(page, "tokens/s")
    answer = page.locator("#left .bot-row").last
    expect(answer.locator("pre .token.keyword").first).to_have_text("def")
    expect(answer.locator(".katex-display")).to_have_count(1)
    expect(answer.locator(".katex")).to_have_count(2)
    expect(answer).to_contain_text("of $5 and $10 for")
    expect(answer).to_contain_text("$0.000014")
    expect(page.locator("#conversations li")).to_have_text(["show me code×"])
    page.locator("#left .message-buttons-left [title='Copy message']").click()
    expect(page.locator("#conversations .status")).to_have_text("Copied.")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("Here it is:\n\n```python\ndef reverse(items):\n    return")
    assert copied.endswith("of $5 and $10 for $x^2$.")


def test_thinking_is_folded_and_says_how_long_it_took(page: Page) -> None:
    ask(page, "think")
    answered(page, "It is 408.")
    expect(page.locator("#left .thought-group").first).to_contain_text("Thought for 0.")
    expect(page.get_by_text("First the tens")).to_have_count(0)
    page.locator("#left .thought-group .title").first.click()
    expect(page.get_by_text("First the tens")).to_be_visible()


def test_stop_in_mid_answer_then_regenerate_edit_and_undo(page: Page, fake: Any) -> None:
    ask(page, "a long one")
    expect(page.locator("#left .bot-row")).to_contain_text("word9")
    page.locator("#prompt .stop-button").click()
    answered(page, "stopped")
    deadline = time.monotonic() + 10
    while fake.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert fake.running == 0
    assert "word1999" not in page.locator("#left").inner_text()

    page.locator("#left [title=Retry]").click()
    expect(page.locator("#left .bot-row")).not_to_contain_text("stopped")
    page.keyboard.press("Escape")
    answered(page, "stopped")

    page.locator("#left [title=Edit]").click()
    page.locator("#left .user-row textarea").fill("a brief one")
    page.locator("#left [title=Submit]").click()
    answered(page, "you said: a brief one")
    expect(page.locator("#left .user-row")).to_have_count(1)

    page.locator("#left [title=Undo]").click()
    expect(page.locator("#prompt textarea")).to_have_value("a brief one")
    expect(page.locator("#left .user-row")).to_have_count(0)


def test_conversations_outlive_the_page_and_are_found(page: Page, address: str) -> None:
    for said in ("the first about apples", "the second about pears"):
        page.locator("#conversations .new").click()
        ask(page, said)
        answered(page, said)
    expect(page.locator("#conversations li")).to_have_count(2)
    page.reload()
    expect(page.locator("#left .bot-row")).to_contain_text("pears")
    page.locator("#conversations .search").fill("APPLES said")
    expect(page.locator("#conversations li")).to_have_text(["the first about apples×"])
    page.locator("#conversations li .open").click()
    expect(page.locator("#left .bot-row")).to_contain_text("apples")
    ask(page, "more")
    answered(page, "more")
    assert sorted(len(one["left"]) for one in kept(page)) == [3, 6]
    page.locator("#conversations .search").fill("no such thing")
    expect(page.locator("#conversations .status")).to_contain_text("Nothing says")


@pytest.mark.parametrize(
    "leave",
    ["document.querySelector('#conversations .new').click()", "setTimeout(() => location.reload(), 5)"],
)
def test_an_answer_is_kept_by_who_leaves_as_it_ends(page: Page, leave: str) -> None:
    page.evaluate(
        """leave => new MutationObserver((_, observer) => {
            if (!document.querySelector("#left .bot-row")?.innerText.includes("tokens/s")) return;
            observer.disconnect();
            sessionStorage.left = "yes";
            eval(leave);
        }).observe(document.querySelector("gradio-app"), {childList: true, subtree: true, characterData: true})""",
        leave,
    )
    ask(page, "hello")
    page.wait_for_function("sessionStorage.left")
    expect(page.locator("#prompt .submit-button")).to_be_visible()
    visit(page, page.url)
    page.locator("#conversations li .open").click()
    expect(page.locator("#left .bot-row").last).to_contain_text("you said: hello")


def test_conversations_are_exported_deleted_and_imported(page: Page, tmp_path: Path) -> None:
    ask(page, "hello")
    answered(page, "you said: hello")
    with page.expect_download() as waiting:
        page.locator("#conversations .markdown").click()
    text = Path(waiting.value.path()).read_text()
    assert text.startswith(
        "# hello\n\n**You:**\n\nhello\n\n**trained:**\n\nI am trained, and you said: hello\n\n*7 tok"
    )
    with page.expect_download() as waiting:
        page.locator("#conversations .export").click()
    waiting.value.save_as(tmp_path / "all.json")
    page.once("dialog", Dialog.accept)
    page.locator("#conversations li").hover()
    page.locator("#conversations .delete").click()
    expect(page.locator("#conversations li")).to_have_count(0)
    expect(page.locator("#left .user-row")).to_have_count(0)
    page.locator("#conversations .file").set_input_files(tmp_path / "all.json")
    expect(page.locator("#conversations .status")).to_contain_text("1 of 1 added")
    page.locator("#conversations .file").set_input_files(tmp_path / "all.json")
    expect(page.locator("#conversations .status")).to_contain_text("0 of 1 added")
    expect(page.locator("#conversations li")).to_have_text(["hello×"])
    wrong = {"left": [{"role": "user", "content": [{"type": "component"}]}], "right": []}
    (tmp_path / "other.json").write_text(json.dumps({"conversations": [wrong]}))
    page.locator("#conversations .file").set_input_files(tmp_path / "other.json")
    expect(page.locator("#conversations .status")).to_contain_text("holds no conversations")


def test_two_columns_one_prompt(page: Page) -> None:
    page.get_by_label("Compare two models").check()
    expect(page.locator("#right")).to_be_visible()
    ask(page, "hello")
    answered(page, "I am trained, and you said: hello")
    answered(page, "I am base, and you said: hello", "right")
    page.locator("#left [title=Edit]").click()
    page.locator("#left .user-row textarea").fill("goodbye")
    page.locator("#left [title=Submit]").click()
    answered(page, "you said: goodbye")
    answered(page, "you said: goodbye", "right")
    page.reload()
    expect(page.locator("#right .bot-row")).to_contain_text("I am base, and you said: goodbye")
    page.locator("#conversations .new").click()
    expect(page.locator("#right .user-row")).to_have_count(0)


def test_an_error_is_shown_kindly_and_nothing_is_lost(page: Page, fake: Any) -> None:
    ask(page, "this is too long")
    answered(page, "longer than the 2,048 tokens")
    ask(page, "hello")
    answered(page, "you said: hello")
    assert [message["content"] for message in fake.asked[-1]["messages"]] == ["hello"]
    expect(page.locator("#left .user-row").first).to_contain_text("this is too long")


def test_the_page_keeps_to_the_end_and_lets_go_of_who_scrolls_up(page: Page) -> None:
    log = page.locator("#left [role=log]")
    page.set_viewport_size({"width": 1280, "height": 400})
    ask(page, "a long one")
    expect(log).to_contain_text("word300")
    assert log.evaluate("log => log.scrollHeight - log.clientHeight - log.scrollTop") < 200
    log.hover()
    page.mouse.wheel(0, -300)
    page.wait_for_function(
        "log => log.scrollHeight - log.clientHeight - log.scrollTop > 250", arg=log.element_handle()
    )
    there = log.evaluate("log => log.scrollTop")
    expect(log).to_contain_text("word500")
    assert log.evaluate("log => log.scrollTop") <= there
    page.keyboard.press("Escape")
    answered(page, "stopped")


def test_what_a_model_writes_runs_nothing_and_loads_nothing(page: Page) -> None:
    ask(page, "be hostile")
    answered(page, "tokens/s")
    page.locator("#left .bot-row b").hover()
    page.get_by_text("press", exact=True).click()
    assert page.evaluate("window.hacked") is None


def test_settings_and_model_reach_the_server_and_stay(page: Page, fake: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.locator("#left-model input").click()
    page.get_by_role("option", name="base").click()
    ask(page, "hello")
    answered(page, "I am base")
    assert fake.asked[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.reload()
    expect(page.locator("#left .bot-row")).to_contain_text("I am base")
    expect(page.locator("#left-model input")).to_have_value("base")
    ask(page, "again")
    answered(page, "again")
    assert fake.asked[-1]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_light_and_dark(page: Page) -> None:
    def brightness() -> float:
        colour = page.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 765

    expect(page.locator("body")).not_to_have_class("dark")
    assert brightness() > 0.9
    page.get_by_label("Light or dark").click()
    page.reload()
    expect(page.locator("body")).to_have_class("dark")
    assert brightness() < 0.2


def test_a_phone(page: Page, address: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    visit(page, address)
    expect(page.locator("#side")).not_to_have_class(re.compile(r"\bopen\b"))
    ask(page, "show me code")
    answered(page, "tokens/s")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for part in ("#prompt", "#left .bot-row", "#left-model"):
        box = page.locator(part).last.bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390


def test_by_keyboard_alone(page: Page) -> None:
    page.keyboard.type("hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    page.keyboard.press("Enter")
    answered(page, "you said: hello")
    assert kept(page)[0]["left"][0]["content"][0]["text"] == "hello\nyou"
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#left .user-row")).to_have_count(0)
    page.keyboard.press("Control+k")
    page.keyboard.type("hello")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#left .bot-row")).to_contain_text("hello")
    expect(page.locator("#prompt textarea")).to_be_focused()


@pytest.fixture
def locked(gateways: Any) -> Iterator[tuple[str, Any]]:
    """The address of a server that wants the key `sk-secret`, and its gateway."""

    class Locked(gateways):  # type: ignore[misc]
        ready, bounds = True, Bounds()

        def caller(self, key: str | None) -> Caller:
            if key != "sk-secret":
                raise ApiError("a valid API key is needed", status=401)
            return Caller("someone")

        async def stop(self) -> None: ...

    gateway = Locked()

    async def load() -> None: ...

    app = create_app(gateway, load)
    mount(app, gateway)
    with served(app) as address:
        yield address, gateway


def test_the_page_is_behind_the_key(browser: Browser, locked: tuple[str, Any]) -> None:
    address, gateway = locked
    page = browser.new_page()
    for path in ("/", "/page/page.js", "/gradio_api/info", "/config"):
        answer = page.goto(address + path)
        assert answer
        assert answer.status == 401
    visit(page, f"{address}/?key=sk-secret")
    assert "sk-secret" not in page.url
    ask(page, "hello")
    answered(page, "you said: hello")
    assert gateway.asked_by == ["sk-secret"]


def test_no_file_is_taken_or_given(address: str) -> None:
    assert httpx.post(f"{address}/gradio_api/upload", files={"files": b"x"}).status_code == 404
    assert httpx.get(f"{address}/gradio_api/file=pyproject.toml").status_code == 404


def test_a_models_answer_over_the_real_server(browser: Browser, tiny_model: Path) -> None:
    command = [sys.executable, "-m", "farthing", "serve", str(tiny_model), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        said = next(line for line in server.stderr if " at http" in line)
        try:
            page = browser.new_page()
            visit(page, said.split(" at ")[1].strip())
            ask(page, "hello")
            answered(page, "tokens")
            expect(page.locator("#left .bot-row")).to_contain_text("$")
            page.close()
        finally:
            server.terminate()
        assert "Traceback" not in server.stderr.read()


def test_only_text_is_taken_from_a_browser(
    address: str, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio would serve the file that a message names, if it lies in the folder of the process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    file = {"path": str(tmp_path / "secret.txt"), "meta": {"_type": "gradio.FileData"}}
    config = httpx.get(f"{address}/config").json()
    [send] = [each for each in config["dependencies"] if each["targets"][0][1] == "submit"]
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    named = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    values[named["prompt"]] = "hello"
    values[named["left"]] = [{"role": "user", "content": [{"type": "file", "file": file}]}]
    data = {"fn_index": send["id"], "session_hash": "s", "data": [values[part] for part in send["inputs"]]}
    asked = len(fake.asked)
    assert httpx.post(f"{address}/gradio_api/queue/join", json=data).status_code == 200
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=s") as events:
        said = "".join(events.iter_text())
    assert '"success":false' in said
    assert "gradio_api/file" not in said
    assert len(fake.asked) == asked


def test_leaving_in_mid_answer_stops_it(page: Page, fake: Any) -> None:
    ask(page, "a long one")
    expect(page.locator("#left .bot-row")).to_contain_text("word9")
    page.goto("about:blank")
    deadline = time.monotonic() + 20
    while fake.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert fake.running == 0
