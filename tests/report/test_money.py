import json
from pathlib import Path

import pytest

from farthing.report import write_report
from farthing.report.money import cost_page


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def amount(text: str) -> float:
    return float(text.removeprefix("under ").removeprefix("$").replace(",", ""))


def test_every_cent_is_there_and_the_largest_is_first(build_run):
    run = build_run()
    page = cost_page(run, results(run))
    assert page is not None
    parts = [amount(cent.usd) for cent in page.cents]
    assert sum(parts) == pytest.approx(amount(page.total), rel=0.05)
    assert sum(float(cent.share.rstrip("%")) for cent in page.cents) == pytest.approx(100, abs=0.3)
    large = parts if "smaller" not in page.cents[-1].activity else parts[:-1]
    assert large == sorted(large, reverse=True)
    assert page.cents[0].activity == "generate"


def test_what_a_unit_cost(build_run):
    run = build_run()
    found = results(run)
    page = cost_page(run, found)
    assert page is not None
    figures = {name: amount(value) for value, name in page.figures}
    gained = 100 * found["gain"]["difference"]
    assert figures["a point of accuracy gained"] == pytest.approx(amount(page.total) / gained, rel=0.05)
    found["gain"]["difference"] = -0.1
    assert "a point of accuracy gained" not in {name for _, name in cost_page(run, found).figures}


def test_plan_beside_actual(build_run):
    run = build_run()
    found = results(run) | {
        "plan": {"wall_seconds": 400, "usd": 0.01, "by_activity": {"generate": 102, "verify": None}}
    }
    page = cost_page(run, found)
    assert page is not None
    rows = {row.name: row for row in page.plan}
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    took = sum(line["seconds"] for line in lines if line["activity"] == "generate")
    assert rows["generate"].ratio == f"{took / 102:.2f}"
    assert set(rows) == {"generate", "wall clock", "dollars"}
    assert cost_page(run, results(run)).plan == []


def test_what_was_entered_by_hand_is_in_the_total(build_run):
    run = build_run()
    entry = {"kind": "data", "what": "<b>corpus</b>", "usd": 5, "source": "invoice", "date": "2026-11-01"}
    (run / "entries.jsonl").write_text(json.dumps(entry) + "\n")
    page = cost_page(run, results(run))
    assert page is not None
    assert page.bought == [("data: <b>corpus</b>", "$5.00", "invoice")]
    assert amount(page.total) == pytest.approx(5.01, abs=0.01)
    html = write_report(run).read_text()
    assert "&lt;b&gt;corpus&lt;/b&gt;" in html
    assert "<b>corpus" not in html


def test_other_hardware_says_what_it_assumes(build_run):
    run = build_run()
    page = cost_page(run, results(run))
    assert page is not None
    assert page.hardware
    assert "lower bound" in page.assumption
    html = " ".join(write_report(run).read_text().split())
    assert page.assumption in html
    assert "The run was not planned before it started." in html


@pytest.mark.parametrize(
    "plan", [7, [], {"by_activity": [1]}, {"wall_seconds": "long"}, {"by_activity": {"x": -0.0}}]
)
def test_no_plan_breaks_the_page(build_run, plan):
    run = build_run()
    assert cost_page(run, results(run) | {"plan": plan}) is not None


def test_without_a_ledger_there_is_no_page(build_run):
    run = build_run()
    (run / "ledger.jsonl").write_text("")
    assert cost_page(run, {}) is None
    (run / "ledger.jsonl").unlink()
    assert cost_page(run, {}) is None
    assert "nothing has been paid for" in write_report(run).read_text()


def test_serving_since_then_is_told_of_and_not_in_the_total(build_run):
    run = build_run()
    before = cost_page(run, results(run))
    line = json.loads((run / "ledger.jsonl").read_text().splitlines()[0]) | {"seconds": 60.0, "usd": 2.5}
    (run / "serving.jsonl").write_text(json.dumps(line) + "\n")
    page = cost_page(run, results(run))
    assert page.total == before.total
    assert page.notes == [
        *before.notes,
        "Serving the model since then has cost $2.50 in 1.0 min, which is not in this bill.",
    ]
