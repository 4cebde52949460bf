import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farthing.base.errors import UserError
from farthing.cli import app


def ask(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def write_run(folder: Path, seconds: float = 3600.0, **more: object) -> Path:
    line = {
        "stage": "01-grpo", "activity": "train", "started": 1.7e9, "seconds": seconds, "device": "cpu: Example",
        "devices": 1, "tokens_in": 1000, "tokens_out": 0, "flops": 10**12, "joules": 5e4, "joules_are": "estimated",
        "usd": seconds / 3600 * 0.08, "usd_rate": 0.08, "rate_source": "a price list", "status": "ok",
        "attempt": 1, "step": None,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "ledger.jsonl").write_text(json.dumps(line | more) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "good")
    write_run(tmp_path / "runs" / "bad", 7200.0, status="failed")
    return tmp_path / "runs"


def test_one_run_by_its_bare_name(runs):
    said = ask("ledger", "good")
    assert "train" in said
    assert "0.080" in said
    assert "a price list" in said


def test_many_runs_are_one_bill_and_failures_are_in_it(runs):
    data = json.loads(ask("ledger", runs / "good", runs / "bad", "--json"))
    assert data["usd"] == pytest.approx(0.24)
    assert data["by"]["activity"]["lost"]["usd"] == pytest.approx(0.16)
    assert [run["run"] for run in data["runs"]] == [str(runs / "good"), str(runs / "bad")]
    assert "2 runs" in ask("ledger", "good", "bad")


@pytest.mark.parametrize("by", ["activity", "stage", "day", "run", "device"])
def test_every_way_to_group(runs, by):
    first = {
        "activity": "train",
        "stage": "01-grpo",
        "day": "2023-11-14",
        "run": "runs/good",
        "device": "cpu: Example",
    }
    assert first[by] in ask("ledger", "good", "--by", by)


def test_csv_and_another_price(runs):
    (row,) = csv.DictReader(io.StringIO(ask("ledger", "good", "--csv", "--price", "cpu=1.5")))
    assert float(row["usd"]) == pytest.approx(1.5)


def test_a_rates_file_with_own_hardware(runs, tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text("rates:\n  cpu: {price: 876, years: 1, hours_per_year: 8760, electricity: 0.36}\n")
    data = json.loads(ask("ledger", "good", "--rates", path, "--json"))
    assert data["usd"] == pytest.approx(0.1 + 5e4 / 3.6e6 * 0.36)


def test_what_was_bought_is_added_and_stays(runs):
    entry = "{kind: teacher, what: answers, tokens_out: 1e6, usd_per_million_out: 2.0, source: price list}"
    assert "teacher: answers" in ask("ledger", "good", "--add", entry)
    data = json.loads(ask("ledger", "good", "--json"))
    assert data["usd"] == pytest.approx(2.08)
    assert data["usd_entered"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "no such run"),
        (["."], "no ledger"),
        (["good", "--price", "h100=2"], "no run here used h100"),
        (["good", "--price", "cpu=0"], "above 0"),
        (["good", "--rates", "nowhere.yaml"], "cannot be read"),
        (["good", "bad", "--add", "{kind: data}"], "one RUN"),
        (["good", "--add", "{kind: data}"], "what: is missing"),
        (["good", "--csv", "--json"], "not both"),
    ],
)
def test_a_mistake_with_the_ledger_is_one_sentence(runs, arguments, said):
    with pytest.raises(UserError, match=said) as caught:
        ask("ledger", *arguments)
    assert "\n" not in str(caught.value)


def test_runs_without_a_ledger_are_left_out_and_named(runs):
    (runs / "empty").mkdir()
    data = json.loads(ask("ledger", "good", "empty", "--json"))
    assert data["left_out"] == ["runs/empty"]


def test_claims_are_listed_and_checked():
    listed = json.loads(ask("claim", "--json"))["claims"]
    assert {"name": "deepseek-v3", "title": "DeepSeek-V3, trained for $5.576M"} in listed
    assert "deepseek-v3" in ask("claim")
    found = json.loads(ask("claim", "deepseek-v3", "--json"))
    assert found["verdict"] == "plausible"
    assert found["parts"][0]["mfu"]["causal"] == pytest.approx(0.391, abs=0.001)
    assert found["answer"]["lines"][3][1].startswith("no: at least $10.7M")
    short, full = ask("claim", "deepseek-v3"), ask("claim", "deepseek-v3", "--full")
    assert len(short.splitlines()) <= 12
    assert full.startswith(short.rstrip())
    assert "MFU 39.1% causal, 43.9% full" in full


def test_a_claim_as_a_page_and_one_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text(ask("claim", "--new"))
    ask("claim", str(tmp_path / "mine.yaml"), "--html", str(tmp_path / "mine.html"))
    assert "Example-7B" in (tmp_path / "mine.html").read_text()
    with pytest.raises(UserError, match="which claim"):
        ask("claim", "--html", str(tmp_path / "mine.html"))
    with pytest.raises(UserError, match=r"mine\.yaml exists"):
        ask("claim", "deepseek-v3", "--html", str(tmp_path / "mine.yaml"))


def test_an_unknown_claim_gives_the_nearest():
    with pytest.raises(UserError, match="deepseek-v3"):
        ask("claim", "deepseekv3")


def test_serving_is_a_bill_of_its_own(runs):
    before = json.loads(ask("ledger", "good", "--json"))
    line = json.loads((runs / "good" / "ledger.jsonl").read_text())
    served = [
        line | {"stage": "serve", "activity": "generate", "seconds": 60.0, "usd": 0.5, "tokens_out": 700},
        line | {"stage": "serve", "activity": "idle", "started": 1.8e9, "seconds": 30.0, "usd": 0.25},
    ]
    (runs / "good" / "serving.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in served) + "torn\n"
    )
    data = json.loads(ask("ledger", "good", "--json"))
    assert {key: data[key] for key in ("usd", "covered", "total")} == {
        key: before[key] for key in ("usd", "covered", "total")
    }
    assert data["serving"]["usd"] == data["runs"][0]["usd_serving"] == 0.75
    assert data["serving"]["by_activity"]["generate"]["tokens_out"] == 700
    assert data["runs"][0]["notes"] == ["1 line of serving.jsonl skipped: empty, torn or not a ledger's"]
    run, _, serving = ask("ledger", "good").partition("serving since then")
    assert "idle" not in run
    assert "idle" in serving
    assert "0.75" in serving
    assert "on the clock" in run
    assert "on the clock" not in serving
    assert json.loads(ask("ledger", "good", "--json", "--price", "cpu=3600"))["serving"]["usd"] == 90.0


def test_a_run_that_was_never_served_says_nothing_of_it(runs):
    assert "serving" not in ask("ledger", "good")
    assert json.loads(ask("ledger", "good", "--json"))["serving"]["usd"] == 0
