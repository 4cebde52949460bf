"""The bill: it agrees with the ledger, and says what was lost and what was not measured."""

import json
import re
from pathlib import Path

import pytest

from farthing.cost import ledger
from farthing.report.money import bill

FIRST = 1_790_000_000.0


def write(run: Path, lines: list[dict]) -> None:
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def line(build_run):
    """A ledger line with some keys changed."""
    template = json.loads((build_run(steps=1) / "ledger.jsonl").read_text().splitlines()[0])
    return lambda **changes: template | {"started": FIRST} | changes


def test_its_rows_are_the_ledgers_and_add_up(build_run):
    run = build_run()
    lines, _ = ledger.read(run / "ledger.jsonl")
    found = bill(run, {})
    assert found is not None
    assert found.usd == pytest.approx(sum(one["usd"] for one in lines))
    assert found.seconds == pytest.approx(sum(one["seconds"] for one in lines))
    assert [entry.name for entry in found.entries] == [
        "load", "generate", "train", "verify", "evaluate", "checkpoint", "idle"
    ]  # fmt: skip
    written = [float(entry.cost) for entry in found.entries if not entry.cost.startswith("<")]
    assert sum(written) == pytest.approx(float(found.total.cost), abs=len(found.entries) * 1e-4)
    assert {len(cost.partition(".")[2]) for cost in (entry.cost for entry in found.entries)} == {4}
    assert found.bar_of == "the cost"


def test_the_bar_says_its_shares_and_they_are_of_the_whole(build_run):
    found = bill(build_run(), {})
    assert found is not None
    shares = [
        float(share) for share in re.findall(r" ([\d.]+)%", found.bar.split("aria-label")[1].split(">")[0])
    ]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_work_that_was_lost_has_a_row_and_is_paid_for(build_run, line):
    run = build_run()
    write(run, [
        line(activity="train", step=1, seconds=10.0),
        line(activity="train", step=2, seconds=10.0, status="interrupted", started=FIRST + 10),
        line(activity="train", step=2, seconds=10.0, attempt=2, started=FIRST + 60),
    ])  # fmt: skip
    found = bill(run, {})
    assert found is not None
    assert [(entry.name, entry.time) for entry in found.entries] == [
        ("train", "20 s"), ("lost, interrupted once", "10 s")
    ]  # fmt: skip
    assert found.total.time == "30 s"


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (("measured", "measured"), "Energy was measured"),
        (("estimated", "estimated"), "Energy is estimated"),
        (("measured", "estimated"), "in part measured"),
    ],
)
def test_it_says_whether_energy_was_measured(build_run, line, kinds, said):
    run = build_run()
    write(run, [line(joules_are=kind) for kind in kinds])
    found = bill(run, {})
    assert found is not None
    assert any(said in sentence for sentence in found.sentences)


def test_the_runs_own_clock_decides_what_is_covered_unless_it_is_stale(build_run, line):
    run = build_run()
    write(run, [line(seconds=90.0)])
    for wall, covered in ((100.0, "90.0%"), (10.0, "100.0%"), (None, "100.0%")):
        found = bill(run, {"wall_seconds": wall})
        assert found is not None
        assert any(f"accounts for {covered}" in sentence for sentence in found.sentences)


def test_a_run_that_costs_nothing_is_drawn_by_its_time(build_run, line):
    run = build_run()
    write(run, [line(usd=0.0, usd_rate=0.0)])
    found = bill(run, {})
    assert found is not None
    assert found.bar_of == "the time"


def test_stages_are_listed_when_there_are_several(build_run, line):
    run = build_run()
    write(run, [line(stage="01-grpo"), line(stage="02-grpo")])
    found = bill(run, {})
    assert found is not None
    assert [entry.name for entry in found.stages] == ["01-grpo", "02-grpo"]
    write(run, [line(stage="01-grpo")])
    found = bill(run, {})
    assert found is not None
    assert found.stages == []


@pytest.mark.parametrize("content", ["", "\n", "not json\n"])
def test_an_empty_ledger_is_no_bill(tmp_path, content):
    (tmp_path / "ledger.jsonl").write_text(content)
    assert bill(tmp_path, {}) is None
    (tmp_path / "ledger.jsonl").unlink()
    assert bill(tmp_path, {}) is None
