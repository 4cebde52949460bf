import asyncio
import json
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.serve.safety import (
    Blocked,
    Moderation,
    Screen,
    Verdict,
    classifier,
    function_hook,
    moderation,
    read_policy,
)

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def finds_bombs(text: str, direction: str) -> list[str]:
    return ["weapons"] if "bomb" in text else []


def blocking(function: Callable[[str, Any], Any] = finds_bombs, **options: Any) -> Moderation:
    return Moderation("block", function_hook(function), **options)


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


# ---- verdicts ----


def test_off_asks_nobody() -> None:
    def never(text: str, direction: str) -> bool:
        raise AssertionError

    assert run(Moderation("off", function_hook(never)).check("a bomb", "prompt")) == Verdict()


def test_block_lets_pass_what_the_hook_finds_nothing_in() -> None:
    guard = blocking()
    assert run(guard.check("a cake", "prompt")) == Verdict()
    assert run(guard.check("a bomb", "prompt")) == Verdict(True, ("weapons",))


@pytest.mark.parametrize(
    ("returned", "categories"),
    [
        (None, ()), (False, ()), ([], ()), ("", ()),
        (True, ("flagged",)), ("hate", ("hate",)), (["a", "b"], ("a", "b")), (("x\x1b[2J\ny",), ("x[2J y",)),
    ],
)  # fmt: skip
def test_a_function_says_what_it_finds_in_several_ways(returned: Any, categories: tuple[str, ...]) -> None:
    verdict = run(blocking(lambda text, direction: returned).check("t", "answer"))
    assert verdict == Verdict(bool(categories), categories)


def test_a_function_may_be_async_and_is_told_the_direction() -> None:
    async def hook(text: str, direction: str) -> str:
        await asyncio.sleep(0)
        return direction

    assert run(blocking(hook).check("t", "answer")).categories == ("answer",)


def test_warn_lets_everything_through_without_waiting_and_logs_it(tmp_path: Path) -> None:
    asked = threading.Event()

    def slow(text: str, direction: str) -> str:
        assert asked.wait(60)
        return "weapons"

    async def warned() -> Verdict:
        guard = Moderation("warn", function_hook(slow), log=tmp_path / "log.jsonl")
        verdict = await guard.check("a bomb", "prompt", key="alice", model="m")
        asked.set()
        await guard.close()
        return verdict

    assert run(warned()) == Verdict()
    [line] = lines(tmp_path / "log.jsonl")
    assert line["action"] == "let through"
    assert line["categories"] == ["weapons"]


def test_the_log_has_no_text(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"

    def quotes(text: str, direction: str) -> str:
        if "secret" in text:
            raise ValueError(text)
        return finds_bombs(text, direction) and "weapons"

    async def ask() -> None:
        guard = blocking(quotes, log=log)
        for text in ("fine", "my bomb", "my secret"):
            await guard.check(text, "prompt", key="alice", model="m")

    run(ask())
    found, failed = lines(log)
    assert found.pop("time").endswith("+00:00")
    who = {"key": "alice", "model": "m", "direction": "prompt", "action": "blocked"}
    assert found == {**who, "categories": ["weapons"], "failure": None}
    assert failed["failure"] == "ValueError"
    assert "my" not in log.read_text()
    assert "secret" not in log.read_text()


# ---- a hook that fails ----


def raises(text: str, direction: str) -> bool:
    raise SystemExit(text)


def answers_oddly(text: str, direction: str) -> dict[str, bool]:
    return {"hate": False}


def test_block_fails_closed_and_warn_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for function, failure in ((raises, "SystemExit"), (answers_oddly, "returned dict")):
        log = tmp_path / f"{function.__name__}.jsonl"
        assert run(blocking(function, log=log).check("t", "prompt")) == Verdict(True, (), failed=True)

        async def warned(function: Any, log: Path) -> Verdict:
            guard = Moderation("warn", function_hook(function), log=log)
            verdict = await guard.check("t", "prompt")
            await guard.close()
            return verdict

        assert run(warned(function, log)) == Verdict()
        assert [(line["failure"], line["action"]) for line in lines(log)] == [
            (failure, "blocked"),
            (failure, "let through"),
        ]
    said = capsys.readouterr().err
    assert "moderation fails (SystemExit); text that is not judged is blocked" in said
    assert "text that is not judged is let through" in said


def test_a_hook_that_hangs_is_given_up_and_holds_nothing_up() -> None:
    forever = threading.Event()
    guard = blocking(lambda text, direction: forever.wait(), seconds=0.05)

    async def many() -> list[Verdict]:
        return await asyncio.gather(*(guard.check("t", "prompt") for _ in range(20)))

    try:
        assert run(many()) == [Verdict(True, (), failed=True)] * 20
    finally:
        forever.set()


def test_a_log_that_cannot_be_written_changes_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.mkdir()
    assert run(blocking(log=log).check("a bomb", "prompt")).blocked
    assert "cannot be written" in capsys.readouterr().err


# ---- answers in sentences ----


async def screened(guard: Moderation, pieces: list[str]) -> tuple[list[str], Verdict]:
    screen, sent = Screen(guard), []
    try:
        for piece in pieces:
            sent.append(await screen.push(piece))
        sent.append(await screen.flush())
    except Blocked as blocked:
        return sent, blocked.verdict
    return sent, Verdict()


def test_a_sentence_is_sent_once_it_is_judged() -> None:
    sent, verdict = run(screened(blocking(), ["One", " cake", ". Two", " cakes! An", "d 3.5 more"]))
    assert sent == ["", "", "One cake. ", "Two cakes! ", "", "And 3.5 more"]
    assert verdict == Verdict()


def test_what_is_blocked_is_never_sent() -> None:
    sent, verdict = run(screened(blocking(), ["A cake. ", "Then a bo", "mb. ", "And more."]))
    assert "".join(sent) == "A cake. "
    assert verdict == Verdict(True, ("weapons",))
    sent, verdict = run(screened(blocking(), ["a bomb, unfinished"]))
    assert sent == [""]
    assert verdict.blocked


def test_a_word_cut_in_two_by_an_end_of_sentence_is_seen_with_what_was_sent_before() -> None:
    guard = blocking(lambda text, direction: "weapons" if "bo. mb" in text else None)
    sent, verdict = run(screened(guard, ["A bo. ", "mb is here. "]))
    assert sent == ["A bo. "]
    assert verdict.blocked


def test_text_without_sentences_is_not_held_back_for_ever() -> None:
    sent, _ = run(screened(blocking(), ["x" * 100] * 12))
    assert "".join(sent) == "x" * 1200
    assert max(map(len, sent)) == 500


@given(st.lists(st.text("ab.! \n。", max_size=30), max_size=8), st.sampled_from(["off", "warn", "block"]))
def test_nothing_is_lost_or_changed(pieces: list[str], mode: Any) -> None:
    async def passes(text: str, direction: str) -> tuple[str, ...]:
        return ()

    sent, verdict = run(screened(Moderation(mode, passes), pieces))
    assert "".join(sent) == "".join(pieces)
    assert not verdict.blocked
    if mode != "block":
        assert sent == [*pieces, ""]


def test_warn_judges_every_sentence_and_delays_none() -> None:
    heard: list[str] = []

    async def talk() -> list[str]:
        async def hook(text: str, direction: str) -> tuple[str, ...]:
            heard.append(text)
            return ("weapons",)

        guard = Moderation("warn", hook)
        sent, _ = await screened(guard, ["One. Tw", "o. ", "Three"])
        await guard.close()
        return sent

    assert run(talk()) == ["One. Tw", "o. ", "Three", ""]
    assert heard == ["One. ", "One. Two. ", "One. Two. Three"]


# ---- a classifier at a URL ----


@contextmanager
def served(reply: bytes, status: int = 200) -> Iterator[tuple[str, list[tuple[str | None, dict[str, Any]]]]]:
    """A server that gives every request the same reply; its URL, and the (key, body) of each request."""
    asked: list[tuple[str | None, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.headers["Authorization"], json.loads(body)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/moderations", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def result(**found: Any) -> bytes:
    return json.dumps({"id": "modr-1", "model": "m", "results": [found]}).encode()


def test_a_classifier_is_asked_as_openai_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARTHING_MODERATION_KEY", "sk-1")
    reply = result(flagged=True, categories={"violence": True, "hate": False}, category_scores={})
    with served(reply) as (url, asked):
        verdict = run(moderation(f"block={url}").check("a bomb", "prompt"))
    assert verdict == Verdict(True, ("violence",))
    assert asked == [("Bearer sk-1", {"input": "a bomb"})]


def test_what_a_classifier_does_not_flag_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FARTHING_MODERATION_KEY", raising=False)
    with served(result(flagged=False, categories={"violence": False})) as (url, asked):
        assert run(Moderation("block", classifier(url)).check("a cake", "prompt")) == Verdict()
    assert asked[0][0] is None


@pytest.mark.parametrize(
    ("reply", "status", "failure"),
    [
        (b"no JSON", 200, "JSONDecodeError"),
        (b"[]", 200, "not in the form"),
        (b'{"results": []}', 200, "not in the form"),
        (b'{"results": [{"flagged": "no"}]}', 200, "not in the form"),
        (result(flagged=False), 500, "HTTP 500"),
        (result(flagged=False), 302, "HTTP 302"),  # the text goes to nobody else
    ],
)
def test_a_classifier_that_replies_otherwise_has_judged_nothing(
    reply: bytes, status: int, failure: str, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    with served(reply, status) as (url, _):
        assert run(moderation(f"block={url}", log).check("t", "prompt")) == Verdict(True, (), failed=True)
    assert failure in lines(log)[0]["failure"]


def test_a_classifier_that_is_not_there_has_judged_nothing() -> None:
    with served(b"") as (url, _):
        pass
    assert run(moderation(f"block={url}").check("t", "prompt")).failed


# ---- what the operator writes ----


def test_a_function_is_found_in_the_operators_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_hook_of_a_test.py").write_text("def judge(text, direction):\n    return 'b' in text\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # taken back afterwards
    guard = moderation("block=my_hook_of_a_test:judge")
    assert run(guard.check("b", "prompt")).categories == ("flagged",)
    assert moderation("off").mode == "off"


def test_the_hook_that_the_docs_show_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "safety.md").read_text()
    [shown] = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    (tmp_path / "shown_in_the_docs.py").write_text(shown)
    monkeypatch.syspath_prepend(str(tmp_path))
    guard = moderation("block=shown_in_the_docs:judge")
    assert run(guard.check("my key is sk-" + "a1" * 12, "answer")).categories == ("secrets",)
    assert not run(guard.check("my key is under the mat", "answer")).blocked


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("on", "write off, warn=HOOK or block=HOOK"),
        ("block", "write off"),
        ("block=", "write off"),
        ("block=hook", "names no function"),
        ("block=ftp://host/x", "names no server"),
        ("warn=no_such_module:f", "no_such_module cannot be imported"),
        ("warn=json:no_such_function", "json has no function no_such_function"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(setting: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        moderation(setting)
    assert "\n" not in str(refused.value)


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        moderation("warn=json:dumps", tmp_path)


# ---- the policy ----


def test_a_policy_is_yaml_or_the_system_message_itself(tmp_path: Path) -> None:
    yaml, text = tmp_path / "policy.yaml", tmp_path / "policy.md"
    yaml.write_text("system: Be kind.\nrefusal: I cannot help with that.\n")
    text.write_text("Be kind.\nsystem: not a key here\n")
    assert read_policy(yaml).refusal == "I cannot help with that."
    assert read_policy(text).system == "Be kind.\nsystem: not a key here"
    assert read_policy(text).refusal is None


def test_a_policy_stands_before_every_conversation(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Be kind.")
    policy = read_policy(tmp_path / "p.txt")
    asked = {"role": "user", "content": "hi"}
    assert policy.before([asked]) == [{"role": "system", "content": "Be kind."}, asked]
    assert policy.before([{"role": "developer", "content": "Rhyme."}, asked]) == [
        {"role": "developer", "content": "Be kind.\n\nRhyme."},
        asked,
    ]
    parts = [{"type": "text", "text": "Rhyme."}]
    assert policy.before([{"role": "system", "content": parts}])[0]["content"] == [
        {"type": "text", "text": "Be kind."},
        *parts,
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.yaml", b"refusal: no\n", "system"),
        ("p.yaml", b"system: [", "line"),
        ("p.yaml", b"system: a\nsytem: b\n", "sytem"),
        ("p.txt", b" \n", "is empty"),
        ("p.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("p.txt", b"x" * 1_000_001, "larger than 1 MB"),
        (".", b"", "cannot be read"),
    ],
)
def test_a_policy_that_says_nothing_is_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    if name != ".":
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        read_policy(tmp_path / name)
    assert "\n" not in str(refused.value)
