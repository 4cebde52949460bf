"""What a study says: curves read at equal amounts, paired differences, and sentences that follow the numbers."""

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.report import write_report
from farthing.report.study import at, compare, interval, read_run, sections, student, write_study
from farthing.report.study_text import findings, headline, markdown, tables

RATE = (3.6, "a test")  # a thousandth of a dollar a second


def write_run(
    folder: Path, family: str, optimizer: str, number: int, *, speed: float, gain: float, cores: float = 2.0
) -> None:
    """A finished training of 10 steps of 100 tokens, whose loss falls by `gain` at every other one."""
    place = folder / "runs" / f"{family}-{optimizer}-{number}"
    place.mkdir(parents=True)
    facts = {
        "family": family, "optimizer": optimizer, "number": number, "seed": 6 + number, "lr": 1e-3,
        "batch_tokens": 100, "warmup": 1, "parameters": 3000, "parameters_mtp": 0, "active": 1000, "layers": 2,
        "width": 64, "cache_bytes_per_token": 256 if family == "dense" else 192, "load_average": 0.5,
        "untrained_bits_per_byte": 5.0,
    }  # fmt: skip
    (place / "done.json").write_text(json.dumps(facts))
    lines = []
    for step in range(1, 11):
        line: dict[str, Any] = {
            "step": step, "tokens": 100 * step, "flops": 600_000, "cores_had": cores,
            "seconds_by_activity": {"train": 100 / speed, "evaluate": 9.0},
        }  # fmt: skip
        if step % 2 == 0:
            line["val_bits_per_byte"] = 5 - gain * step + 0.01 * number
        lines.append(line)
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Experts that learn more from a token and take twice as long over it."""
    folder = tmp_path / "run" / "stages" / "01-study"
    for number in (1, 2, 3):
        write_run(folder, "moe", "adamw", number, speed=50, gain=0.11 + 0.001 * number)
        write_run(folder, "dense", "adamw", number, speed=100, gain=0.10, cores=1.0 if number == 2 else 2.0)
    return folder


def test_a_run_is_its_training_alone(folder: Path) -> None:
    run = read_run(folder / "runs" / "dense-adamw-2", RATE[0] / 3600)
    assert run["curve"]["seconds"] == pytest.approx([0, 2, 4, 6, 8, 10])
    assert run["curve"]["dollars"] == pytest.approx([0, 0.002, 0.004, 0.006, 0.008, 0.01])
    assert run["curve"]["tokens"] == [0, 200, 400, 600, 800, 1000]
    assert run["curve"]["flops"] == pytest.approx([0, 1.2e6, 2.4e6, 3.6e6, 4.8e6, 6e6])
    assert run["curve"]["bits"] == pytest.approx([5, 4.82, 4.62, 4.42, 4.22, 4.02])
    assert (run["tokens_per_second"], run["cores_had"]) == (pytest.approx(100), 1.0)


def test_who_wins_depends_on_what_is_equal(folder: Path) -> None:
    assert write_study(folder, RATE) == "dense-adamw-1"
    found = json.loads((folder / "study.json").read_text())
    equal = found["equal"]
    assert equal["tokens"]["amount"] == 1000
    assert equal["seconds"]["amount"] == pytest.approx(10)  # where the fast ones ended
    dense, moe = equal["tokens"]["rows"]
    assert dense["mean"] == pytest.approx(4.02)
    assert "difference" not in dense
    assert moe["difference"] == pytest.approx(-0.12)  # 10 steps of 0.012 more
    assert moe["verdict"] == equal["flops"]["rows"][1]["verdict"] == "better"
    assert moe["difference_ci95"] == pytest.approx([-0.12 - 0.02484, -0.12 + 0.02484], abs=1e-4)
    late = equal["seconds"]["rows"][1]
    # after 10 s the experts are at step 5, half way between two validations
    assert late["values"][0] == pytest.approx(5 - 0.111 * 5 + 0.01)
    assert late["verdict"] == equal["dollars"]["rows"][1]["verdict"] == "worse"
    assert late["cost_ratio"] > 1.5
    assert moe["cost_ratio"] == pytest.approx(1 / 1.12, rel=0.02)
    assert late["crossings"] == []
    assert found["best"] == "dense-adamw-1"


def test_a_disturbed_run_is_named(folder: Path) -> None:
    write_study(folder, RATE)
    said = (folder / "study.md").read_text()
    assert "Something else was using the machine during dense-adamw-2:" in said
    assert "moe-adamw" not in said.split("during")[1].split("\n")[0]


def test_the_sentences_and_tables_follow_the_numbers(folder: Path) -> None:
    write_study(folder, RATE)
    found = json.loads((folder / "study.json").read_text())
    said = findings(found)
    assert said[0].startswith(
        "At equal FLOPs (6.00 MFLOP) the lowest is moe, AdamW, with 3.900 bits per byte."
    )
    assert "Better than dense with the same optimizer: moe, AdamW (−0.120)." in said[0]
    assert "Worse than dense with the same optimizer: moe, AdamW" in said[1]
    assert (
        headline(found)
        == "In the same time and for the same money, dense, AdamW learnt most: 4.020 bits per byte."
    )
    for table in tables(found):
        assert all(len(row) == len(table.head) for row in table.rows), table.caption
    assert [row[0] for row in tables(found)[1].rows] == ["dense, AdamW", "moe, AdamW"]
    lines = markdown(found).splitlines()
    assert "| moe, AdamW | better (−0.120) | worse (+0.440) | worse (+0.440) | better (−0.120) |" in lines


def test_curves_that_cross_say_where(tmp_path: Path) -> None:
    write_run(tmp_path, "dense", "muon", 1, speed=100, gain=0.1)
    write_run(tmp_path, "moe", "muon", 1, speed=100, gain=0.12)
    late = [
        json.loads(line) for line in (tmp_path / "runs/moe-muon-1/metrics.jsonl").read_text().splitlines()
    ]
    for line, bits in zip(late[1::2], (4.9, 4.8, 4.5, 4.1, 3.8), strict=True):
        line["val_bits_per_byte"] = bits
    (tmp_path / "runs/moe-muon-1/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in late))
    write_study(tmp_path, RATE)
    found = json.loads((tmp_path / "study.json").read_text())
    [crossing] = found["equal"]["tokens"]["rows"][1]["crossings"]
    assert crossing["ahead_after"]
    assert 600 < crossing["amount"] < 800
    assert found["equal"]["tokens"]["rows"][1]["verdict"] == "one seed"
    assert any("There is one seed" in sentence for sentence in findings(found))


def test_the_drawings_stand_alone_and_in_the_report(folder: Path) -> None:
    write_study(folder, RATE)
    for axis in ("flops", "seconds"):
        root = ET.parse(folder / f"study-{axis}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        lines = root.findall("{*}polyline")
        assert len(lines) == 2
        for line in lines:
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", line.attrib["points"])]
            assert all(0 <= n <= 680 for n in numbers)
    page = write_report(folder.parents[1]).read_text()
    assert "In the same time and for the same money, dense, AdamW learnt most" in page
    assert page.count('class="study"') == 2
    assert "has not been evaluated" not in page


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"equal": 3}', '{"seeds": 1, "equal": {"flops": {}}}'])
def test_a_torn_file_is_as_good_as_none(folder: Path, text: str) -> None:
    (folder / "study.json").write_text(text)
    assert sections(folder.parents[1]) == []
    assert "has not been evaluated" in write_report(folder.parents[1]).read_text()


def test_names_from_a_file_are_escaped(folder: Path) -> None:
    write_study(folder, RATE)
    found = (folder / "study.json").read_text().replace('"moe"', '"<script>x</script>"')
    (folder / "study.json").write_text(found)
    assert "<script>" not in write_report(folder.parents[1]).read_text()


# ---- numbers ----


@pytest.mark.parametrize(
    ("freedom", "point"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423)]
)
def test_students_points(freedom: int, point: float) -> None:
    assert student(freedom) == pytest.approx(point, abs=1e-4)  # any table of the distribution


def test_an_interval_needs_two_values() -> None:
    assert interval([3.0]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-3
    )


@given(ys=st.lists(st.floats(0, 9), min_size=2, max_size=8), share=st.floats(0, 1), slope=st.floats(-3, 3))
def test_reading_a_curve(ys: list[float], share: float, slope: float) -> None:
    xs = [float(k * k) for k in range(len(ys))]
    amount = min(xs[-1], share * xs[-1])
    assert min(ys) - 1e-9 <= at({"x": xs, "bits": ys}, "x", amount) <= max(ys) + 1e-9
    straight = {"x": xs, "bits": [1 + slope * x for x in xs]}
    assert at(straight, "x", amount) == pytest.approx(1 + slope * amount, abs=1e-6)


def test_the_order_of_the_runs_does_not_matter(folder: Path) -> None:
    runs = [read_run(path.parent, 0.001) for path in sorted(folder.glob("runs/*/done.json"))]
    assert compare(runs, RATE) == compare(runs[::-1], RATE)
