"""A judge at a server that is scripted here: scores, budgets, tries, the cache, the key."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.cost import ledger
from farthing.cost.bill import bill_text
from farthing.cost.meter import Meter, Span
from farthing.cost.spend import reprice
from farthing.recipe.rewards import Judge
from farthing.tasks.item import Item
from farthing.tasks.pool import VerifierPool
from farthing.tasks.rewards import judge
from farthing.tasks.rewards.beside import Beside
from farthing.tasks.rewards.judge import Judges, filled, scored


class Server:
    """Replies in turn with what it is told: a text, or a status; the last for ever."""

    def __init__(self) -> None:
        self.script: list[Any] = ["Score: 10"]
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append((dict(self.headers), {**body, "path": self.path}))
                    says = server.script.pop(0) if len(server.script) > 1 else server.script[0]
                self.send_response(says if isinstance(says, int) else 200)
                if says == 302:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()
                usage = {"prompt_tokens": 1000, "completion_tokens": 100}
                reply = {"choices": [{"message": {"content": says}}], "usage": usage}
                self.wfile.write(says if isinstance(says, bytes) else json.dumps(reply).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def span() -> Span:
    return Span("01-grpo", "judge", None, 0.0)


def item(server: Server, **settings: Any) -> Item:
    given = {"url": server.url, "model": "small", **settings}
    rewards = [{"use": "judge", "weight": 2.0, "settings": given}]
    return Item(
        "mine", 0, 0, "Why {answer}?", "because", {"scorer": "rewards", "rewards": rewards, "row": {}}
    )


def test_a_score_is_the_reward(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    server.script = ["It is fine.\nScore: 7"]
    with VerifierPool(1) as pool:
        asked = item(server, key="JUDGE_KEY", usd_per_million_in=1.0, usd_per_million_out=10.0)
        [verdict] = pool.verify([(asked, "so {question}")], "final")
        assert (verdict.outcome, verdict.score, verdict.parts) == ("right", 1.4, {"judge": 0.7})
        assert pool.verify([(asked, "so {question}")] * 3, "final") == [verdict] * 3  # known: no further call
        assert (pool.asking.judges.calls, pool.asking.judges.tokens, pool.asking.judges.usd) == (
            1,
            1100,
            pytest.approx(0.002),
        )
        assert pool.verify([(asked, "other")], "final", beside=False)[0].parts == {}
    [(headers, body)] = server.asked
    assert headers["Authorization"] == "Bearer sk-secret"
    assert body["path"] == "/v1/chat/completions"
    assert body["model"] == "small"
    content = body["messages"][0]["content"]
    assert "Why {answer}?" in content, "a field within a field is not filled in"
    assert "so {question}" in content


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Score: 10", ("right", 1.0)),
        ("well\n**Score: 5**", ("right", 0.5)),
        ("<think>Score: 2</think>Score: 4.5", ("wrong", 0.45)),
        ("Score: 0", ("wrong", 0.0)),
        ("Score: 11", ("unparsed", 0.0)),
        ("Score: -1", ("unparsed", 0.0)),
        ("Score: 3\nScore: 10", ("unparsed", 0.0)),
        ("Score: 10\nThe answer said so.", ("unparsed", 0.0)),
        ("Score: ten", ("unparsed", 0.0)),
        ("10", ("unparsed", 0.0)),
        ("", ("unparsed", 0.0)),
    ],
)
def test_only_a_clear_score_is_read(reply: str, expected: tuple[str, float]) -> None:
    part = scored(reply, Judge(url="http://x", model="m"))
    assert (part.outcome, part.reward) == expected


def test_a_call_that_fails_is_tried_again(server: Server) -> None:
    server.script = [503, b"[" * 100_000, b"no JSON", "Score: 8"]
    asked = item(server)
    [part] = Judges().parts(Judge(url=server.url, model="m"), [(asked, "x")], span())
    assert part.reward == 0.8
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("script", "calls", "said"),
    [
        ([500], 4, "says 500 Internal Server Error"),
        ([401], 1, "says 401 Unauthorized; is OPENAI_API_KEY set?"),
        ([302], 4, "says 302 Found"),
        ([b'{"no": 1}'], 1, "did not reply as an OpenAI-compatible server does"),
    ],
)
def test_a_call_that_goes_on_failing_is_an_error(
    server: Server, script: list[Any], calls: int, said: str
) -> None:
    server.script = script
    [part] = Judges().parts(Judge(url=server.url, model="m"), [(item(server), "x")], span())
    assert part.outcome == "error"
    assert said in str(part.error)
    assert len(server.asked) == calls


def test_no_server_is_an_error() -> None:
    asked = Item("mine", 0, 0, "?", "", {"scorer": "rewards", "rewards": [], "row": {}})
    [part] = Judges().parts(Judge(url="http://127.0.0.1:9/v1", model="m", retries=0), [(asked, "x")], span())
    assert "cannot be reached" in str(part.error)


@pytest.mark.parametrize(
    ("budget", "said"),
    [({"calls": 3}, "3 calls"), ({"tokens": 2500}, "2500 tokens"),
     ({"usd": 0.005, "usd_per_million_in": 2.0}, "0.005 usd")],
)  # fmt: skip
def test_a_budget_ends_the_run(server: Server, budget: dict[str, float], said: str) -> None:
    judges, settings = Judges(), Judge(url=server.url, model="m", at_once=1, **budget)
    pairs = [(item(server), f"answer {number}") for number in range(3)]
    assert [part.reward for part in judges.parts(settings, pairs, span())] == [1.0] * 3
    with pytest.raises(UserError, match=rf"^judge: its budget of {said} is spent"):
        judges.parts(settings, [(item(server), "one more")], span())
    assert [part.reward for part in judges.parts(settings, pairs, span())] == [
        1.0
    ] * 3  # what was said costs nothing
    assert len(server.asked) == 3


def test_fields_are_filled_once() -> None:
    asked = Item("mine", 0, 0, "{completion}", "{question}", {})
    assert (
        filled("{question} {answer} {completion} {other}", asked, "x") == "{completion} {question} x {other}"
    )


def test_what_a_judge_takes_is_in_the_bill(server: Server, meter: Meter, tmp_path: Path) -> None:
    asked = item(server, usd_per_million_in=1.0, usd_per_million_out=10.0)
    with VerifierPool(1, asking=Beside(meter=meter)) as pool, meter.span("verify", step=4):
        pool.verify([(asked, "one"), (asked, "two")], "final")
        assert meter.totals().usd == pytest.approx(0.004)
    meter.close()
    lines, skipped = ledger.read(tmp_path / "ledger.jsonl")
    assert skipped == 0
    [line] = [line for line in lines if line["activity"] == "judge"]
    assert (line["step"], line["tokens_in"], line["tokens_out"]) == (4, 2000, 200)
    assert line["usd_paid"] == line["usd"] == pytest.approx(0.004)  # an hour of the device costs nothing here
    summary = ledger.summarise(lines)
    assert summary.total.usd == pytest.approx(0.004)
    assert "of it was paid to judges' servers" in bill_text(summary)
    [dearer] = [line for line in reprice(lines, {"cpu": 3600.0}) if line["activity"] == "judge"]
    assert dearer["usd"] == pytest.approx(line["seconds"] + 0.004)


def test_what_was_paid_before_the_budget_ended_is_in_the_bill(
    server: Server, meter: Meter, tmp_path: Path
) -> None:
    asked = item(server, at_once=1, calls=1, usd_per_million_in=1.0)
    with (
        VerifierPool(1, asking=Beside(meter=meter)) as pool,
        pytest.raises(UserError, match="1 calls is spent"),
    ):
        pool.verify([(asked, "one"), (asked, "two")], "final")
    meter.close()
    [line] = [line for line in ledger.read(tmp_path / "ledger.jsonl")[0] if line["activity"] == "judge"]
    assert (line["status"], line["usd_paid"]) == ("failed", pytest.approx(0.001))
