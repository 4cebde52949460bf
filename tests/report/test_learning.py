"""Learning curves compared: read at equal amounts, paired over seeds, and sentences that follow the numbers."""

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.cost import spend
from farthing.report.compare import as_json, as_text, compare, write_html
from farthing.report.learning import bits_at, interval, read, student
from farthing.report.learning_text import drawing, findings, markdown, tables
from farthing.report.run import read_run


def write_run(
    folder: Path,
    recipe: str,
    seed: int,
    *,
    speed: float,
    gain: float,
    cores: float = 2.0,
    validation: str = "abc",
    start: float = 5.0,
) -> Path:
    """A run of 10 steps of 100 tokens, whose loss falls by `gain` a step and is measured at every other one."""
    place = folder / f"{recipe}-{seed}"
    stage = place / "stages" / "01-pretrain"
    stage.mkdir(parents=True)
    (place / "recipe.yaml").write_text(
        f"name: {recipe}\nseed: {seed}\nstages: [{{kind: pretrain, family: {recipe.partition('-')[0]}}}]\n"
    )
    done = {"parameters": 3000, "active": 1000, "data": {"validation": {"sha256": validation}}}
    (stage / "done.json").write_text(json.dumps(done))
    spent = {
        "stage": "01-pretrain", "activity": "train", "started": 1.7e9, "seconds": 1000 / speed, "device": "cpu: Test",
        "devices": 1, "tokens_in": 1000, "tokens_out": 0, "flops": 1, "joules": 1.0, "joules_are": "estimated",
        "usd": 1 / speed, "usd_rate": 3.6, "rate_source": "x", "status": "ok", "attempt": 1, "step": None,
    }  # fmt: skip
    (place / "ledger.jsonl").write_text(json.dumps(spent) + "\n")
    lines = []
    for step in range(1, 11):
        line: dict[str, Any] = {
            "step": step, "tokens": 100 * step, "flops": 600_000, "cores_had": cores,
            "seconds_by_activity": {"train": 100 / speed, "evaluate": 9.0},
        }  # fmt: skip
        if step % 2 == 0:
            line["val_bits_per_byte"] = start - gain * step + 0.01 * seed
        lines.append(line)
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Experts that learn more from a token, and take twice as long over it."""
    folders = []
    for seed in (1, 2, 3):
        cores = 1.0 if seed == 2 else 2.0
        folders.append(write_run(tmp_path, "dense-adamw", seed, speed=100, gain=0.10, cores=cores))
        folders.append(write_run(tmp_path, "moe-adamw", seed, speed=50, gain=0.11 + 0.001 * seed))
    return folders


def learning(folders: list[Path], baseline: str | None = None) -> dict[str, Any]:
    found = compare(folders, baseline).learning
    assert found is not None
    return found


def test_a_curve_is_of_training_alone(runs: list[Path]) -> None:
    run = read(read_run(runs[0]), spend.read_run(runs[0]))
    assert run is not None
    assert run.curve["seconds"] == pytest.approx([2, 4, 6, 8, 10])
    assert run.curve["dollars"] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert run.curve["tokens"] == [200, 400, 600, 800, 1000]
    assert run.curve["flops"] == pytest.approx([1.2e6, 2.4e6, 3.6e6, 4.8e6, 6e6])
    assert run.curve["bits"] == pytest.approx([4.81, 4.61, 4.41, 4.21, 4.01])
    assert (run.tokens_per_second, run.cores, run.seed) == (pytest.approx(100), 2.0, 1)


def test_who_wins_depends_on_what_is_equal(runs: list[Path]) -> None:
    found = learning(runs)
    assert found["baseline"] == "dense-adamw"
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
    assert learning(runs, "moe-adamw")["equal"]["tokens"]["rows"][0]["difference"] == pytest.approx(0.12)
    with pytest.raises(UserError, match=r"--baseline moo: no such variant; there are dense-adamw, moe-adamw"):
        compare(runs, "moo")


def test_the_sentences_and_tables_follow_the_numbers(runs: list[Path]) -> None:
    found = learning(runs)
    said = findings(found)
    assert said[0].startswith(
        "At equal FLOPs (6.00 MFLOP), moe-adamw is lowest with 3.900 bits per byte. Better than dense-adamw: moe-adamw "
    )
    assert "Worse than dense-adamw: moe-adamw" in said[1]
    assert any("Something else used the machine during dense-adamw-2:" in sentence for sentence in said)
    for table in tables(found):
        assert all(len(row) == len(table.head) for row in table.rows), table.caption
    lines = markdown(found).splitlines()
    assert "| moe-adamw | better (−0.120) | worse (+0.440) | worse (+0.440) | better (−0.120) |" in lines
    text = as_text(compare(runs))
    assert all(sentence in text for sentence in said)
    assert json.loads(json.dumps(as_json(compare(runs)), allow_nan=False))["learning"]["validation"] == "abc"


def test_curves_that_cross_say_where(tmp_path: Path) -> None:
    one = write_run(tmp_path, "dense", 1, speed=100, gain=0.1)
    other = write_run(tmp_path, "moe", 1, speed=100, gain=0.2, start=5.65)
    [_, row] = learning([one, other])["equal"]["tokens"]["rows"]
    [crossing] = row["crossings"]
    assert crossing["ahead_after"]
    assert 640 < crossing["amount"] < 660
    assert row["verdict"] == "one seed"


def test_seeds_that_do_not_pair_are_said(tmp_path: Path) -> None:
    one = write_run(tmp_path, "dense", 1, speed=100, gain=0.1)
    other = write_run(tmp_path, "moe", 2, speed=100, gain=0.2)
    found = learning([one, other])
    assert found["equal"]["tokens"]["rows"][1]["verdict"] == "unpaired"
    assert "No seed in common with dense, so nothing is certain: moe" in findings(found)[0]


def test_a_seed_counts_once(runs: list[Path], tmp_path: Path) -> None:
    again = write_run(tmp_path / "again", "dense-adamw", 1, speed=90, gain=0.2)
    found = compare([*runs, again])
    assert found.learning == compare(runs).learning
    assert f"{again} repeats seed 1 of a run with the same recipe" in found.left_out


def test_curves_without_a_common_amount_say_so(tmp_path: Path) -> None:
    fast = write_run(tmp_path, "dense", 1, speed=1000, gain=0.1)
    slow = write_run(tmp_path, "moe", 1, speed=10, gain=0.1)
    found = learning([fast, slow])
    assert list(found["equal"]) == ["flops", "tokens"]
    assert "no seconds and no dollars in common" in " ".join(findings(found))
    assert all(len(row) == len(table.head) for table in tables(found) for row in table.rows)


def test_only_runs_of_one_validation_set_are_compared(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "dense-muon", 1, speed=100, gain=0.1, validation="xyz")
    found = compare([*runs, other])
    assert found.learning is not None
    assert len(found.learning["variants"]) == 2
    assert found.left_out == [f"{other} has another validation set"]
    with pytest.raises(UserError, match="or two trained from scratch that share a validation set"):
        compare([runs[0], other])


@pytest.mark.parametrize(
    "name", ["stages/01-pretrain/done.json", "stages/01-pretrain/metrics.jsonl", "recipe.yaml"]
)
@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"data": 3}',
        "\x00{",
        '{"step": 1, "tokens": "x"}\n',
        "1: a\nb: c",
        "a: &a [*a]",
        "? [1, 2]\n: c",
        "name: [x]\nseed: {a: 1}",
    ],
)
def test_torn_files_are_no_error(runs: list[Path], name: str, content: str) -> None:
    (runs[0] / name).write_text(content)
    found = compare(runs)
    assert found.learning is not None
    assert as_text(found)


@pytest.mark.parametrize("value", [0, -1, 1e99, -1e99, 1e-99, None, "x", True, []])
@pytest.mark.parametrize("key", ["tokens", "flops", "val_bits_per_byte", "cores_had", "seconds_by_activity"])
def test_odd_numbers_are_no_error(runs: list[Path], key: str, value: Any) -> None:
    path = runs[0] / "stages" / "01-pretrain" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1][key] = {"train": value} if key == "seconds_by_activity" else value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(runs)
    assert found.learning is not None
    json.dumps(as_json(found), allow_nan=False)
    for axis in found.learning["equal"]:
        ET.fromstring(str(drawing(found.learning, axis)))


def names(folders: list[Path]) -> list[str]:
    return [variant["name"] for variant in learning(folders)["variants"]]


def rewrite(run: Path, old: str, new: str) -> None:
    path = run / "recipe.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_recipes_named_by_their_seed_are_one_variant(runs: list[Path]) -> None:
    for run in runs:
        rewrite(run, "-adamw", f"-adamw{run.name[-2:]}")
    assert names(runs) == ["dense-adamw", "moe-adamw"]
    assert names(runs[:2]) == ["dense-adamw-1", "moe-adamw-1"]  # of one run each the names stand


def test_variants_of_one_name_are_told_apart_by_their_settings(runs: list[Path]) -> None:
    for run in runs[1::2]:
        rewrite(run, "moe-adamw", "dense-adamw")
    assert names(runs) == ["dense-adamw family=dense", "dense-adamw family=moe"]
    rewrite(runs[0], "family: dense", f"family: {'very ' * 20}dense")  # too long a name: the directory's
    assert names(runs)[0] == runs[0].name


def test_a_seed_that_was_run_twice_counts_once(runs: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs[0], tmp_path / "again")
    found = compare([runs[0], copy, runs[1]])
    assert found.left_out == [f"{copy} repeats seed 1 of a run with the same recipe"]
    assert found.learning is not None
    assert [len(row["values"]) for row in found.learning["equal"]["tokens"]["rows"]] == [1, 1]


def test_the_validation_set_of_most_runs_is_compared(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "first", 1, speed=100, gain=0.1, validation="xyz")
    assert learning([other, *runs])["validation"] == "abc"


def test_curves_load_without_torch() -> None:
    code = "import sys, farthing.report.learning, farthing.report.learning_text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_drawings_stand_alone_and_names_are_escaped(runs: list[Path], tmp_path: Path) -> None:
    recipe = runs[0] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: dense-adamw", "name: '<script>x</script>'"))
    found = compare(runs)
    assert found.learning is not None
    for axis in ("flops", "seconds"):
        root = ET.fromstring(str(drawing(found.learning, axis)))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        lines = root.findall("{*}polyline")
        assert len(lines) == 2
        for line in lines:
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", line.attrib["points"])]
            assert all(0 <= number <= 680 for number in numbers)
    write_html(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "Learning curves" in page


# ---- numbers ----


@pytest.mark.parametrize(
    ("freedom", "point"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423)]
)
def test_students_points(freedom: int, point: float) -> None:
    assert student(freedom) == pytest.approx(point, abs=1e-4)  # any table of the distribution


def test_an_interval_needs_two_values() -> None:
    assert interval([3.0]) is None
    half = 4.3027 / math.sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), abs=1e-3)


@given(ys=st.lists(st.floats(0, 9), min_size=2, max_size=8), share=st.floats(0, 1), slope=st.floats(-3, 3))
def test_reading_a_curve(ys: list[float], share: float, slope: float) -> None:
    xs = [float(k * k) for k in range(len(ys))]
    amount = min(xs[-1], share * xs[-1])
    assert min(ys) - 1e-9 <= bits_at({"x": xs, "bits": ys}, "x", amount) <= max(ys) + 1e-9
    straight = {"x": xs, "bits": [1 + slope * x for x in xs]}
    assert bits_at(straight, "x", amount) == pytest.approx(1 + slope * amount, abs=1e-6)
